"""Search over layouts: those that this package runs (runnable.py), and those that are described (described.py)."""
