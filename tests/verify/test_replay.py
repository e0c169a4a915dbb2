"""task=verify with routing.replay: both sides replay drawn experts; weights without gradients are caught."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moecompile.compose import compose_config
from moecompile.nn import Router
from moecompile.nn.replay import _TopK
from moecompile.tasks.verify import shrink
from moecompile.verify import Check, certify_config
from moecompile.verify.job import Trace
from tests.distributed.harness import run_distributed_test
from tests.tiny import NARROW, SHORT

SMALL = [
    "mesh=cpu_1x2", "routing.replay=record", "verify.dtype=float64", "trainer.checkpointing=full", "data.vocab_size=300",
    "data.seq_len=16", "data.micro_batch_size=1", "data.global_batch_size=8", SHORT,
]  # fmt: skip
LAYERS = ["model.config.num_hidden_layers=2"]
MODELS = {
    "sigmoid, groups": ["recipe=deepseek_ep", *LAYERS, *NARROW],
    "softmax": ["recipe=mixtral_ep", *LAYERS, *NARROW, "balance.losses.z=0.01"],
    "t5": ["recipe=switch_ep", "model.config.num_layers=2", "model.config.d_model=64", "model.config.d_ff=128"],
    "own router": ["model=qwen3_30b_a3b", *LAYERS, "model.device=cpu"],
}

MUTATIONS = {"dead": "gradients"}


def _dead(router: Router, scores_TE: Tensor, ids_TK: Tensor, inputs: Tensor) -> tuple[Tensor, ...]:
    """Weights as they were recorded: numbers, through which no gradient flows."""
    weights = _right_weights(router, scores_TE, ids_TK, inputs)
    return weights if router.replayed is None else tuple(each.detach() for each in weights)


def _dead_own(mode: _TopK, *args: Any) -> Any:
    out = _right_topk(mode, *args)
    return type(out)((out.values.detach(), out.indices)) if isinstance(out, torch.return_types.topk) else out


_right_weights, _right_topk = Router._weights, _TopK.__torch_function__


def _all(rank: int, world_size: int, folder: Path) -> dict[str, tuple[list[Check], list[Trace]]]:
    module = importlib.import_module("moecompile.verify.whole_run")
    traces: list[Trace] = []

    def seen(*args: Any) -> Trace:
        traces.append(right(*args))
        return traces[-1]

    def dead(*args: Any) -> Trace:
        """The ranks, not the process that they are compared with."""
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(Router, "_weights", _dead)
            inner.setattr(_TopK, "__torch_function__", _dead_own)
            return right(*args)

    right, found = module.run_ranks, {}
    for name, overrides in MODELS.items():
        for kind, function in (("right", seen), ("dead", dead)):
            traces.clear()
            config = shrink(compose_config(["task=verify", *overrides, *SMALL]), steps=1)[0]  # only step 0 is replayed
            (folder / name / kind).mkdir(parents=True, exist_ok=True)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(module, "run_ranks", function)
                checks = certify_config(config, folder / name / kind)[0]
            found[f"{name}, {kind}"] = checks, list(traces)
    return found


@pytest.mark.slow
def test_replayed_experts_are_used_and_scores_without_gradient_are_caught(tmp_path: Path) -> None:
    found = run_distributed_test(_all, 2, tmp_path, timeout_s=500)[0]
    for name in MODELS:
        checks, (trace,) = found[f"{name}, right"]
        assert [check for check in checks if not check.passed] == [], name
        if name != "own router":  # the routers' own choices are others than those that were used
            assert any(
                (ours.sort(dim=1).values != used).any() for layer, chosen in trace.choices.items()
                for ours, used in zip(chosen, trace.routes[layer], strict=True)
            )  # fmt: skip
        failed = [check.name for check in found[f"{name}, dead"][0] if not check.passed]
        assert any(MUTATIONS["dead"] in name for name in failed), (name, failed)
