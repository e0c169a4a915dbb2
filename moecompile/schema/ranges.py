"""The range of every number in the config, in one table. Rules for more than one key are in `validation`."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from moecompile.ranges import Real, Whole
from moecompile.routing import BALANCE_NUMBERS, ROUTER_NUMBERS
from moecompile.schema.config import FiguresConfig

_FIGURE = Real("(0, inf)", "Give a positive number with its source")
NUMBERS: dict[str, Whole | Real] = {
    "seed": Whole(0, 2**63 - 1),
    "experts.num_routed": Whole(1),
    "experts.granularity": Whole(1),
    "experts.num_shared": Whole(0),
    "experts.num_identity": Whole(0),
    "experts.latent_size": Whole(1),
    "experts.drop_ratio": Real("(0, 1]", "Use 0.5, or another experts.init for none"),
    "experts.widen.noise": Real("[0, 1)", "Use 0.01, or 0 for none"),
    "routing.max_nodes": Whole(1),
    **{f"routing.{name}": allowed for name, allowed in ROUTER_NUMBERS.items() if name != "groups"},  # or auto
    **{f"balance.{key}": allowed for key, allowed in BALANCE_NUMBERS.items()},
    "adapters.rank": Whole(1),
    "adapters.alpha": Real("(0, inf)", "Use twice adapters.rank"),
    "adapters.dropout": Real("[0, 1)", "Use 0"),
    "mesh.num_nodes": Whole(1, 65_536),
    "mesh.ranks_per_node": Whole(1, 1_024),
    "mesh.dp_replicate": Whole(1),
    "hardware.memory_gib": Real("(0, inf)", "Give the memory of one rank in GiB"),
    "hardware.intra_node_gb_s": Real("(0, inf)", "Give the bandwidth of one rank in 1e9 bytes/s"),
    "hardware.inter_node_gb_s": Real("(0, inf)", "Give the bandwidth of one rank in 1e9 bytes/s"),
    "hardware.tflops": Real("(0, inf)", "Give the speed of one rank's matrix products in 1e12 operations/s"),
    **{f"hardware.figures.{each.name}.value": _FIGURE for each in fields(FiguresConfig)},
    "hardware.host.cores": Whole(1),
    **{f"hardware.host.{name}.value": _FIGURE for name in ("attention_gflops", "pass_gb_s", "node_us", "optimizer_ns")},
    "stack.bits": Whole(4, 32),
    "stack.row_bits": Whole(8, 16),
    "stack.grad_bits": Whole(16, 32),
    "stack.moment_bits": Whole(8, 32),
    "stack.wire_share.value": Real("(0, 1]", "Use 1.0"),
    "stack.comm_units.value": Real("[0, inf)", "Use 20, or 0 for none"),
    **{f"workload.{name}": Whole(1) for name in ("seq_len", "global_batch_size", "micro_batch_size")},
    **{f"workload.{name}": Whole(1) for name in ("tp", "pp", "vpp", "cp", "etp")},
    "workload.zero": Whole(0, 3),
    "place.steps": Whole(1),
    "data.vocab_size": Whole(257),
    "data.seq_len": Whole(2),
    "data.global_batch_size": Whole(1),
    "data.micro_batch_size": Whole(1),
    "data.val_fraction": Real("(0, 1)", "Use 0.05"),
    "data.val_batches": Whole(0),
    "optimizer.lr": Real("[0, inf)", "Use 0.001"),
    "optimizer.eps": Real("(0, inf)", "Use 1e-8"),
    "optimizer.weight_decay": Real("[0, inf)", "Use 0.1, or 0 for none"),
    "optimizer.warmup_steps": Whole(0),
    "optimizer.min_lr_ratio": Real("[0, 1]", "Use 0.1, or 1.0 for a constant rate"),
    "optimizer.clip_norm": Real("(0, inf)", "Use 1.0, or null for no clipping"),
    "optimizer.muon.lr": Real("[0, inf)", "Use 0.02, or null for optimizer.lr"),
    "optimizer.muon.momentum": Real("[0, 1)", "Use 0.95"),
    "optimizer.muon.steps": Whole(1, 99),
    "trainer.max_steps": Whole(1),
    "trainer.log_interval": Whole(1),
    "trainer.val_interval": Whole(1),
    "trainer.sample_interval": Whole(0),
    "trainer.timeout_s": Whole(1, 1_000_000),
    "trainer.threads_per_rank": Whole(1, 1_024),
    "trainer.save_interval": Whole(0),
    "trainer.keep_last": Whole(0),
    "trainer.max_restarts": Whole(0),
    "launcher.signal_s": Whole(1, 65_535),
    "launcher.cpus_per_rank": Whole(1, 65_536),
    "verify.steps": Whole(1),
    "bench.rounds": Whole(1),
    "bench.warmup": Whole(1),
    "search.show": Whole(1),
    "export.tolerance": Real("(0, inf)", "Use 1e-5"),
}
"""Dotted key -> its range; keys that may be null are checked if they are not."""


def check_numbers(config: Any) -> None:
    """Checks the numbers of a config, or of an object that has some of its groups.

    Raises:
        ConfigError: a number is out of its range (the first one).
    """
    for path, allowed in NUMBERS.items():
        value = config
        for key in path.split("."):
            value = getattr(value, key, None)
        if value is not None:
            allowed.check(path, value)
