"""A collection as a web page of this machine; ``app`` and ``guard`` need ``fedss[serve]``."""

from fedss.errors import ConfigError


def lacks_server(error: ImportError) -> ConfigError:
    """The error where the packages of a web server are not installed."""
    return ConfigError(f'fedss serve needs a web server ({error}): pip install "fedss[serve]"')
