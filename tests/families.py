"""Which families the installed transformers has: older ones lack some, and their tests are skipped."""

from __future__ import annotations

import pytest


def is_installed(model_type: str) -> bool:
    """Whether the installed transformers knows a model type."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return model_type in CONFIG_MAPPING_NAMES


def needs(model_type: str) -> None:
    """Skips the test if the installed transformers does not know a model type."""
    import transformers

    if not is_installed(model_type):
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")
