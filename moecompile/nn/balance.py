"""Load balance: the correction-bias rule and the load metrics, once per optimizer step from global counts."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moecompile.nn.router import Router


@dataclass(frozen=True, kw_only=True)
class LayerLoad:
    """Load of one router over one optimizer step and all ranks. load: tokens per expert, (E,) int64 on the CPU."""

    name: str
    load: Tensor

    @property
    def max_violation(self) -> float:
        """MaxVio = max(load) / mean(load) - 1 (Wang et al. 2024, arXiv 2408.15664); 0 is perfect balance."""
        mean = self.load.double().mean()
        return float(self.load.max() / mean - 1) if mean > 0 else 0.0


def routers_of(model: nn.Module) -> list[tuple[str, Router]]:
    """All routers with their module paths, in model order."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, Router)]


@torch.no_grad()
def update_balance(
    model: nn.Module, rates: dict[str, float], group: dist.ProcessGroup | None = None
) -> list[LayerLoad]:
    """Sums the load counters over all ranks, moves the correction biases, and starts the counters again.

    The rule is DeepSeek-V3's: bias += rate * sign(mean load - load). Call it once per optimizer step.

    Args:
        model: holds the routers.
        rates: router path -> rate; routers that are not in it keep their bias.
        group: ranks whose counts are summed; None: this process alone.

    Returns:
        the load of each router, in model order.
    """
    routers = routers_of(model)
    if not routers:
        return []
    loads = _global_loads([router for _, router in routers], group)
    for (name, router), load_E in zip(routers, loads, strict=True):
        router.load.zero_()
        if rate := rates.get(name, 0.0):
            error_E = load_E.double().mean() - load_E
            router.correction_bias += rate * error_E.sign().to(router.correction_bias)
    return [LayerLoad(name=name, load=load_E.cpu()) for (name, _), load_E in zip(routers, loads, strict=True)]


def _global_loads(routers: Iterable[Router], group: dist.ProcessGroup | None) -> list[Tensor]:
    """One all-reduce for all layers."""
    loads = [router.load for router in routers]
    flat = torch.cat(loads)
    if group is not None:
        dist.all_reduce(flat, group=group)
    return list(flat.split([load.numel() for load in loads]))
