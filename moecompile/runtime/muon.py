"""Muon for hidden matrices and AdamW for all other weights, in one optimizer, on weights of any mesh.

For a matrix W with gradient G, momentum M and a group's learning rate lr (Jordan 2024; `torch.optim.Muon` for weights
that one rank has whole):

    M <- m M + (1 - m) G,   U = m M + (1 - m) G (Nesterov) or M
    W <- (1 - lr decay) W - lr scale NS(U)

NS needs the whole matrix: of a shard it is something else. So momentum and U are made on shards, U is brought together
matrix by matrix (whole_matrices.py), orthogonalized by one rank, and its parts return. So are experts, one by one,
where FSDP cuts within them; where it cuts between them, each is orthogonalized on the rank that has it. Gate and up of
one weight are orthogonalized apart (moecompile.nn.matrices). Weights of AdamW are stepped by torch's own function on
their shards.

NS is Newton-Schulz, the orthogonal factor, approximately: U S V^T becomes U S' V^T with every entry of S' near 1, by
`steps` times X -> a X + (b X X^T + c (X X^T)^2) X. Each matrix is scaled by its own Frobenius norm before, so that
every singular value is at most 1.

Legend: O d_out, I d_in.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from moecompile.nn.matrices import Layout
from moecompile.runtime.whole_matrices import Part, compute_whole, cuts_of
from moecompile.torch_private import local_part

_STACKED = 3  # dims


class Muon(Optimizer):
    """Muon and AdamW.

    Args:
        groups: torch's parameter groups, each with `kind`: `muon` or `adamw`, and what may differ from the defaults.
        layouts: where the matrices of each weight of a Muon group are.
        lr, weight_decay: of both. betas, eps: of AdamW. momentum, nesterov, scale, steps, coefficients: of Muon, as in
            `optimizer.muon`. precision: of Newton-Schulz, `fp32` (or that of wider weights) or `bf16`.

    State of a Muon weight: `momentum_buffer`; of an AdamW weight: `step`, `exp_avg`, `exp_avg_sq`, as torch names them.
    All ranks must call `step` with gradients of the same weights.
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], layouts: Mapping[nn.Parameter, Layout], *, lr: float = 1e-3,
        weight_decay: float = 0.1, betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8, momentum: float = 0.95,
        nesterov: bool = True, scale: str = "match_rms_adamw", steps: int = 5,
        coefficients: tuple[float, float, float] = (3.4445, -4.775, 2.0315), precision: str = "fp32",
    ) -> None:  # fmt: skip
        defaults = {
            "lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps, "momentum": momentum, "scale": scale,
            "nesterov": nesterov, "steps": steps, "coefficients": coefficients, "precision": precision,
        }  # fmt: skip
        super().__init__(list(groups), defaults)
        self._layouts = dict(layouts)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every weight that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        of_muon: list[tuple[nn.Parameter, dict[str, Any], list[Part]]] = []
        for group in self.param_groups:
            given = [parameter for parameter in group["params"] if parameter.grad is not None]
            if group["kind"] == "adamw":
                self._adamw(given, group)
            else:
                of_muon += [(parameter, group, self._parts(parameter, group)) for parameter in given]
        compute_whole([part for _, _, parts in of_muon for part in parts])
        for parameter, group, parts in of_muon:
            weight = local_part(parameter)
            weight.mul_(1 - group["lr"] * group["weight_decay"])
            for piece, part in zip([weight] if len(parts) == 1 else weight, parts, strict=True):
                piece.add_(part.local.view_as(piece).to(weight.dtype), alpha=-group["lr"])
        return loss

    def _parts(self, parameter: nn.Parameter, group: dict[str, Any]) -> list[Part]:
        """The update of this rank's shard before it is orthogonalized, one part for each expert if these are cut; the
        momentum is moved.
        """
        state, grad, rate = self.state[parameter], local_part(parameter.grad), 1 - group["momentum"]  # type: ignore[arg-type]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        momentum = local_part(state["momentum_buffer"])
        momentum.lerp_(grad, rate)
        update = momentum.lerp(grad, rate) if group["nesterov"] else momentum
        wide = torch.promote_types(parameter.dtype, torch.float32)
        dtype = torch.bfloat16 if group["precision"] == "bf16" else wide
        cuts = cuts_of(parameter, is_stack=parameter.ndim == _STACKED)
        compute = partial(_orthogonal, layout=self._layouts[parameter], like=parameter, group=group)
        pieces = update.to(dtype).unbind() if cuts and parameter.ndim == _STACKED else [update.to(dtype)]
        return [Part(local=piece, cuts=cuts, compute=compute) for piece in pieces]

    def _adamw(self, parameters: list[nn.Parameter], group: dict[str, Any]) -> None:
        states = []
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                for name in ("exp_avg", "exp_avg_sq"):
                    state[name] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            states.append(state)

        def local(name: str) -> list[Tensor]:
            return [local_part(state[name]) for state in states]

        if parameters:
            adamw(
                [local_part(parameter) for parameter in parameters],
                [local_part(parameter.grad) for parameter in parameters],  # type: ignore[arg-type]
                local("exp_avg"), local("exp_avg_sq"), [], local("step"), fused=True, amsgrad=False,
                beta1=group["betas"][0], beta2=group["betas"][1], lr=group["lr"],
                weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
            )  # fmt: skip


def _orthogonal(whole: Tensor, *, layout: Layout, like: Tensor, group: dict[str, Any]) -> Tensor:
    """Whole matrices as they lie in the weight `like` -> scale NS(matrices)."""
    num_experts = whole.shape[0] * layout.joined // like.shape[0]
    out = torch.empty_like(whole)
    matrices = layout.matrices(whole, num_experts)
    found = orthogonalized(matrices, group["steps"], group["coefficients"], whole.dtype)
    layout.matrices(out, num_experts).copy_(found.mul_(scale_of(group["scale"], *matrices.shape[-2:])))
    return out


def scale_of(kind: str, d_out: int, d_in: int) -> float:
    """`optimizer.muon.scale` of a matrix."""
    if kind == "match_rms_adamw":
        return 0.2 * math.sqrt(max(d_out, d_in))
    return math.sqrt(max(1.0, d_out / d_in))


_EPS = 1e-7  # as in torch.optim.Muon: a matrix of zeros stays one


def orthogonalized(matrices: Tensor, steps: int, coefficients: Sequence[float], dtype: torch.dtype) -> Tensor:
    """(..., O, I) -> the same shape, of `dtype`, in which the products are computed too."""
    a, b, c = coefficients
    x = matrices.to(dtype).reshape(-1, *matrices.shape[-2:])
    is_tall = x.shape[-2] > x.shape[-1]
    x = x.mT if is_tall else x  # the smaller square
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=_EPS)
    for _ in range(steps):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x.mT if is_tall else x).reshape(matrices.shape)
