"""Experiments: one binary a file, `python -m experiments.<name> --help`."""
