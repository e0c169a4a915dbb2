"""Load balance, once per optimizer step from global counts: the correction-bias rule, the global load, the metrics.

Auxiliary losses, once per micro-batch, are summed over layers here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moecompile.errors import MoecompileError
from moecompile.nn.existing import own_biases
from moecompile.nn.meter import DROPPED, ENTROPY, TOKENS, LoadMeter
from moecompile.nn.router import Router, routers_of
from moecompile.routing import BalanceSpec


@dataclass(frozen=True, kw_only=True)
class LayerLoad:
    """What one layer did over one optimizer step and all ranks.

    load: assignments of each expert before drops, (E,) int64. tokens: tokens that were routed. dropped: assignments
    that capacity dropped. entropy: mean of the router's entropy over tokens, nats; None: unknown. node_tokens: distinct
    tokens that reached each node of their EP group, (num_nodes,) int64. Tensors are on the CPU.
    """

    name: str
    load: Tensor
    tokens: int
    dropped: int
    entropy: float | None
    node_tokens: Tensor

    @property
    def max_violation(self) -> float:
        """MaxVio = max(load) / mean(load) - 1 (Wang et al. 2024, arXiv 2408.15664); 0 is perfect balance."""
        mean = self.load.double().mean()
        return float(self.load.max() / mean - 1) if mean > 0 else 0.0

    @property
    def drop_rate(self) -> float:
        """Dropped assignments over all assignments."""
        return self.dropped / max(1, int(self.load.sum()))

    @property
    def nodes_per_token(self) -> float:
        """Mean number of nodes that a token reaches, its own included."""
        return int(self.node_tokens.sum()) / max(1, self.tokens)


def meters_of(model: nn.Module) -> list[tuple[str, LoadMeter]]:
    """All meters in model order. The attribute `meter` of a module has that module's path, any other meter its own."""
    found = [(path, module) for path, module in model.named_modules() if isinstance(module, LoadMeter)]
    return [(_owner(path), meter) for path, meter in found]


def _owner(path: str) -> str:
    owner, _, name = path.rpartition(".")
    return owner if name == "meter" else path


@torch.no_grad()
def update_balance(model: nn.Module, group: dist.ProcessGroup | None = None, *, move: bool = True) -> list[LayerLoad]:
    """Sums the counters over all ranks, balances by the sums, and starts the counters again.

    Call it once per optimizer step. Each router follows its own rule, with e = mean load - load:
        `sign`: correction_bias += rate * sign(e) (DeepSeek-V3); `proportional`: += rate * e / mean load.
    So does the correction bias of a router that the model had before, where the plan says so. A router with a
    global_batch loss keeps each expert's fraction of the load for the next step.

    Args:
        group: ranks whose counts are summed, in one all-reduce; None: this process alone.
        move: False only sums and starts again: the step that was counted is dropped.

    Returns:
        what each layer did, in model order.
    """
    meters = meters_of(model)
    if not meters:
        return []
    loads = [_layer_load(name, meter, sums) for (name, meter), sums in zip(meters, _summed(meters, group), strict=True)]
    by_meter = {id(meter): load for (_, meter), load in zip(meters, loads, strict=True)}
    if move:
        _balance(model, {meter: load.load for meter, load in by_meter.items()})
    for _, meter in meters:
        for counter in meter.buffers():
            counter.zero_()
    return loads


def _balance(model: nn.Module, load_of: dict[int, Tensor]) -> None:
    for _, router in routers_of(model):
        load_E = load_of[id(router.meter)]
        _move(router.correction_bias, load_E, router.balance)
        if router.global_load is not None and load_E.any():
            router.global_load.copy_(load_E / load_E.sum())
    for own_meter, bias_E in own_biases(model):
        _move(bias_E, load_of[id(own_meter)], own_meter.balance)


def _summed(meters: list[tuple[str, LoadMeter]], group: dist.ProcessGroup | None) -> list[Tensor]:
    """Each meter's counters as one vector. As float64 they share an all-reduce; whole numbers are exact to 2^53."""
    packed = [torch.cat([counter.double() for counter in meter.buffers()]) for _, meter in meters]
    flat = torch.cat(packed)
    if group is not None:
        dist.all_reduce(flat, group=group)
    return list(flat.cpu().split([counters.numel() for counters in packed]))


def _layer_load(name: str, meter: LoadMeter, summed: Tensor) -> LayerLoad:
    load_E, node_tokens, sums = summed.split([counter.numel() for counter in meter.buffers()])
    tokens = int(sums[TOKENS])
    return LayerLoad(
        name=name,
        load=load_E.to(torch.int64),
        tokens=tokens,
        dropped=int(sums[DROPPED]),
        entropy=float(sums[ENTROPY]) / tokens if meter.has_entropy and tokens else None,
        node_tokens=node_tokens.to(torch.int64),
    )


def _move(bias_E: Tensor, load_E: Tensor, balance: BalanceSpec) -> None:
    """The rule of `update_balance`, in place; load_E is global and on the CPU."""
    mean = load_E.double().mean()
    if balance.rate and mean > 0:
        error_E = mean - load_E
        step_E = error_E.sign() if balance.update == "sign" else error_E / mean
        bias_E += (balance.rate * step_E).to(bias_E)


def auxiliary_loss(model: nn.Module) -> Tensor | None:
    """Sum of the auxiliary losses of all layers in the last training forward, coefficients included; None without any.

    It is a mean over the micro-batch's tokens, with a graph: where the loss is a sum over tokens, add it times their
    number. Forwards in evaluation mode, or without gradients, change nothing; in evaluation, nobody asks for it.

    Raises:
        MoecompileError: gradients are asked for, but the forward ran without them (reentrant checkpointing).
    """
    found = [(name, router, loss) for name, router in _with_losses(model) if (loss := router.aux_loss) is not None]
    for name, router, loss in found:
        if torch.is_grad_enabled() and router.weight.requires_grad and not loss.requires_grad:
            raise MoecompileError(
                f"{name}: the auxiliary loss has no gradient, since the forward ran without autograd. Activation "
                "checkpointing must be the one with use_reentrant=False"
            )
    return torch.stack([loss for _, _, loss in found]).sum() if found else None


def auxiliary_losses(model: nn.Module) -> dict[str, Tensor]:
    """The same by kind and without a graph, to be logged."""
    sums: dict[str, Tensor] = {}
    for _, router in _with_losses(model):
        for kind, loss in router.aux_losses.items():
            sums[kind] = sums[kind] + loss.detach() if kind in sums else loss.detach()
    return sums


def forget_auxiliary_losses(model: nn.Module) -> None:
    """After a backward has used them: the next one adds those of a forward that comes after this."""
    for _, router in routers_of(model):
        router.aux_losses, router.aux_node = {}, None


def _with_losses(model: nn.Module) -> list[tuple[str, Router]]:
    """Routers whose losses count now. In evaluation mode and without gradients a model is evaluated, not trained."""
    return [(name, router) for name, router in routers_of(model) if router.training or torch.is_grad_enabled()]
