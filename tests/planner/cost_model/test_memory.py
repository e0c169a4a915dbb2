"""Memory of described layouts: by hand for a small model, and beside published peaks whose byte widths are known."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from benchmarks.forecast.families import shape_of
from moecompile.planner.cost_model.inputs import Layout, Software
from moecompile.planner.cost_model.memory import in_flight, memory_of

PUBLISHED = Path(__file__).parents[3] / "benchmarks" / "published"
TINY = shape_of(
    "tiny", {"layers": 4, "hidden": 64, "vocab": 100, "heads": 4, "kv": 2, "moe_ffn": 32, "experts": 8, "topk": 2}
)
D, F, E, K, WIDTH, TOKENS = 64, 32, 8, 2, 2 * 64 + 2 * 32, 256  # WIDTH: queries, outputs, keys and values


def described(name: str, **more: Any) -> Any:
    configs = {e["name"]: e["config"] for e in yaml.safe_load((PUBLISHED / "published.yaml").read_text())["models"]}
    configs |= yaml.safe_load((PUBLISHED / "models.yaml").read_text())["more"]
    return shape_of(name, {**configs[name], **more})


def test_by_hand() -> None:
    layout = Layout(gpus=8, seq=TOKENS, global_batch=16, ep=2, pp=2, zero=1)
    attention, expert = 2 * D * D + 2 * D * 2 * 16, 3 * D * F
    dense = (4 * (attention + E * D) + 2 * 100 * D) / 2
    experts = 4 * E * expert / (2 * 2)
    memory = memory_of(TINY, layout, Software())
    assert memory.weights == 2 * (dense + experts)
    assert memory.grads == 4 * (dense + experts)
    assert memory.optimizer == 12 * (dense / 4 + experts / 2)  # four replicas of dense weights, two of experts
    layer = 2 * (2 * D + WIDTH + 2 * D + K * (D + 3 * F)) + 2 * E * 4
    assert memory.activations == 2 * 2 * layer * TOKENS  # two layers, two micro-batches in flight
    assert memory.rows == 2 * TOKENS * K * D * 2
    assert memory.total == memory.weights + memory.grads + memory.optimizer + memory.activations + memory.rows
    widths = memory_of(TINY, layout, Software(grad_bits=16, moment_bits=16))
    assert widths.grads == 2 * (dense + experts)
    assert widths.optimizer == 8 * (dense / 4 + experts / 2)
    whole = memory_of(TINY, replace(layout, zero=3, ep=1, pp=1), Software())
    params = 4 * (attention + E * D + E * expert) + 2 * 100 * D
    assert whole.weights == 2 * (params / 8 + 2 * (attention + E * D + E * expert))
    assert whole.rows == 0


def test_what_is_recomputed_is_not_kept() -> None:
    layout = Layout(gpus=8, seq=TOKENS, global_batch=64, ep=8, zero=1)
    kept = {
        name: memory_of(TINY, layout, Software(recompute=(name,))).activations
        for name in ("full", "all_but_exchanges", "moe", "attention", "layernorm", "moe_act")
    }
    everything = memory_of(TINY, layout, Software()).activations
    assert kept["full"] < kept["all_but_exchanges"] < everything
    assert everything - kept["layernorm"] == 4 * 2 * D * 2 * TOKENS
    assert everything - kept["moe_act"] == 4 * K * F * 2 * TOKENS
    assert everything - kept["attention"] == 4 * (D + WIDTH) * 2 * TOKENS
    assert kept["moe"] < everything


def test_micro_batches_in_flight() -> None:
    layout = Layout(gpus=32, seq=TOKENS, global_batch=1024, pp=4, vpp=1, zero=1)
    assert in_flight(layout, Software()) == 4
    assert in_flight(replace(layout, vpp=3), Software()) == 5
    assert in_flight(layout, Software(schedule="dualpipe")) == 5
    assert in_flight(replace(layout, pp=1), Software()) == 1
    assert in_flight(replace(layout, global_batch=16), Software()) == 2


def test_published_peaks() -> None:
    """Rows M01 and M06 of published.yaml, 1e9 bytes: fp32 states by the paper, and 16-bit ones of the recipe."""
    deepseek = memory_of(
        described("deepseek-v3"), Layout(gpus=256, seq=4096, global_batch=4096, ep=64, pp=4, vpp=4), Software()
    )
    assert deepseek.optimizer / 1e9 == pytest.approx(32.1, rel=0.01)
    assert deepseek.activations / 1e9 == pytest.approx(131.0, rel=0.07)
    assert deepseek.total / 1e9 == pytest.approx(199.5, rel=0.08)
    moonlight = memory_of(
        described("moonlight-16b"), Layout(gpus=8, seq=4096, global_batch=4, ep=8, tp=2),
        Software(grad_bits=16, moment_bits=16),
    )  # fmt: skip
    assert moonlight.total / 1e9 == pytest.approx(36.6, rel=0.05)
