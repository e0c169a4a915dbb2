"""Models that are built, or loaded: from a config, a folder, a package, whole or each rank its part."""
