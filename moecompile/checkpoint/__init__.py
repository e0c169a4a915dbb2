"""Checkpoints: complete or absent, independent of the mesh, and free of code.

atomic     writes a folder that is complete or absent
folders    a run's checkpoints: names, the latest one, which are kept (needs no torch)
state      state.json: the position of a run, and the settings that a resumed run must keep (needs no torch)
sums       checksums of files (needs no torch)
tensors    weights and optimizer state through torch DCP, resharded when they are read
weights    a model's weights in one process, from a run's checkpoint or a native export
fingerprint  what a run computes and learns from, as names and values (needs no torch)
fit        whether a checkpoint fits a plan, and what differs
"""
