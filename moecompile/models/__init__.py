"""Builds or loads models: from a config, a folder or a package, in full or only the shards of each rank."""
