"""Experts in a latent width, and beside experts without weights, on ranks: loss, every gradient, norm and counts are those of a plain loop in one process."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from tests.distributed.fold_job import Case
from tests.distributed.harness import run_distributed_test
from tests.distributed.test_fold import check, four_ranks

LATENT = ("experts.latent_size=12", "experts.latent_norm=true", "experts.init=random")
NODES = ("mesh.num_nodes=2", "mesh.ranks_per_node=2")


def case(*overrides: str, **options: Any) -> Case:
    return Case(**{"architecture": "qwen3", "tp": 1, "ep": 4, "overrides": (*LATENT, *overrides), **options})


LOSSES = {"micro_batch": 0.3, "z": 0.2}
FAST = (
    case(
        "dispatch.kind=dedup", "experts.latent_norm=false", "experts.init=virtual_group", ep=2, ranks=2, losses=LOSSES
    ),
    case("dispatch.kind=flat", "experts.num_identity=3", ep=2, ranks=2, tied=True),
)
ZERO = ("experts.num_identity=3", "experts.latent_size=null", "experts.latent_norm=false")
SLOW = (
    *(
        case(*ZERO, f"dispatch.kind={kind}", *NODES, losses=LOSSES)
        for kind in ("flat", "dedup", "hierarchical", "allgather")
    ),
    case(*ZERO, "dispatch.kind=dedup", "dispatch.overlap=chunks", "dispatch.chunks=2"),
    case(*ZERO, "dispatch.kind=dedup", "dispatch.overlap=shared", "data.mask_padding=always", ep=2),
    case(*ZERO, "dispatch.kind=dedup", "dispatch.balance=lend", "dispatch.slots=2", "hardware.intra_node_gb_s=1e9"),
    case("experts.num_identity=3", "dispatch.kind=dedup", "dispatch.overlap=shared", checkpointing="keep_exchanges"),
    *(case(f"dispatch.kind={kind}", *NODES) for kind in ("flat", "dedup", "hierarchical", "allgather")),
    case("dispatch.kind=dedup", ep=2, capacity=0.6, losses=LOSSES, jitter=0.1),
    case(ep=1),
    case("dispatch.kind=dedup", "dispatch.overlap=shared"),
    case("dispatch.kind=hierarchical", *NODES, "dispatch.overlap=chunks", "dispatch.chunks=2"),
    case("dispatch.kind=dedup", "dispatch.balance=lend", "dispatch.slots=2", "hardware.intra_node_gb_s=1e9"),
    case("dispatch.kind=dedup", tp=2),
    case("dispatch.kind=dedup", "dispatch.overlap=chunks", "dispatch.chunks=2", tp=2),
    case("dispatch.kind=dedup", "data.mask_padding=always", tp=2, ep=2),
    case("dispatch.kind=dedup", "data.mask_padding=always"),
    case("dispatch.kind=dedup", checkpointing="keep_exchanges"),
    case("dispatch.kind=dedup", checkpointing="full", ep=2),
)
two = pytest.fixture(scope="module")(lambda: run_distributed_test(four_ranks, 2, FAST, timeout_s=120))
four = pytest.fixture(scope="module")(lambda: run_distributed_test(four_ranks, 4, SLOW, timeout_s=400))
named = partial(pytest.mark.parametrize, "given", ids=lambda given: given.name)


@named(FAST)
def test_two_ranks_equal_one_process(given: Case, two: list[list[dict[str, Any]]]) -> None:
    check(given, [of_rank[FAST.index(given)] for of_rank in two])


@pytest.mark.slow
@named(SLOW)
def test_four_ranks_equal_one_process(given: Case, four: list[list[dict[str, Any]]]) -> None:
    check(given, [of_rank[SLOW.index(given)] for of_rank in four])
