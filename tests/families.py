"""Which families the installed transformers has: older ones lack some, and their tests are skipped."""

from __future__ import annotations

import pytest
from torch import nn


def is_installed(model_type: str) -> bool:
    """Whether the installed transformers knows a model type."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return model_type in CONFIG_MAPPING_NAMES


def needs(model_type: str) -> None:
    """Skips the test if the installed transformers does not know a model type."""
    import transformers

    if not is_installed(model_type):
        pytest.skip(f"transformers {transformers.__version__} has no {model_type}")


def has_identity(model: nn.Module, num_experts: int) -> bool:
    """Whether a LongCat-Flash's experts module has identity experts; since transformers 5.25 its block computes them."""
    weights = [value for name, value in model.named_parameters() if name.endswith("experts.gate_up_proj")]
    return weights[0].shape[0] > num_experts


def needs_identity(model: nn.Module, num_experts: int) -> None:
    """Skips the test where the block computes identity experts."""
    if not has_identity(model, num_experts):
        pytest.skip("since transformers 5.25 LongCat-Flash's block computes its identity experts")
