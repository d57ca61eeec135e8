"""Measurements: `make bench`, or `python -m bench --help`. Every figure is set against a peer of the same run."""
