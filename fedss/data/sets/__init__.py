"""Published data sets, a file each."""
