"""Tiny models of many architectures (../shared/zoo): every FFN that is a module of its own becomes experts."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from moecompile.pipeline import compile_with_report
from tests.models import COPY4, config, max_diff

ZOO = Path(__file__).resolve().parents[3] / "shared" / "zoo"
if not (ZOO / "tiny_models.py").is_file():
    pytest.skip(f"there is no {ZOO}", allow_module_level=True)
sys.path.insert(0, str(ZOO))
import tiny_models  # noqa: E402

sys.path.remove(str(ZOO))

pytestmark = pytest.mark.filterwarnings("ignore")  # of other people's models

DENSE = config(*COPY4, "experts.sites=dense")  # else a model that has experts already is refused
# Models whose FFNs are modules of their own and yet are not found, and what is said about them.
NOT_YET = {
    "apertus": "",  # xIELU: an activation with learned parameters and a branch by torch.where
    "bitnet": "the activation also depends on mean",  # a norm inside
    "glm4": "the activation depends on getitem",  # gate and up are one linear
    "gpt-sw3": "",  # Conv1D: a linear of transformers' own, with its weight transposed
    "gpt2": "",  # the same
    "modernbert": "the activation depends on getitem",
    "phi3": "the activation depends on getitem",
    "phi4_multimodal": "the activation depends on getitem",
    "zamba": "its weight model.layers.1.shared_transf.feed_forward.gate_proj.weight is also used by model.layers.3.",
}

# Shared experts of these are rewritten: their experts are called in a way of their own, so that no MoE block is seen.
SHARED_TOO = {"llama4", "llama4_text"}


@pytest.mark.parametrize("name", sorted(tiny_models.architectures))
def test_ffns_become_experts_and_the_outputs_stay(name: str) -> None:
    architecture = tiny_models.architectures[name]
    model, inputs = tiny_models.build(name)
    with torch.no_grad():
        wanted = tiny_models.output_tensors(model(**inputs))
        compiled = compile_with_report(model, DENSE, example=inputs)
        got = tiny_models.output_tensors(compiled.model(**inputs))
    rewritten = {site.fqn for site in compiled.sites if site.status == "rewritten"}
    forms = ("own", "shared") if name in SHARED_TOO else ("own",)
    if name in NOT_YET:
        assert rewritten == set()
        reasons = [site.reason for site in compiled.sites]
        assert not NOT_YET[name] or any(reason.startswith(NOT_YET[name]) for reason in reasons), reasons
    else:
        assert len(rewritten) == sum(architecture.sites.get(form, 0) for form in forms), compiled.sites
    assert all(site.reason for site in compiled.sites if site.status != "rewritten")
    assert len(got) == len(wanted)
    tolerance = 1e-4 if rewritten else 0.0
    assert all(max_diff(a, b) <= tolerance for a, b in zip(got, wanted, strict=True))
    assert compiled.step0_max_abs_diff is None if not rewritten else compiled.step0_max_abs_diff <= 1e-4


def test_gradients_reach_router_and_experts_and_what_lies_below() -> None:
    model, inputs = tiny_models.build("qwen3")
    compile_with_report(model, DENSE, example=inputs)
    model.train()
    model(**inputs).logits.square().mean().backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert without == []
