"""The parts of benchmarks/gpu.py. Every function takes a device, so that tests run the same code on a CPU."""
