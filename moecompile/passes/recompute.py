"""recompute: layers compute their activations again in backward instead of keeping them.

Algorithm:
  1. The forward of each layer runs under torch's checkpointing: its inputs are kept, nothing else.
  2. With `keep_exchanges`, what exchanges received and what routers chose is kept as well. So backward sends nothing
     again, and the second forward cannot choose another way than the first one did.
Loads and bytes are counted in the first forward alone (moecompile.ops.tokens, moecompile.ops.traffic).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from moecompile.passes.lower import EXCHANGE_OPS
from moecompile.passes.shard import layers_of

_CHOICES = (torch.ops.aten.topk.default, torch.ops.moecompile.expert_choice.default)
_TABLES = (torch.ops.moecompile.read_tables.default,)


def recompute(model: nn.Module, checkpointing: str) -> None:
    """Lets the layers of a sharded (or whole) model compute again, in place; of a model without layers, its regions.

    Args:
        checkpointing: full or keep_exchanges.
    """
    kept = [getattr(torch.ops.moecompile, name).default for name in sorted(EXCHANGE_OPS)]
    contexts = partial(create_selective_checkpoint_contexts, [*kept, *_TABLES, *_CHOICES])
    again = partial(checkpoint, use_reentrant=False)
    if checkpointing == "keep_exchanges":
        again = partial(again, context_fn=contexts)
    regions = [module for module in model.modules() if isinstance(module, fx.GraphModule)]
    for layer in list(layers_of(model)) or regions:
        layer.forward = _recomputed(layer.forward, again)  # inside the hooks of FSDP, which gathers before it


def _recomputed(forward: Callable[..., Any], again: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return again(partial(forward, **kwargs), *args)

    return run
