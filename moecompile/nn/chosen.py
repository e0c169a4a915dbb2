"""The choice that a router replays.

Legend: T tokens, K top-k.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moecompile.errors import MoecompileError


def replayed_or_live(ids_TK: Tensor, live_TK: Tensor, num_experts: int) -> Tensor:
    """The ids to replay, (T, K) or (B, at least S, K), and the live choice for tokens that have none.

    Raises:
        MoecompileError: they belong to another number of tokens.
    """
    if ids_TK.dim() == 3:
        ids_TK = ids_TK[:, : live_TK.shape[0] // max(1, ids_TK.shape[0])].flatten(0, 1)
    if ids_TK.shape[0] != live_TK.shape[0]:
        raise MoecompileError(f"routes of {ids_TK.shape[0]} tokens are replayed, but {live_TK.shape[0]} are routed")
    ids_TK = ids_TK.to(live_TK)
    known_T1 = ((ids_TK >= 0) & (ids_TK < num_experts)).all(1, keepdim=True)
    return torch.where(known_T1, ids_TK, live_TK)
