"""What is particular to a CPU: rows in blocks that fit the cache, products by our own kernels or a library's."""
