"""The step-0 receipt: measured where it is promised, with the layers named that promise nothing, also beside others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from moecompile.errors import PassError
from moecompile.nn import Experts
from moecompile.passes.receipt import Receipt
from moecompile.pipeline import Compilation, compile_with_report
from moecompile.schema import Config, PerLayerConfig
from moecompile.tasks import compile as compile_task
from moecompile.tasks.show import show_compiled
from tests.existing_models import moe_inputs, moe_model
from tests.tiny import COPY4, TinyGPT, config, ids, max_diff


def mixed(**changes: dict[str, Any]) -> Config:
    """`per_layer.NAME` for each name: the experts that are given, for the layers that are given."""
    made = config(*COPY4)
    made.per_layer = {name: PerLayerConfig(**change) for name, change in changes.items()}
    return made


LAST_RANDOM = {"layers": "2:", "experts": {"init": "random"}}


def shown(compiled: Compilation, folder: Path) -> str:
    with (folder / "out.txt").open("w") as file:
        show_compiled(compiled, folder, Console(file=file, width=200))
    return " ".join((folder / "out.txt").read_text().split())


def test_all_layers_promise_it(tmp_path: Path) -> None:
    compiled = compile_with_report(TinyGPT(layers=3), config(*COPY4), example=ids())
    assert compiled.step0.max_abs_diff is not None and compiled.step0.max_abs_diff <= 1e-5
    assert (compiled.step0.reason, compiled.step0.promised_max_abs_diff) == (None, None)
    assert f"step 0 equals the dense model within {compiled.step0.max_abs_diff:.1e}" in shown(compiled, tmp_path)


def test_some_layers_promise_it_and_are_measured_alone(tmp_path: Path) -> None:
    model = TinyGPT(layers=3).eval()
    before = model(ids())
    compiled = compile_with_report(model, mixed(last=LAST_RANDOM), example=ids())
    receipt = compiled.step0
    assert receipt.max_abs_diff is None
    assert receipt.reason == "experts are random (1 of 3 layers promise nothing: blocks.2.mlp)"
    assert receipt.promised_max_abs_diff is not None and receipt.promised_max_abs_diff <= 1e-5
    assert len([module for module in model.modules() if isinstance(module, Experts)]) == 3
    assert max_diff(model(ids()), before) > 1e-3
    text = shown(compiled, tmp_path)
    assert (
        f"step 0 need not equal the dense model: {receipt.reason}; with the other layers alone it does, within" in text
    )


@pytest.mark.parametrize("changes", [{}, {"last": LAST_RANDOM}], ids=["all promise it", "two of three"])
def test_a_promise_that_is_broken_is_an_error_and_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    from moecompile.passes import rewrite

    def doubled(router: Any, experts: Experts, *rest: Any) -> None:
        fill(router, experts, *rest)
        with torch.no_grad():
            experts.down_proj.mul_(2)

    fill, model = rewrite.fill, TinyGPT(layers=3).eval()
    before, modules = model(ids()), list(model.modules())
    with monkeypatch.context() as patch:
        patch.setattr(rewrite, "fill", doubled)
        with pytest.raises(
            PassError, match=r"blocks\.0\.mlp: outputs on the example are promised to stay but differ by"
        ):
            compile_with_report(model, mixed(**changes), example=ids())
    assert list(model.modules()) == modules
    assert torch.equal(model(ids()), before)
    compile_with_report(model, mixed(**changes), example=ids())


def test_outputs_that_are_no_numbers_can_stay() -> None:
    class Masked(TinyGPT):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out = super().forward(x).clone()
            out[..., 0], out[..., 1] = float("-inf"), float("nan")
            return out

    compiled = compile_with_report(Masked(layers=1), config(*COPY4), example=ids())
    assert compiled.step0.max_abs_diff is not None and compiled.step0.max_abs_diff <= 1e-5


def test_layers_with_different_reasons_are_named() -> None:
    first = {"layers": ":1", "experts": {"init": "drop"}}
    compiled = compile_with_report(TinyGPT(layers=3), mixed(first=first, last=LAST_RANDOM), example=ids())
    assert compiled.step0.reason == (
        "every expert reinitializes 0.5 of its hidden units (2 of 3 layers promise nothing: blocks.0.mlp, blocks.2.mlp)"
    )
    all_random = mixed(all={"experts": {"init": "random"}})
    assert compile_with_report(TinyGPT(), all_random, example=ids()).step0 == Receipt(reason="experts are random")


def test_experts_that_the_model_has_promise_it_beside_dense_layers_that_do_not() -> None:
    model = moe_model("deepseek_v3")
    example = moe_inputs("deepseek_v3", ids())
    given = config(*COPY4, "experts.sites=both", "experts.init=random")
    compiled = compile_with_report(model, given, example=example)
    receipt = compiled.step0
    assert receipt.reason == "experts are random (1 of 2 layers promise nothing: model.layers.0.mlp)"
    assert receipt.promised_max_abs_diff is not None and receipt.promised_max_abs_diff <= 1e-5


def test_the_receipt_is_stored(tmp_path: Path) -> None:
    from moecompile.compose import compose_config

    given = compose_config(["model.config.num_hidden_layers=3", "data.seq_len=16", "data.vocab_size=300"])
    given.per_layer = {"last": PerLayerConfig(**LAST_RANDOM)}
    compile_task.run(given, tmp_path)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["step0_max_abs_diff"] is None
    assert result["step0_reason"].startswith("experts are random (1 of 3 layers promise nothing: model.layers.2.mlp")
    assert result["step0_promised_max_abs_diff"] <= 1e-5
