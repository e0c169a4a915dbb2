"""The version, where nothing else has to be imported for it; pyproject.toml says the same."""

__version__ = "0.1.0"
