"""recompute: layers compute their activations again in backward instead of keeping them.

Algorithm:
  1. The forward of each layer runs under torch's checkpointing: its inputs are kept, nothing else.
  2. With `keep_exchanges`, what exchanges received and what routers chose is kept as well. So backward sends nothing
     again, and the second forward cannot choose another way than the first one did.
  3. Caches of keys and values rest while gradients are wanted: the second forward would fill them a second time.
Loads and bytes are counted in the first forward alone (moecompile.ops.tokens, moecompile.ops.traffic).
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torch.utils.checkpoint import checkpoint

from moecompile.capture import layers_of
from moecompile.capture.caches import caches, switches
from moecompile.errors import ConfigError, PassError
from moecompile.passes.base import experts_calls, run_on_model
from moecompile.plan import EXCHANGE_OPS, WAIT_OPS, Plan
from moecompile.torch_private import keeping

_CHOICES = (torch.ops.aten.topk.default, torch.ops.moecompile.expert_choice.default)
_TABLES = (torch.ops.moecompile.read_tables.default,)
_CACHES = ("past_key_values", "cache_params", "cache", "state")  # what models call the caches that they are given


def recompute(model: nn.Module, plan: Plan, checkpointing: str) -> None:
    """Lets the layers of a sharded (or whole) model compute again, in place, and regions with experts outside of them.

    Args:
        checkpointing: full or keep_exchanges.
    """
    run_on_model(Recompute(checkpointing=checkpointing), model, plan)


@dataclass(frozen=True, kw_only=True)
class Recompute:
    """checkpointing: as for `recompute`."""

    checkpointing: str
    name: str = "recompute"

    def requires(self, model: nn.Module, plan: Plan) -> None:
        """Nothing computes again yet."""
        if any(_is_wrapped(layer) for layer in _computing_again(model)):
            raise PassError(self.name, "the model", "its layers compute again already")

    def run(self, model: nn.Module, plan: Plan) -> None:
        """Changes the model."""
        again = partial(checkpoint, use_reentrant=False)
        if self.checkpointing == "keep_exchanges":
            exchanges = [getattr(torch.ops.moecompile, name).default for name in sorted(EXCHANGE_OPS | WAIT_OPS)]
            again = partial(again, context_fn=partial(keeping, {*exchanges, *_TABLES, *_CHOICES}))
        for layer in _computing_again(model):
            layer.forward = _recomputed(layer.forward, again)  # inside the hooks of FSDP, which gathers before it
        said: list[bool] = []
        for caller in _with_switch(model):
            caller.forward = _without_caches(caller, caller.forward, self.checkpointing, said)  # Step 3

    def ensures(self, model: nn.Module, plan: Plan) -> None:
        """Every experts call of the plan lies in what computes again."""
        inside = {module for layer in _computing_again(model) if _is_wrapped(layer) for module in layer.modules()}
        outside = [path for path, module in model.named_modules() if _holds_experts(module) and module not in inside]
        if outside:
            raise PassError(self.name, outside[0], "its experts would keep what the plan counts as computed again")


def _computing_again(model: nn.Module) -> list[nn.Module]:
    """The layers, and regions that lie in none."""
    layers = list(layers_of(model))
    inside = {module for layer in layers for module in layer.modules()}
    return [*layers, *(module for module in model.modules() if _holds_experts(module) and module not in inside)]


def _holds_experts(module: nn.Module) -> bool:
    return isinstance(module, fx.GraphModule) and bool(experts_calls(module))


def _is_wrapped(layer: nn.Module) -> bool:
    return getattr(layer.forward, "computes_again", False)


def _recomputed(forward: Callable[..., Any], again: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return again(partial(forward, **kwargs), *args)

    run.computes_again = True  # type: ignore[attr-defined]
    return run


def _with_switch(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost modules whose config switches a cache on and off."""
    if isinstance(getattr(getattr(module, "config", None), "use_cache", None), bool):
        yield module
    else:
        for child in module.children():
            yield from _with_switch(child)


def _without_caches(
    model: nn.Module, forward: Callable[..., Any], checkpointing: str, said: list[bool]
) -> Callable[..., Any]:
    """Also where the caller asks for a cache; one that is given is refused, as what it holds must not get lost."""
    signature = inspect.signature(forward)

    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        given = signature.bind_partial(*args, **kwargs)
        named = {**given.arguments, **given.kwargs}
        if name := next((name for name in _CACHES if named.get(name) is not None), None):
            raise ConfigError(
                "checkpointing", checkpointing,
                f"layers are computed again in backward, and would fill the {name} that is given a second time",
                "Use checkpointing='none', or call the model without it",
            )  # fmt: skip
        asked = named.get("use_cache")
        if not said and (asked or (asked is None and any(config.use_cache for config in switches(model)))):
            said.append(True)
            print("use_cache is off in training, because layers are computed again in backward", file=sys.stderr)
        if asked:
            (given.arguments if "use_cache" in given.arguments else kwargs)["use_cache"] = False
            args, kwargs = (given.args, given.kwargs) if "use_cache" in given.arguments else (args, kwargs)
        with caches(model, on=False):
            return forward(*args, **kwargs)

    return run
