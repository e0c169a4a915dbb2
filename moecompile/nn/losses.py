"""Auxiliary losses of a router: load-balancing losses, a loss that keeps logits small, and who keeps them for backward.

Legend: T tokens, S tokens of a sequence, E experts, K top-k. Leading dims (...) are batch dims. The balance losses
multiply two vectors over experts:

    f_i   fraction of the assignments that go to expert i, times E: 1 for all i if the load is balanced. No gradient.
    P_i   mean over tokens of the scores, normalised to sum 1 over the experts of a token.
    loss  sum_i f_i P_i: 1 if the load or the scores are balanced.

`real` (...) bool says which tokens count; padding is in no mean and no fraction. None: all count.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self, cast

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from moecompile.nn.context import whole_sequences
from moecompile.nn.meter import at_least
from moecompile.nn.scores import FUNCTIONS
from moecompile.ops.tokens import expert_counts
from moecompile.routing import BalanceSpec
from moecompile.torch_private import in_backward


class KeepsLosses(nn.Module):
    """A router, ours or what is read from the model's own, that keeps the losses of its last training forward.

    `global_load` (E,), only with a global_batch loss, is each expert's fraction of the previous optimizer step's load.

    Args:
        num_choices: E. top_k: experts per token. score: of `FUNCTIONS`.
        balance: which losses it has, and their coefficients.
        even_groups: groups of which a token has as many experts each; 1: of all experts.

    Attributes:
        positions: process group of the ranks with the other positions of a sequence.
        aux_losses: kind -> coefficient * loss, with its graph.
        aux_node: to test whether a loss depends on that forward.
    """

    global_load: Tensor | None

    def __init__(
        self,
        num_choices: int,
        top_k: int,
        score: str,
        balance: BalanceSpec,
        device: torch.device | str | None,
        dtype: torch.dtype,
        even_groups: int = 1,
    ) -> None:
        super().__init__()
        self.top_k, self.score, self.losses, self.even_groups = top_k, score, balance.losses, even_groups
        wide = torch.promote_types(dtype, torch.float32)
        even = torch.full((num_choices,), 1 / num_choices, device=device, dtype=wide)
        self.register_buffer("global_load", even if balance.global_batch else None)
        self.positions: str | None = None
        self.aux_losses: dict[str, Tensor] = {}
        self.aux_node: Node | None = None

    @property
    def aux_loss(self) -> Tensor | None:
        """Sum of coefficient * loss of the last training forward, a mean over its tokens; None without losses."""
        return torch.stack(list(self.aux_losses.values())).sum() if self.aux_losses else None

    @property
    def is_trained(self) -> bool:
        """Whether the router gets gradients."""
        raise NotImplementedError

    def scored(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The scores by which experts are chosen, and shares of all of them, which sum to 1."""
        functions = FUNCTIONS[self.score]
        scores = functions.score(logits)
        return scores, functions.distribute(logits, scores)

    def keep(self, losses: dict[str, Tensor], made: Tensor) -> None:
        """Replaces the losses of the previous forward by those of this one, which made the tensor `made`.

        A forward without gradients does not replace losses with gradients, which the objective still needs for its
        backward.
        """
        if torch.compiler.is_compiling():
            self.aux_losses = losses  # compiled code cannot query whether autograd is in backward
        elif in_backward():
            return  # a recomputed forward must not keep its graph alive
        elif torch.is_grad_enabled() or not any(loss.requires_grad for loss in self.aux_losses.values()):
            self.aux_losses, self.aux_node = losses, made.grad_fn

    def losses_of(
        self, logits: Tensor, scored: tuple[Tensor, Tensor] | None, ids_TK: Tensor, real: Tensor | None
    ) -> dict[str, Tensor]:
        """Kind -> coefficient * loss.

        Args:
            logits: (..., S, E); (S, E) is one sequence. scored: what `scored` returns for them, if known.
            ids_TK: chosen experts, before drops.
        """
        if not self.losses:
            return {}
        if logits.numel() == 0:  # the mean over no tokens is undefined
            return {name: logits.sum() for name in self.losses}
        if self.positions is not None:
            logits, ids_TK, real = whole_sequences(logits, ids_TK, real, self.positions)
            scored = None
        scores, probs = self.scored(logits) if scored is None else scored
        by_name: dict[str, Callable[[], Tensor]] = {
            "micro_batch": lambda: micro_batch_loss(probs, ids_TK, real),
            "sequence": lambda: sequence_loss(
                torch.atleast_2d(scores), torch.atleast_2d(probs), self.top_k, real, self.even_groups
            ),
            "global_batch": lambda: global_batch_loss(probs, cast(Tensor, self.global_load), real),
            "z": lambda: z_loss(logits, real),
        }
        return {name: coefficient * by_name[name]() for name, coefficient in self.losses.items()}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # A cast of the model to bf16 leaves the router in fp32, a move to another device moves it.
        super()._apply(at_least(torch.float32, fn), recurse)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, Any]:
        # The losses of the last forward have a graph, which can be neither copied nor pickled.
        return {**self.__dict__, "aux_losses": {}, "aux_node": None}


def keepers_of(model: nn.Module) -> list[tuple[str, KeepsLosses]]:
    """All of them with their module paths, in model order."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, KeepsLosses)]


def micro_batch_loss(probs: Tensor, ids_TK: Tensor, real: Tensor | None = None) -> Tensor:
    """Load balance over one micro-batch (Switch, arXiv 2101.03961, eq. 4; GShard, arXiv 2006.16668), for any top-k.

    f counts the chosen experts, before drops: f_i = E / (K T) * #(assignments to i). transformers'
    `load_balancing_loss_func` is K times this.
    """
    num_experts = probs.shape[-1]
    counts_E = expert_counts(ids_TK, num_experts).to(probs.dtype)
    if real is None:
        f_E = counts_E * (num_experts / ids_TK.numel())
    else:
        f_E = counts_E * num_experts / (ids_TK.shape[1] * real.sum()).clamp_min(1)
    return (f_E * _mean(probs.reshape(-1, num_experts), real)).sum()


def sequence_loss(
    scores: Tensor, probs: Tensor, top_k: int, real: Tensor | None = None, even_groups: int = 1
) -> Tensor:  # fmt: skip
    """Load balance within each sequence, mean over sequences (DeepSeek-V3 report, arXiv 2412.19437, eq. 17-20).

    Sequences without a real token are not in the mean.

    f counts the top-k of the scores themselves, without correction bias and group limit, as in the report; with
    `even_groups` of them, the best of each group.
    scores, probs: (..., S, E), or (S, E) for one sequence.
    """
    num_tokens, num_experts = probs.shape[-2:]
    with torch.no_grad():
        of_group = scores.unflatten(-1, (even_groups, -1))
        best = of_group.topk(top_k // even_groups, dim=-1, sorted=False).indices
        chosen = torch.zeros_like(of_group).scatter_(-1, best, 1.0).flatten(-2)
        if real is None:
            f = chosen.sum(-2) * (num_experts / (top_k * num_tokens))
        else:
            real = real.view(scores.shape[:-1])
            lengths = real.sum(-1, keepdim=True)
            counts = chosen.masked_fill(~real.unsqueeze(-1), 0.0).sum(-2)
            f = counts * num_experts / (top_k * lengths).clamp_min(1)
    if real is None:
        return (f * probs.mean(-2)).sum(-1).mean()
    means = probs.masked_fill(~real.unsqueeze(-1), 0.0).sum(-2) / lengths.clamp_min(1)
    return _mean((f * means).sum(-1).reshape(-1, 1), lengths.reshape(-1) > 0).squeeze(-1)


def global_batch_loss(probs: Tensor, load_E: Tensor, real: Tensor | None = None) -> Tensor:
    """Load balance over the global batch: f is the global load of the previous optimizer step, P of this micro-batch.

    f has no gradient, so the load of the whole previous step serves for every micro-batch of this one. Forward needs no
    collective, and the loss is the same for every mesh and every number of micro-batches. Qiu et al. (arXiv
    2501.11873), who proposed the global batch, synchronise the counts of the current batch instead.

    Args:
        load_E: each expert's fraction of all assignments of the previous step (1 / E before the first step).
    """
    num_experts = probs.shape[-1]
    f_E = num_experts * load_E.detach()
    return (f_E * _mean(probs.reshape(-1, num_experts), real)).sum()


def z_loss(logits: Tensor, real: Tensor | None = None) -> Tensor:
    """Mean over tokens of logsumexp(logits)^2, which keeps logits small (ST-MoE, arXiv 2202.08906, eq. 5)."""
    return _mean(logits.logsumexp(-1).square().reshape(-1, 1), real).squeeze(-1)


def _mean(values_TN: Tensor, real: Tensor | None) -> Tensor:
    """Mean over the tokens that count, (N,); 0 if none does."""
    if real is None:
        return values_TN.mean(0)
    real_T = real.reshape(-1)
    return values_TN.masked_fill(~real_T.unsqueeze(1), 0.0).sum(0) / real_T.sum().clamp_min(1)
