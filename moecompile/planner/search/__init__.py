"""Search over layouts: those that this package runs (run.py), and those that are described (described.py)."""
