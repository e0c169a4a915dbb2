"""Auxiliary losses of a router: load-balancing losses, and a loss that keeps logits small.

Legend: T tokens, S tokens of a sequence, E experts, K top-k. Leading dims (...) are batch dims. The balance losses
multiply two vectors over experts:

    f_i   fraction of the assignments that go to expert i, times E: 1 for all i if the load is balanced. No gradient.
    P_i   mean over tokens of the scores, normalised to sum 1 over the experts of a token.
    loss  sum_i f_i P_i: 1 if the load or the scores are balanced.

`real` (...) bool says which tokens count; padding is in no mean and no fraction. None: all count.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moecompile.ops.tokens import expert_counts


def loss_of(
    name: str, logits: Tensor, scores: Tensor, probs: Tensor, ids_TK: Tensor, top_k: int, real: Tensor | None
) -> Tensor:
    """The loss `micro_batch`, `sequence` or `z` of a router.

    Args:
        logits, scores, probs: (..., S, E), the last normalised; (S, E) is one sequence. ids_TK: chosen experts.
    """
    if name == "micro_batch":
        return micro_batch_loss(probs, ids_TK, real)
    if name == "sequence":
        return sequence_loss(torch.atleast_2d(scores), torch.atleast_2d(probs), top_k, real)
    return z_loss(logits, real)


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


def sequence_loss(scores: Tensor, probs: Tensor, top_k: int, real: Tensor | None = None) -> Tensor:
    """Load balance within each sequence, mean over sequences (DeepSeek-V3 report, arXiv 2412.19437, eq. 17-20).

    Sequences without a real token are not in the mean.

    f counts the top-k of the scores themselves, without correction bias and group limit, as in the report.
    scores, probs: (..., S, E), or (S, E) for one sequence.
    """
    num_tokens, num_experts = probs.shape[-2:]
    with torch.no_grad():
        best = scores.topk(top_k, dim=-1, sorted=False).indices
        chosen = torch.zeros_like(scores).scatter_(-1, best, 1.0)
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
