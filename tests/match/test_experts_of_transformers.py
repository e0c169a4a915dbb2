"""Every class of transformers that uses its experts interface: the rewritten experts equal its own eager loop.

The classes are built alone, from a config that answers every question with something small, so that none is left out.
"""

from __future__ import annotations

import copy
import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from moecompile.pipeline import compile_with_report
from moecompile.verify import relative_error, worst
from tests.tiny import config

pytestmark = pytest.mark.filterwarnings("ignore")  # of other people's models

E, F, D, K, T = 5, 24, 16, 3, 11
_SIZES = (
    (r"n_shared_experts|shared_expert.*|num_shared.*", 0),
    (r".*experts|.*num_experts|num_local_experts", E),
    (r".*intermediate_size|.*ffn.*", F),
    (r".*(hidden|latent)_size|d_model|.*dim", D),
    (r".*act|.*activation|.*act_fn|hidden_act.*", "silu"),
    (r".*eps", 1e-6),
    (r"_experts_implementation", "eager"),
)


class AnyConfig:
    """Answers by the name of what is asked for; numbers of other kinds are 1.5."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return next((value for pattern, value in _SIZES if re.fullmatch(pattern, name)), 1.5)


def _classes() -> Iterator[type[nn.Module]]:
    """Classes under `@use_experts_implementation`."""
    for path in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        names = re.findall(r"@use_experts_implementation[^\n]*\nclass (\w+)", path.read_text(encoding="utf-8"))
        for name in names:
            yield getattr(importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}"), name)


def _undecorated() -> type[nn.Module]:
    from transformers.models.step3p7.modeling_step3p7 import Step3p7Experts

    return Step3p7Experts  # the same form without the decorator


CLASSES = [*_classes(), _undecorated()]


class Block(nn.Module):
    """A router beside the experts."""

    def __init__(self, experts: nn.Module, d_model: int, num_experts: int) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(d_model, num_experts), experts

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.gate(x).softmax(-1).topk(K)
        return self.experts(x, ids, weights)


def test_all_families_are_here() -> None:
    assert len(CLASSES) >= 68


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_outputs_and_gradients_equal_the_eager_loop(kind: type[nn.Module]) -> None:
    torch.manual_seed(0)
    experts = kind(AnyConfig())
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.3)
    stack = experts.down_proj
    d_model = stack.shape[2 if getattr(experts, "is_transposed", False) else 1]
    model, x = Block(experts, d_model, stack.shape[0]), torch.randn(T, d_model)
    reference, names = copy.deepcopy(model), list(model.state_dict())
    compiled = compile_with_report(model, config(), example=x)
    assert [layer.site.fqn for layer in compiled.plan.layers] == ["experts"]
    assert list(model.state_dict()) == names
    grads = []
    outputs = []
    for each in (compiled.model, reference):
        output = each(x)
        output.square().mean().backward()
        outputs.append(output.detach())
        grads.append({name: parameter.grad for name, parameter in each.named_parameters()})
    assert relative_error(*outputs) <= 1e-5
    assert worst(*grads) < (1e-4, "")
    assert all(grad.any() for grad in grads[0].values())
