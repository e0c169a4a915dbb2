"""Load balance once per optimizer step, from global counts: correction bias, global load and metrics.

Also sums the auxiliary losses of a micro-batch over layers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moecompile.errors import MoecompileError
from moecompile.nn.existing import own_biases
from moecompile.nn.losses import KeepsLosses, keepers_of
from moecompile.nn.meter import DROPPED, ENTROPY, TOKENS, LoadMeter
from moecompile.nn.own_router import own_routers
from moecompile.nn.router import Router, routers_of
from moecompile.ops.required_bias import solved_bias
from moecompile.routing import BalanceSpec


@dataclass(frozen=True, kw_only=True)
class LayerLoad:
    """Routing statistics of one layer in one optimizer step, over all ranks.

    load: assignments to each expert before drops, (E,) int64. tokens: routed tokens. dropped: assignments dropped for
    capacity. entropy: mean entropy of the router over tokens, nats; None: unknown. node_tokens: distinct tokens that
    reached each node of their EP group, (num_nodes,) int64. Tensors are on the CPU.
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
    def max_violation_bound(self) -> float:
        """The largest MaxVio that is possible: every token chooses the same experts (E / K - 1)."""
        mean = self.load.double().mean()
        return max(0.0, float(self.tokens / mean - 1)) if mean > 0 else 0.0

    @property
    def drop_rate(self) -> float:
        """Dropped assignments over all assignments."""
        return self.dropped / max(1, int(self.load.sum()))

    @property
    def nodes_per_token(self) -> float:
        """Mean number of nodes that a token reaches, including its own."""
        return int(self.node_tokens.sum()) / max(1, self.tokens)


def meters_of(model: nn.Module) -> list[tuple[str, LoadMeter]]:
    """All meters in model order, by path. A meter named `meter` goes by the path of its parent."""
    meters = [(path, module) for path, module in model.named_modules() if isinstance(module, LoadMeter)]
    return [(_owner(path), meter) for path, meter in meters]


def _owner(path: str) -> str:
    owner, _, name = path.rpartition(".")
    return owner if name == "meter" else path


@torch.no_grad()
def update_balance(model: nn.Module, group: dist.ProcessGroup | None = None, *, move: bool = True) -> list[LayerLoad]:
    """Sums the counters over all ranks, updates the balance, and resets the counters.

    Call it once per optimizer step. Each router follows its own rule, with e = mean load - load:
        `sign`: correction_bias += rate * sign(e) (DeepSeek-V3); `proportional`: += rate * e / mean load; with
        `recenter`, its mean is subtracted then.
        `quantile`: correction_bias is solved from the scores of all ranks' tokens (`ops.required_bias`).
    So does the correction bias of the model's own router, if the plan says so. A router with a global_batch loss keeps
    each expert's fraction of the load for the next step.

    Args:
        group: ranks whose counts are summed, in one all-reduce; None: only this process.
        move: False only sums and resets, for a step that is skipped.

    Returns:
        The statistics of each layer, in model order.
    """
    meters = meters_of(model)
    if not meters:
        return []
    summed = _summed(meters, group)
    loads = [_layer_load(name, meter, sums) for (name, meter), sums in zip(meters, summed, strict=True)]
    if move:
        parts = zip(meters, loads, summed, strict=True)
        _balance(model, {id(meter): (load.load, sums) for (_, meter), load, sums in parts})
    for _, meter in meters:
        for counter in meter.buffers():
            counter.zero_()
    return loads


def _balance(model: nn.Module, counted: dict[int, tuple[Tensor, Tensor]]) -> None:
    for _, router in routers_of(model):
        load_E, sums = counted[id(router.meter)]
        if router.meter.required is not None:
            _solve(router, sums[-router.meter.required.numel() :].view(router.num_experts, -1))
        _move(router.correction_bias, load_E, router.balance)
        _keep_load(router.global_load, load_E)
    for path, reader in own_routers(model):
        meter = model.get_submodule(f"{path.rpartition('.')[0]}.meter")
        _keep_load(reader.global_load, counted[id(meter)][0])
    for own_meter, bias_E in own_biases(model):
        _move(bias_E, counted[id(own_meter)][0], own_meter.balance)


def _keep_load(global_load: Tensor | None, load_E: Tensor) -> None:
    if global_load is not None and load_E.any():
        global_load.copy_(load_E.double() / load_E.sum())


def _summed(meters: list[tuple[str, LoadMeter]], group: dist.ProcessGroup | None) -> list[Tensor]:
    """Each meter's counters as one vector. All share one all-reduce in float64, exact for integers up to 2^53."""
    packed = [torch.cat([counter.double().view(-1) for counter in meter.buffers()]) for _, meter in meters]
    flat = torch.cat(packed)
    if group is not None:
        dist.all_reduce(flat, group=group)
    return list(flat.cpu().split([counters.numel() for counters in packed]))


def _layer_load(name: str, meter: LoadMeter, summed: Tensor) -> LayerLoad:
    load_E, node_tokens, sums, *_ = summed.split([counter.numel() for counter in meter.buffers()])
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
        if balance.recenter:
            bias_E -= bias_E.mean()


def _solve(router: Router, required_EB: Tensor) -> None:
    """Quantile balancing, in place; required_EB is global and on the CPU."""
    if required_EB.any():
        bias_E = router.correction_bias
        share = router.config.top_k / router.num_experts
        bias_E.copy_(solved_bias(required_EB, bias_E.cpu(), share))


def auxiliary_loss(model: nn.Module) -> Tensor | None:
    """Sum of the auxiliary losses of all layers in the last training forward, with coefficients; None without any.

    It is a mean over the tokens of the micro-batch, with a graph; if your loss is a sum over tokens, multiply it by
    their number. Forwards in evaluation mode or without gradients do not change it.

    Raises:
        MoecompileError: gradients are enabled, but the forward ran without them (reentrant checkpointing).
    """
    losses = [(name, router, loss) for name, router in _with_losses(model) if (loss := router.aux_loss) is not None]
    for name, router, loss in losses:
        if torch.is_grad_enabled() and router.is_trained and not loss.requires_grad:
            raise MoecompileError(
                f"{name}: the auxiliary loss has no gradient, because the forward ran without autograd. Use activation "
                "checkpointing with use_reentrant=False"
            )
    return torch.stack([loss for _, _, loss in losses]).sum() if losses else None


def auxiliary_losses(model: nn.Module) -> dict[str, Tensor]:
    """The same losses by kind and without a graph, for logging."""
    sums: dict[str, Tensor] = {}
    for _, router in _with_losses(model):
        for kind, loss in router.aux_losses.items():
            sums[kind] = sums[kind] + loss.detach() if kind in sums else loss.detach()
    return sums


def forget_auxiliary_losses(model: nn.Module) -> None:
    """Drops the losses after a backward has used them, so that the next backward only adds those of later forwards."""
    for _, router in keepers_of(model):
        router.aux_losses, router.aux_node = {}, None


def _with_losses(model: nn.Module) -> list[tuple[str, KeepsLosses]]:
    """Routers whose losses count, which are none if the model is evaluated: evaluation mode without gradients."""
    return [(name, router) for name, router in keepers_of(model) if router.training or torch.is_grad_enabled()]
