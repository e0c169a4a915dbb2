"""Auxiliary losses of a router: load-balancing losses, and a loss that keeps logits small.

Legend: T tokens, S tokens of a sequence, E experts, K top-k. Leading dims (...) are batch dims. The balance losses
multiply two vectors over experts:

    f_i   fraction of the assignments that go to expert i, times E: 1 for all i if the load is balanced. No gradient.
    P_i   mean over tokens of the scores, normalised to sum 1 over the experts of a token.
    loss  sum_i f_i P_i: 1 if the load or the scores are balanced.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moecompile.ops.tokens import expert_counts


def micro_batch_loss(probs: Tensor, ids_TK: Tensor) -> Tensor:
    """Load balance over one micro-batch (Switch, arXiv 2101.03961, eq. 4; GShard, arXiv 2006.16668), for any top-k.

    f counts the chosen experts, before drops: f_i = E / (K T) * #(assignments to i). transformers'
    `load_balancing_loss_func` is K times this.
    """
    num_experts = probs.shape[-1]
    f_E = expert_counts(ids_TK, num_experts).to(probs.dtype) * (num_experts / ids_TK.numel())
    return (f_E * probs.reshape(-1, num_experts).mean(0)).sum()


def sequence_loss(scores: Tensor, probs: Tensor, top_k: int) -> Tensor:
    """Load balance within each sequence, mean over sequences (DeepSeek-V3 report, arXiv 2412.19437, eq. 17-20).

    f counts the top-k of the scores themselves, without correction bias and group limit, as in the report.
    scores, probs: (..., S, E), or (S, E) for one sequence.
    """
    num_tokens, num_experts = probs.shape[-2:]
    with torch.no_grad():
        best = scores.topk(top_k, dim=-1, sorted=False).indices
        counts = torch.zeros_like(scores).scatter_(-1, best, 1.0).sum(-2)
        f = counts * (num_experts / (top_k * num_tokens))
    return (f * probs.mean(-2)).sum(-1).mean()


def global_batch_loss(probs: Tensor, load_E: Tensor) -> Tensor:
    """Load balance over the global batch: f is the global load of the previous optimizer step, P of this micro-batch.

    f has no gradient, so the load of the whole previous step serves for every micro-batch of this one. Forward needs no
    collective, and the loss is the same for every mesh and every number of micro-batches. Qiu et al. (arXiv
    2501.11873), who proposed the global batch, synchronise the counts of the current batch instead.

    Args:
        load_E: each expert's fraction of all assignments of the previous step (1 / E before the first step).
    """
    num_experts = probs.shape[-1]
    f_E = num_experts * load_E.detach()
    return (f_E * probs.reshape(-1, num_experts).mean(0)).sum()


def z_loss(logits: Tensor) -> Tensor:
    """Mean over tokens of logsumexp(logits)^2, which keeps logits small (ST-MoE, arXiv 2202.08906, eq. 5)."""
    return logits.logsumexp(-1).square().mean()
