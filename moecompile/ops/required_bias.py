"""Which correction bias every expert would have needed: quantile balancing (Kimi K3's report, section 2.3.3).

    alpha_i   the (k + 1)-th largest biased score of token i: what an expert must exceed to be chosen
    r_ij      alpha_i - s_ij: the bias with which expert j would have had token i; between min(b) - 1 and max(b) + 1,
              because scores s are in [0, 1] and alpha_i is one of them with its bias

Legend: T tokens, E experts, B bins, K top-k.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moecompile.torch_private import in_backward


@torch.library.custom_op("moecompile::count_required_bias", mutates_args=("counts_EB",))
def count_required_bias(
    counts_EB: Tensor, scores_TE: Tensor, bias_E: Tensor, top_k: int, real_T: Tensor | None = None
) -> None:
    """Adds every r_ij of one forward to the histogram of its expert, in place; bins have equal widths (`bounds`).

    Adds nothing in backward, so that a recomputed forward is not counted twice, and nothing if every expert is chosen.

    Args:
        scores_TE: in [0, 1], without the bias. real_T: which tokens are no padding, (T,) bool; None: all.
    """
    num_experts, num_bins = counts_EB.shape
    if in_backward() or top_k == num_experts or not scores_TE.shape[0]:
        return
    low, high = bounds(bias_E)
    cutoff_T1 = (scores_TE + bias_E).topk(top_k + 1, dim=1).values[:, top_k:]
    place_TE = ((cutoff_T1 - scores_TE).double() - low) * (num_bins / (high - low))
    bin_TE = place_TE.long().clamp(0, num_bins - 1) + torch.arange(num_experts, device=place_TE.device) * num_bins
    ones = torch.ones_like(bin_TE, dtype=counts_EB.dtype)
    if real_T is not None:
        ones = ones * real_T.unsqueeze(1)
    counts_EB.view(-1).scatter_add_(0, bin_TE.view(-1), ones.view(-1))


@count_required_bias.register_fake
def _(counts_EB: Tensor, scores_TE: Tensor, bias_E: Tensor, top_k: int, real_T: Tensor | None = None) -> None:
    return None


def bounds(bias_E: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the greatest bias that a token can require, float64."""
    return bias_E.double().min() - 1, bias_E.double().max() + 1


def solved_bias(counts_EB: Tensor, bias_E: Tensor, share: float) -> Tensor:
    """The bias (E,), float64 with mean 0, with which every expert would have had the fraction `share` of the tokens.

    It is each expert's quantile of r, with counts taken as spread evenly over their bin.

    Args:
        counts_EB: of all ranks, with at least one token. bias_E: the bias during the counted forwards.
        share: k / E.
    """
    (low, high), num_bins = bounds(bias_E), counts_EB.shape[1]
    counts_EB = counts_EB.double()
    target_E1 = share * counts_EB.sum(1, keepdim=True)
    until_EB = counts_EB.cumsum(1)
    bin_E1 = (until_EB < target_E1).sum(1, keepdim=True).clamp(max=num_bins - 1)
    inside_E1 = counts_EB.gather(1, bin_E1)
    part_E1 = 1 - (until_EB.gather(1, bin_E1) - target_E1) / inside_E1.clamp_min(1)
    solved_E = low + (bin_E1 + part_E1).squeeze(1) * ((high - low) / num_bins)
    return solved_E - solved_E.mean()
