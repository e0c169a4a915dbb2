"""Models that are not of transformers, on ranks: layers in a dict of modules, outputs that are plain objects."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.nn import functional as F

import moecompile
from moecompile.passes.shard import device_mesh_of
from tests.distributed.gradient_job import full
from tests.distributed.harness import run_distributed_test
from tests.tiny import ids

VOCAB, HIDDEN = 31, 16
FORMS = ("dict", "list", "one")
OVERRIDES = ["mesh.ranks_per_node=2", "experts.num_routed=4", "routing.top_k=2"]


class FFN(nn.Module):
    """Its linears are in a dict, whose keys are no Python names."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"in-gate": (HIDDEN, 32), "in up": (HIDDEN, 32), "1/down": (32, HIDDEN)}
        self.parts = nn.ModuleDict({name: nn.Linear(*size, bias=False) for name, size in sizes.items()})

    def forward(self, x: Tensor) -> Tensor:
        """x + FFN(x)."""
        parts = self.parts
        out: Tensor = x + parts["1/down"](F.silu(parts["in-gate"](x)) * parts["in up"](x))
        return out


class Block(nn.Module):
    """One layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(HIDDEN), FFN()

    def forward(self, x: Tensor) -> Tensor:
        """The layer."""
        out: Tensor = self.mlp(self.norm(x))
        return out


class Model(nn.Module):
    """form: layers in a dict, in a list, or one FFN that is no layer."""

    def __init__(self, form: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(VOCAB, HIDDEN), nn.Linear(HIDDEN, VOCAB)
        blocks = {"first one": Block(), "a/second": Block()}
        self.layers: Any = blocks["first one"]
        if form != "one":
            self.layers = nn.ModuleDict(blocks) if form == "dict" else nn.ModuleList(blocks.values())
        self.form = form

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        """Logits, as an attribute of an object that torch does not look into."""
        x = self.embedding(input_ids)
        layers = [self.layers] if self.form == "one" else self.layers.children()
        for layer in layers:
            x = layer(x)
        return SimpleNamespace(logits=self.head(x))


def backward(model: nn.Module) -> dict[str, Tensor]:
    """Gradients of what no layer holds; in exact experts that are copies of an FFN they are those of the dense model."""
    F.cross_entropy(model(ids()).logits.flatten(0, 1), ids(seed=1).flatten(), reduction="sum").backward()
    return {name: full(p.grad) for name, p in model.named_parameters() if p.grad is not None and "layers" not in name}


def ranks(rank: int, world_size: int) -> dict[str, tuple[dict[str, Tensor], int]]:
    found = {}
    for form in FORMS:
        model = moecompile.compile_model(Model(form), OVERRIDES, example={"input_ids": ids()})
        plan = moecompile.plan_of(model)
        moecompile.shard(model, plan, device_mesh_of(plan.mesh, "cpu"))
        found[form] = (backward(model), sum(isinstance(module, FSDPModule) for module in model.modules()))
    return found


@pytest.mark.slow
def test_gradients_of_models_of_ones_own() -> None:
    found = run_distributed_test(ranks, 2)
    for form in FORMS:
        dense = backward(Model(form))
        for of_rank in found:
            grads, wrapped = of_rank[form]
            assert grads.keys() == dense.keys() == {"embedding.weight", "head.weight", "head.bias"}
            for name, grad in grads.items():  # both ranks had the same tokens, and sums are over ranks
                torch.testing.assert_close(grad, 2 * dense[name], rtol=1e-5, atol=1e-5)
            assert wrapped == (1 if form == "one" else 3), "each layer is gathered by itself"
