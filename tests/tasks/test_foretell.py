"""A report does not end a run, and a config whose values differ by layer has a shape."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moecompile import compile_model, plan_of
from moecompile.pipeline.shape import shape_of_model
from moecompile.schema import Config
from moecompile.tasks import foretell
from tests.tiny import tiny_llama


class _ByLayer:
    """As transformers' config of Gemma 4: its head_dim is no one number."""

    num_attention_heads, hidden_size, vocab_size = 4, 32, 31

    @property
    def head_dim(self) -> int:
        raise RuntimeError("'head_dim' is a per-layer attribute and may vary across layers")


def test_values_that_differ_by_layer_and_reports_that_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    outline = foretell.outline(model)
    assert outline is not None
    ids = torch.zeros(1, 4, dtype=torch.int64)
    plan = plan_of(compile_model(model, ["experts.num_routed=4", "routing.top_k=2"], example={"input_ids": ids}))
    outline.config = _ByLayer()
    shape = shape_of_model(outline, plan)
    assert all(layer.mixer is not None and layer.mixer.d_qk == 8 for layer in shape.layers)

    def broken(*_: object) -> None:
        raise ValueError

    monkeypatch.setattr(foretell, "shape_of_model", broken)
    assert foretell.shape_of(outline, plan) is None
    monkeypatch.setattr(foretell, "forecast_plan", broken)
    foretell.write_forecast(shape, plan, Config(), tmp_path)
    assert list(tmp_path.iterdir()) == []
