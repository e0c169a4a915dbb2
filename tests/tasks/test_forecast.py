"""A report does not end a run but says why there is no forecast; a config whose values differ by layer has a shape."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import torch

from moecompile import compile_model, plan_of
from moecompile.compose import compose_config
from moecompile.tasks import forecast as task
from tests.tiny import tiny_llama


class _ByLayer:
    """As transformers' config of Gemma 4: its head_dim is no one number."""

    num_attention_heads, hidden_size, vocab_size = 4, 32, 31

    @property
    def head_dim(self) -> int:
        raise RuntimeError("'head_dim' is a per-layer attribute and may vary across layers")


def test_values_that_differ_by_layer_and_runs_without_a_forecast(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama()
    outline = task.outline(model)
    assert outline is not None
    ids = torch.zeros(1, 4, dtype=torch.int64)
    plan = plan_of(compile_model(model, ["experts.num_routed=4", "routing.top_k=2"], example={"input_ids": ids}))
    outline.config = _ByLayer()
    shape = task.shape_of(outline, plan)
    assert shape is not None
    assert all(layer.mixer is not None and layer.mixer.d_qk == 8 for layer in shape.layers)
    assert capsys.readouterr().out == ""

    task.write_forecast(shape, plan, compose_config(["hardware.figures.watts.value=null"]), tmp_path)
    assert capsys.readouterr().out == (
        "no forecast of a step: hardware.figures.watts.value=null: is needed to predict the time of a step. "
        "Give the number and its source.\n"
    )
    assert list(tmp_path.iterdir()) == []
    model.lock = threading.Lock()
    assert task.outline(model) is None
    assert (
        capsys.readouterr().out
        == "no forecast of a step: the model cannot be copied: cannot pickle '_thread.lock' object\n"
    )

    def broken(*_: object) -> None:
        raise ValueError("a defect")

    monkeypatch.setattr(task, "forecast_plan", broken)
    with pytest.raises(ValueError, match="a defect"):
        task.write_forecast(shape, plan, compose_config([]), tmp_path)
