"""Checkpoints: whole or not there, independent of the mesh, and without code in them.

atomic     a folder is whole or not there
folders    a run's checkpoints: names, the latest one, what is kept (needs no torch)
state      state.json: where a run stood, and which settings it must go on with (needs no torch)
sums       checksums of its files (needs no torch)
tensors    weights and optimizer state through torch DCP, resharded when they are read
weights    a model's weights in one process, from a run's checkpoint or a native export
fingerprint  what a run computes and learns from, by names and values (needs no torch)
fit        whether a checkpoint fits a plan, and what differs
"""
