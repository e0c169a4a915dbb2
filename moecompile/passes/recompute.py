"""recompute: layers recompute their activations in backward instead of keeping them.

Algorithm:
  1. The forward of each layer runs under torch's activation checkpointing, which keeps only its inputs.
  2. With `keep_exchanges`, results of exchanges and choices of routers are kept as well. So backward repeats no
     exchange, and the recomputed forward cannot route differently. With `budget`, the plan says for each layer which
     of its modules are wrapped, the whole layer or some of its parts, and whether exchanges are kept.
  3. Padding masks, which no layer gets as an argument, are those of its own forward again.
  4. A forward that is computed again reads what it read before: inputs that were changed in place since are an error.
  5. Key-value caches are off while gradients are enabled: the recomputed forward would fill them a second time.
Loads and bytes are counted in the first forward only (moecompile.ops.tokens, moecompile.ops.traffic).
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import fx, nn
from torch.utils.checkpoint import checkpoint

from moecompile.capture import layers_of
from moecompile.capture.record import cache_configs, caches
from moecompile.errors import ConfigError, PassError
from moecompile.nn.padding import Padding, padding_of
from moecompile.nn.watch import CACHES
from moecompile.ops.backend import CALLS, KeptCalls
from moecompile.passes.base import ModelPass, experts_calls, run_on_model
from moecompile.plan import BACKEND, BUDGET, EXCHANGE_OPS, LOOKUP_OPS, WAIT_OPS, Plan
from moecompile.torch_private import keeping as kept_and_again
from moecompile.torch_private import tree_leaves, version_of

_EXCHANGES = (EXCHANGE_OPS | WAIT_OPS | {*LOOKUP_OPS}) - {*CALLS} - {op for op, _ in BACKEND.steps}
_CHOICES = (torch.ops.aten.topk.default, torch.ops.moecompile.expert_choice.default)
_WITHIN_TP = tuple(getattr(torch.ops.moecompile, name).default for name in ("join_tokens", "sum_ranks", "join_columns"))
_OVER_CP = tuple(getattr(torch.ops.moecompile, name).default for name in ("exchange_dims", "join_positions"))
_TABLES = (torch.ops.moecompile.read_tables.default, torch.ops.moecompile.to_slots.default)
CHECKPOINTED = ("none", "full", "keep_exchanges", BUDGET)


def recompute(model: nn.Module, plan: Plan, checkpointing: str) -> None:
    """Makes the layers of a sharded (or whole) model, and regions with experts outside of layers, recompute, in place.

    Args:
        checkpointing: full, keep_exchanges or budget.
    """
    run_on_model([Recompute(checkpointing=checkpointing)], model, plan)


@dataclass(frozen=True, kw_only=True)
class Recompute(ModelPass):
    """checkpointing: none, or as for `recompute`."""

    checkpointing: str
    name: str = "recompute"

    def wants(self, plan: Plan) -> bool:
        """Unless activations are kept."""
        return bool(plan.recomputed) if self.checkpointing == BUDGET else self.checkpointing != "none"

    def requires(self, model: nn.Module, plan: Plan) -> None:
        """No layer is checkpointed yet, and those of a budget are there."""
        if any(_is_wrapped(module) for module in model.modules()):
            raise PassError(self.name, "the model", "its layers compute again already")
        if self.checkpointing == BUDGET:
            paths = {path for path, _ in model.named_modules()}
            if missing := [path for path, _ in _budgeted(plan) if path not in paths]:
                raise PassError(self.name, missing[0], "the plan computes it again, and the model has no such module")

    def run(self, model: nn.Module, plan: Plan) -> None:
        """Wraps the forwards of the layers, and those that have a cache."""
        again = partial(checkpoint, use_reentrant=False)  # Step 1
        exchanges = [getattr(torch.ops.moecompile, name).default for name in sorted(_EXCHANGES)]  # Step 2
        kept = {*exchanges, *_TABLES, *_CHOICES, *_WITHIN_TP, *_OVER_CP}
        keeping = partial(again, context_fn=partial(_keeping, kept))
        padding = padding_of(model) or Padding()  # Step 3
        for module, sends in self._to_wrap(model, plan):
            # Inside FSDP's hooks: it gathers first.
            module.forward = _recomputed(module.forward, again if sends else keeping, padding)
        reported: list[bool] = []
        for caller in _with_switch(model):
            caller.forward = _without_caches(caller, caller.forward, self.checkpointing, reported)  # Step 5

    def _to_wrap(self, model: nn.Module, plan: Plan) -> list[tuple[nn.Module, bool]]:
        """What is computed again, and whether its exchanges are sent again."""
        if self.checkpointing == BUDGET:
            return [(model.get_submodule(path), sends) for path, sends in _budgeted(plan)]
        return [(layer, self.checkpointing == "full") for layer in _recomputing(model)]

    def ensures(self, model: nn.Module, plan: Plan) -> None:
        """Every experts call of the plan is inside a checkpointed layer, unless a budget keeps it."""
        if self.checkpointing == BUDGET:
            return
        inside = {module for layer in _recomputing(model) if _is_wrapped(layer) for module in layer.modules()}
        outside = [path for path, module in model.named_modules() if _holds_experts(module) and module not in inside]
        if outside:
            raise PassError(
                self.name, outside[0], "its experts would keep activations that the plan counts as recomputed"
            )


class _Both:
    """A context of ops and one of a back end's calls, which can be entered again."""

    def __init__(self, ops: AbstractContextManager[Any], calls: Callable[[], AbstractContextManager[Any]]) -> None:
        self.ops, self.calls, self.inside = ops, calls, ExitStack()

    def __enter__(self) -> None:
        self.inside.enter_context(self.ops)
        self.inside.enter_context(self.calls())

    def __exit__(self, *error: Any) -> None:
        self.inside.__exit__(*error)


def _keeping(kept: Collection[Any]) -> tuple[_Both, _Both]:
    """For the first forward and the one that is computed again, which gets what was kept."""
    (first, again), calls = kept_and_again(kept), KeptCalls()
    return _Both(first, calls.first), _Both(again, calls.again)


def _budgeted(plan: Plan) -> list[tuple[str, bool]]:
    """Paths of the modules that a budget computes again, and whether their exchanges are sent again."""
    return [
        (".".join(filter(None, (layer, module))), each.sends)
        for each in plan.recomputed
        for layer in each.layers
        for module in each.modules
    ]


def _recomputing(model: nn.Module) -> list[nn.Module]:
    """The layers, and regions outside of any layer."""
    layers = list(layers_of(model))
    inside = {module for layer in layers for module in layer.modules()}
    return [*layers, *(module for module in model.modules() if _holds_experts(module) and module not in inside)]


def _holds_experts(module: nn.Module) -> bool:
    return isinstance(module, fx.GraphModule) and bool(experts_calls(module))


def _is_wrapped(layer: nn.Module) -> bool:
    return hasattr(layer.forward, "computes_again")


def _recomputed(
    forward: Callable[..., Any], run_checkpointed: Callable[..., Any], padding: Padding
) -> Callable[..., Any]:
    holder = SimpleNamespace(forward=forward)

    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return holder.forward(*args, **kwargs)
        masks, read = padding.now, _versions(args, kwargs)

        def with_masks(*inputs: Any) -> Any:
            if _versions(args, kwargs) != read:  # Step 4
                raise PassError(
                    "recompute", "an input of a layer",
                    "was changed in place after its forward, so backward would compute something else again; use "
                    "trainer.checkpointing=none",
                )  # fmt: skip
            with padding.during(masks):
                return holder.forward(*inputs, **kwargs)

        return run_checkpointed(with_masks, *args)

    run.computes_again = holder  # type: ignore[attr-defined]
    return run


def holder_of_forward(module: nn.Module) -> Any:
    """What has the `forward` of a module that is computed: the module, or within what computes it again."""
    return getattr(module.forward, "computes_again", module)


def _versions(*inputs: Any) -> list[int]:
    tensors = (leaf for leaf in tree_leaves(inputs) if isinstance(leaf, torch.Tensor))
    return [version_of(tensor) for tensor in tensors if not tensor.is_inference()]


def _with_switch(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules whose config has `use_cache`."""
    if isinstance(getattr(getattr(module, "config", None), "use_cache", None), bool):
        yield module
    else:
        for child in module.children():
            yield from _with_switch(child)


def _without_caches(
    model: nn.Module, forward: Callable[..., Any], checkpointing: str, reported: list[bool]
) -> Callable[..., Any]:
    """Turns caches off, even if the caller asks for one. A cache as argument is an error: it would be ignored."""
    signature = inspect.signature(forward)

    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        bound = signature.bind_partial(*args, **kwargs)
        named = {**bound.arguments, **bound.kwargs}
        if name := next((name for name in CACHES if named.get(name) is not None), None):
            raise ConfigError(
                "checkpointing", checkpointing,
                f"layers are computed again in backward, and would fill {name} a second time",
                "Use checkpointing='none', or call the model without it",
            )  # fmt: skip
        use_cache = named.get("use_cache")
        if not reported and (use_cache or (use_cache is None and any(c.use_cache for c in cache_configs(model)))):
            reported.append(True)
            print("use_cache is off in training, because layers are computed again in backward", file=sys.stderr)
        if use_cache:
            (bound.arguments if "use_cache" in bound.arguments else kwargs)["use_cache"] = False
            args, kwargs = (bound.args, bound.kwargs) if "use_cache" in bound.arguments else (args, kwargs)
        with caches(model, on=False):
            return forward(*args, **kwargs)

    return run
