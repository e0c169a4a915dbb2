"""Every class of transformers that uses its experts interface: the rewritten experts equal its own eager loop.

The classes are built alone, from a config that answers every question with something small, so that none is left out.
"""

from __future__ import annotations

import copy
import importlib.util
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn

from moecompile.errors import ConfigError
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
    (r".*limits", [0.5]),  # of each layer: what the one layer clamps
    (r"_experts_implementation", "eager"),
)


class AnyConfig:
    """Answers by the name of what is asked for; numbers of other kinds are 1.5."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return next((value for pattern, value in _SIZES if re.fullmatch(pattern, name)), 1.5)


def _classes() -> Iterator[type[nn.Module]]:
    """Classes under `@use_experts_implementation`; those that a model calls, where they are made of one (Ergo)."""
    for path in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        names = re.findall(r"@use_experts_implementation[^\n]*\nclass (\w+)", path.read_text(encoding="utf-8"))
        module = importlib.import_module(f"transformers.models.{path.parent.name}.{path.stem}") if names else None
        for kind in (getattr(module, name) for name in names):
            made = [each for each in vars(module).values() if inspect.isclass(each) and kind in each.__mro__[1:]]
            yield from made or [kind]


def _undecorated() -> Iterator[type[nn.Module]]:
    """The same form without the decorator: Step 3.7 before transformers 5.25."""
    name = "transformers.models.step3p7.modeling_step3p7"
    if importlib.util.find_spec(name.rpartition(".")[0]):
        yield importlib.import_module(name).Step3p7Experts


CLASSES = list(dict.fromkeys([*_classes(), *_undecorated()]))
# Experts that are seen and cannot be rewritten, and why.
REFUSED = {"ErgoExperts": "its post_expert_norm has weights of its own"}  # a row for each expert
TAKEN = [kind for kind in CLASSES if kind.__name__ not in REFUSED]


class Block(nn.Module):
    """A router beside the experts."""

    def __init__(self, experts: nn.Module, d_model: int, num_experts: int) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(d_model, num_experts), experts

    def forward(self, x: Tensor) -> Tensor:
        weights, ids = self.gate(x).softmax(-1).topk(K)
        return self.experts(x, ids, weights)


def made(kind: type[nn.Module]) -> tuple[Block, Tensor]:
    """The experts of one layer in a block with random weights, and its input."""
    torch.manual_seed(0)
    of_layer = {"layer_idx": 0} if "layer_idx" in inspect.signature(kind).parameters else {}
    experts = kind(AnyConfig(), **of_layer)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.3)
    stack: Any = experts.down_proj
    d_model = stack.shape[2 if getattr(experts, "is_transposed", False) else 1]
    return Block(experts, d_model, stack.shape[0]), torch.randn(T, d_model)


def test_all_families_are_here() -> None:
    assert len(CLASSES) >= 68 or Version(transformers.__version__) < Version("5.24")


@pytest.mark.parametrize("kind", [kind for kind in CLASSES if kind not in TAKEN], ids=lambda kind: kind.__name__)
def test_other_experts_are_refused_with_the_reason(kind: type[nn.Module]) -> None:
    model, x = made(kind)
    with pytest.raises(ConfigError, match=rf"^experts\.sites=auto: .*{REFUSED[kind.__name__]}"):
        compile_with_report(model, config(), example=x)


@pytest.mark.parametrize("kind", TAKEN, ids=lambda kind: kind.__name__)
def test_outputs_and_gradients_equal_the_eager_loop(kind: type[nn.Module]) -> None:
    model, x = made(kind)
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
