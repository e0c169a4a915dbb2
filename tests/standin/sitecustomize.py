"""With this folder in PYTHONPATH, Python has GPUs that are played by the CPU."""

import host_gpu

host_gpu.play()
