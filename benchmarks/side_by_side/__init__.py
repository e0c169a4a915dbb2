"""The parts of benchmarks/peers.py and benchmarks/full_models.py: one adapter a peer, and what is measured of all."""
