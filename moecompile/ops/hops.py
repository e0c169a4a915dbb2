"""Row movement of the `hierarchical` dispatch: two hops, each a deduplicated exchange between nodes or ranks (parts).

Legend: T tokens, D model dim, K top-k, N nodes of the EP group, L EP ranks on each, V local rows, A local assignments,
U rows sent, B assignments sent.

NOTE on the route of a token from rank (n, l), local rank l on node n, to its experts:
  1. Hop 1, over `ep_inter`: one row to (m, l) for each node m that has one of the token's experts.
  2. Hop 2, over `ep_intra`: (m, l) forwards the row once to each (m, j) that has one of the token's experts.
  3. Back the same way: (m, j) sends (m, l) one weighted sum per row; (m, l) adds up the sums from its node and sends
     (n, l) one row per token.

NOTE on the counts. What (m, l) forwards depends on what it receives, but every source can count it from its own ids.
So the counts of hop 1 include those of hop 2, 2 + 2 L numbers for each node:
  [rows, assignments, (rows, assignments) for local rank 0, ..., for local rank L - 1]
Their sums over the sources are what (m, l) forwards. Both counts stay on the device, and both tables are copied to the
host together: one host sync per layer. Since all sizes are then known, no op here needs another.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moecompile.ops.host import start_read
from moecompile.ops.rows import assignment_codes


@torch.library.custom_op("moecompile::count_hops", mutates_args=())
def count_hops(ids_TK: Tensor, num_experts: int, num_nodes: int, ranks_per_node: int) -> tuple[Tensor, Tensor]:
    """Codes of the assignments, and counts to send to each node (see above). Dropped assignments are not counted.

    Returns:
        codes_A int64 (A = T * K): 2 * expert + (1 if it is the first of its token); counts_Nn int64.
    """
    num_tokens, num_ranks = ids_TK.shape[0], num_nodes * ranks_per_node
    rank_TK = torch.div(ids_TK, num_experts // num_ranks, rounding_mode="floor")  # dropped: num_ranks
    hits_Tr = ids_TK.new_zeros(num_tokens, num_ranks + 1).scatter_add_(1, rank_TK, torch.ones_like(ids_TK))
    hits_TNL = hits_Tr[:, :num_ranks].reshape(num_tokens, num_nodes, ranks_per_node)
    hits_TN = hits_TNL.sum(2)
    onward_NL2 = torch.stack(((hits_TNL > 0).sum(0), hits_TNL.sum(0)), dim=2)
    counts_Nn = torch.cat(
        ((hits_TN > 0).sum(0).unsqueeze(1), hits_TN.sum(0).unsqueeze(1), onward_NL2.flatten(1)), dim=1
    )
    return assignment_codes(ids_TK), counts_Nn


@count_hops.register_fake
def _(ids_TK: Tensor, num_experts: int, num_nodes: int, ranks_per_node: int) -> tuple[Tensor, Tensor]:
    return ids_TK.new_empty(ids_TK.numel()), ids_TK.new_empty(num_nodes, 2 + 2 * ranks_per_node)


@torch.library.custom_op("moecompile::onward_counts", mutates_args=())
def onward_counts(received_Nn: Tensor) -> Tensor:
    """Rows and assignments that hop 2 forwards to each rank of the node, (L, 2)."""
    return received_Nn[:, 2:].sum(0).reshape(-1, 2)


@onward_counts.register_fake
def _(received_Nn: Tensor) -> Tensor:
    return received_Nn.new_empty((received_Nn.shape[1] - 2) // 2, 2)


@torch.library.custom_op("moecompile::read_tables", mutates_args=())
def read_tables(sent_Nn: Tensor, received_Nn: Tensor, sent_L2: Tensor, received_L2: Tensor) -> tuple[Tensor, Tensor]:
    """The tables of both hops, table_2Nn and table_2L2 (moecompile.ops.exchange), with a single host sync."""
    return start_read(torch.stack((sent_Nn, received_Nn))), start_read(torch.stack((sent_L2, received_L2)))


@read_tables.register_fake
def _(sent_Nn: Tensor, received_Nn: Tensor, sent_L2: Tensor, received_L2: Tensor) -> tuple[Tensor, Tensor]:
    first, second = (torch.empty(2, *counts.shape, dtype=torch.int64, device="cpu") for counts in (sent_Nn, sent_L2))
    return first, second
