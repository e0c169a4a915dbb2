"""CPU specifics: blocks of rows that fit in the cache, and products by our own kernels or by a library."""
