"""Every family of transformers that is MoE already, with the command line's defaults: a folder is trained on two ranks,
goes on on one, is exported and loaded again. Losses are those of transformers' own model in plain torch.

All families share one launch of two ranks and one of one: starting up takes longer than a family.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from moecompile.runtime.data import load_text, train_tokenizer
from moecompile.schema import DataConfig
from tests.distributed.harness import run_distributed_test
from tests.tasks.families_job import MORE, STEPS, VOCAB, Report, resume_on_one, train_on_two

pytestmark = pytest.mark.filterwarnings("ignore")  # of other people's models

ZOO = Path(__file__).resolve().parents[3] / "shared" / "zoo"
if not (ZOO / "tiny_models.py").is_file():
    pytest.skip(f"there is no {ZOO}", allow_module_level=True)
sys.path.insert(0, str(ZOO))
import tiny_models  # noqa: E402

sys.path.remove(str(ZOO))
from tests.families import is_installed, needs  # noqa: E402
from tests.match.test_zoo import LANGUAGE_MODELS, auto_class, dbrx  # noqa: E402

# Families that cannot go all the way, how far they come, and why; docs/understand/existing-models.md says so too.
CANNOT = {
    "inkling2_loop_text": "its hashed vocabulary has no tiny form that a text's ids fit",
    "inkling2_text": "its hashed vocabulary has no tiny form that a text's ids fit",
    "switch_transformers": "each expert is a module: trained with data=moby_dick_spans, exported in the native format",
    "sarvam_moe": "transformers does not load what its own save_pretrained writes of a model that it has loaded",
    "ergo": "each expert has a norm with weights of its own, and they are refused",
    "jetmoe": "its experts are called in another way, and refused",
    "nllb_moe": "its experts get masks, and are refused", "doge": "it has no experts module",
}  # fmt: skip
CHANGES: dict[str, dict[str, Any]] = {
    **{name: changes for name, (_, changes) in LANGUAGE_MODELS.items()},
    "longcat_flash": {"zero_expert_num": 3, "n_routed_experts": 4, "moe_topk": 3},
    "qwen3_moe_normalized": {"norm_topk_prob": True},
}
NAMES = sorted({*tiny_models.names("moe"), *CHANGES, "dbrx"} - {*CANNOT})
TOLERANCE = 5e-6  # nats per token
# What a check has time for: those with a form of their own, and those that most people train. `make nightly` has the others.
IN_CHECK = {
    "afmoe", "dbrx", "deepseek_v2", "deepseek_v3", "deepseek_v4", "ernie4_5_moe", "gemma4_text", "glm4_moe", "gpt_oss",
    "granitemoe", "granitemoehybrid", "hy_v4", "jamba", "kimi_linear", "llama4_text", "longcat_flash", "minimax", "minimax_m2", "mixtral",
    "olmoe", "phimoe", "qwen2_moe", "qwen3_moe", "qwen3_moe_normalized", "qwen3_next", "qwen4_exp", "zaya",
}  # fmt: skip


def model_type(name: str) -> str:
    """Of transformers."""
    listed = tiny_models.architectures.get(name)
    return listed.model_type if listed else name.removesuffix("_normalized")


def family(name: str) -> Any:
    """A tiny model by the zoo's rules, with a vocabulary for a text, and nothing random."""
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if name == "dbrx":
        torch.manual_seed(0)
        made, _ = dbrx()
        made.config.vocab_size = VOCAB
        return type(made)(made.config)
    listed, base = tiny_models.architectures.get(name), model_type(name)
    kind: Any = getattr(transformers, listed.cls) if listed else auto_class(base)
    config_kind = getattr(kind, "config_class", None)
    if not isinstance(config_kind, type):
        config_kind = CONFIG_MAPPING[listed.model_type if listed else base]
    overrides = tiny_models._ZOO.overrides
    if name in CHANGES:
        overrides = {**overrides, base: {**overrides.get(base, {}), **CHANGES[name]}}
    config = tiny_models.tiny_config(config_kind, overrides)
    _quiet(config)
    torch.manual_seed(0)
    return kind(config) if listed else kind.from_config(config)


def _quiet(config: Any) -> None:
    for name, value in list(vars(config).items()):
        if hasattr(value, "to_dict"):
            _quiet(value)
        elif isinstance(value, float) and ("dropout" in name or "jitter" in name):
            setattr(config, name, 0.0)


@pytest.fixture(scope="module")
def reports(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[Report, Report]]:
    """Of each family that is selected (`-k mixtral`): what two ranks told, and one."""
    selected = {item.callspec.params["name"] for item in request.session.items if hasattr(item, "callspec")
                and item.path == request.path}  # fmt: skip
    names = [name for name in NAMES if name in selected and is_installed(model_type(name))]
    from transformers import PreTrainedTokenizerFast

    root = tmp_path_factory.mktemp("families")
    text = load_text(DataConfig())[20_000:50_000]
    (root / "text.txt").write_text(text)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=train_tokenizer(text, 300))
    rules = [(re.compile(p), VOCAB if v == tiny_models.VOCAB and "vocab" in p else v) for p, v in tiny_models._RULES]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny_models, "RULES", rules)
        for name in names:
            model = family(name)
            tiny_models.randomize(model)
            model.save_pretrained(root / "folders" / name)
            tokenizer.save_pretrained(root / "folders" / name)
    two = run_distributed_test(train_on_two, 2, root, names, timeout_s=900)[0]
    one = run_distributed_test(resume_on_one, 1, root, names, timeout_s=900)[0]
    return {name: (two[name], one[name]) for name in names}


@pytest.mark.slow
def test_all_families_are_here() -> None:
    assert len(NAMES) >= 56
    assert set(NAMES) >= IN_CHECK


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name in IN_CHECK else pytest.mark.nightly) for name in NAMES],
)
def test_a_folder_is_trained_resumed_and_exported(name: str, reports: dict[str, tuple[Report, Report]]) -> None:
    needs(model_type(name))
    two, one = reports[name]
    assert "error" not in two, two["trace"]
    assert "error" not in one, one["trace"]
    own, resumed, exported = one["own"], one["resumed"], one["exported"]
    assert (two["world_size"], two["steps"], resumed["world_size"], resumed["steps"]) == (2, STEPS, 1, MORE)
    assert two["num_rewritten"] == resumed["num_rewritten"] >= 1
    assert exported["max_abs_diff"] <= 1e-5
    losses = {
        "validation at first": (two["val_loss_first"], own["val"][0]),
        "first step": (two["loss_first"], own["steps"][0]),
        "last step of two ranks": (two["loss_last"], own["steps"][STEPS - 1]),
        "validation of two ranks": (two["val_loss"], own["val"][1]),
        "last step": (resumed["loss_last"], own["steps"][-1]),
        "validation": (resumed["val_loss"], own["val"][2]),
    }
    assert {what: pair for what, pair in losses.items() if not abs(pair[0] - pair[1]) <= TOLERANCE} == {}
    assert own["steps"][0] != own["steps"][-1]
