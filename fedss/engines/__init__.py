"""Where clients train: this machine (``local``)."""
