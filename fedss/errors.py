"""What can go wrong by a user's doing; the command line prints each and exits with 2."""


class FedssError(Exception):
    """A mistake a user can mend: says what was expected, what came, where, and what to do."""


class ConfigError(FedssError, ValueError):
    """A setting that cannot be: unknown name, wrong range, two settings that exclude each other."""


class DataError(FedssError, ValueError):
    """Pictures or a manifest that cannot be read or do not fit together."""


class RunFolderError(FedssError, RuntimeError):
    """A run folder that belongs to another configuration, is damaged, or cannot be written."""


class DivergedError(FedssError, ArithmeticError):
    """A loss or an update became NaN or infinite; names round and client."""
