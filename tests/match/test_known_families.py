"""Every MoE family of the installed transformers is tried somewhere, or named here with the reason: of a new release, this
names the families that nobody has looked at. Nightly, since it is about transformers and not about a change.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator

import pytest
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

from tests.match.test_zoo import LANGUAGE_MODELS, REFUSED, tiny_models

# What no test of whole models has, and why. The experts of all are tried alone (test_experts_of_transformers.py), but those of
# the last four.
OTHERS = {
    **dict.fromkeys(
        (
            "deepseek_ocr2_text", "diffusion_gemma_text", "ernie4_5_vl_moe_text", "glm4v_moe_text", "glm5_next_text",
            "hy_v4_vl_text", "mistral_large4_text", "muse_spark_text", "qwen3_omni_moe_talker_text", "qwen3_vl_moe_text",
        ),
        "the text part of a model with other inputs",
    ),
    "dots3_note_vision_encoder": "a part of dots3_note", "qwen3_omni_moe_text": "a part of qwen3_omni_moe_thinker",
    "step3p5": "the text part of step3p7", "unlimited_ocr_text": "a part of unlimited_ocr",
    "longcat_flash": "test_experts_that_are_the_identity_stay_with_their_token",
    "mistral4": "no tiny form by the zoo's rules", "nemotron_h": "tests/export/test_pairs.py",
    "openai_privacy_filter": "it classifies tokens",
    "doge": "it has no experts module", "nllb-moe": "its experts get masks, and are refused",
    "switch_transformers": "tests/match/test_existing.py", "vitpose_backbone": "its experts are those of data sets",
}  # fmt: skip


def moe_types() -> Iterator[str]:
    """Model types whose own config has a setting of experts."""
    for name in CONFIG_MAPPING_NAMES:
        kind = CONFIG_MAPPING[name]
        declared = {key for base in kind.__mro__ for key in vars(base).get("__annotations__", {})}
        settings = {*declared, *inspect.signature(kind.__init__).parameters, *kind.attribute_map}
        if any("expert" in setting for setting in settings):
            yield name


@pytest.mark.nightly
def test_every_moe_family_of_this_transformers_is_known() -> None:
    listed = {tiny_models.architectures[name].model_type for name in tiny_models.names("moe")}
    found = set(moe_types())
    assert len(found) > 30
    unknown = sorted(found - {*listed, *LANGUAGE_MODELS, *REFUSED, *OTHERS})
    assert unknown == [], f"transformers {transformers.__version__} has MoE families that no table names"
    assert not {*OTHERS} & {*listed, *LANGUAGE_MODELS, *REFUSED}
