"""What layers keep is counted by their own code in every family: those that fall back are listed, with their reason."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from moecompile.pipeline.facts import facts_of
from tests.architectures import ALL, inputs_of, model_of

pytestmark = pytest.mark.filterwarnings("ignore")  # of other people's models
ZOO = Path(__file__).resolve().parents[3] / "shared" / "zoo"
tiny_models: Any = None
if (ZOO / "tiny_models.py").is_file():
    sys.path.insert(0, str(ZOO))
    import tiny_models

    sys.path.remove(str(ZOO))

_VALUES = "Tensor.item() cannot be called on meta tensors"  # its code asks for values, which a plan does not have
_INDICES = "The register_meta function for torch.nonzero()"  # likewise
_IMAGES = "channel dimension"  # an image is no sequence: its channels are not positions
_CODES = "shape '[-1, 4, 16]' is invalid"  # four rows of codes are one sequence
FALLBACKS = {
    **dict.fromkeys((
        "bart", "bart-causal", "big_bird", "biogpt", "blenderbot", "blenderbot-small", "deberta-v2", "marian",
        "megatron-bert", "plbart", "rembert",
    ), _VALUES),
    **dict.fromkeys(("qwen4_exp", "qwen4_exp_text", "xmod"), _INDICES),
    **dict.fromkeys(("beit", "convnext", "deit", "siglip_vision_model", "swin", "vit"), _IMAGES),
    **dict.fromkeys(("musicgen", "musicgen_melody"), _CODES),
    "hubert": "the example has no sequences",
}  # fmt: skip
"""Family -> what its reason says. A plan takes what its layers keep as Llama's, and says so."""


def reason_of(model: nn.Module, inputs: dict[str, Tensor]) -> str | None:
    """Why its layers are not counted; None: they are, or it has none."""
    kept = facts_of(model, inputs).kept
    if kept is None or kept(4, 16, 1, False):
        return None
    return kept.reason or None


@pytest.mark.parametrize("name", ALL)
def test_models_of_the_tests_are_counted(name: str) -> None:
    assert reason_of(model_of(name), inputs_of(name)) is None


@pytest.mark.skipif(tiny_models is None, reason=f"there is no {ZOO}")
@pytest.mark.slow
def test_families_that_fall_back_are_listed() -> None:
    reasons = {name: reason_of(*tiny_models.build(name)) for name in sorted(tiny_models.architectures)}
    found = {name: reason for name, reason in reasons.items() if reason is not None}
    assert found.keys() == FALLBACKS.keys()
    assert [name for name, reason in found.items() if FALLBACKS[name] not in reason] == []
    assert all(": " in reason.removeprefix("the forward: ") for reason in found.values())  # class and message
