"""Checkpoints: complete or absent, independent of the mesh, and free of code.

folders      a run's checkpoints: names, the latest one, which are kept; checksums of files (needs no torch)
tensors      weights and optimizer state through torch DCP, resharded when they are read; weights in one process
placed       in which order experts are, where a plan places them
writer       saves one at a time, also in the background
resume       state.json: the position of a run, and the settings that a resumed run must keep (needs no torch)
fingerprint  what a run computes and learns from, as names and values (needs no torch)
fit          whether a checkpoint fits a plan, and what differs (needs no torch)
"""
