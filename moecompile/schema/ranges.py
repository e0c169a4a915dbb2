"""The range of every number in the config, in one table. What depends on more than one key is in resolve.py."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from moecompile.errors import ConfigError
from moecompile.schema.config import Config

_MOST = 2**31 - 1


@dataclass(frozen=True)
class Whole:
    """A whole number in [low, high]."""

    low: int
    high: int = _MOST

    def check(self, path: str, value: Any) -> None:
        """Raises ConfigError outside of the range."""
        if type(value) is not int:
            raise ConfigError(path, value, "has the wrong type", "Give a whole number")
        if value < self.low:
            raise ConfigError(path, value, f"must be at least {self.low}", f"Use {self.low} or more")
        if value > self.high:
            raise ConfigError(path, value, f"must be at most {self.high}", f"Use {self.high} or less")


@dataclass(frozen=True)
class Real:
    """A finite number in an interval, written as in mathematics: `[` includes the end, `(` does not."""

    interval: str
    fix: str

    def check(self, path: str, value: Any) -> None:
        """Raises ConfigError outside of the interval, and for NaN and the infinities."""
        if type(value) not in (int, float):
            raise ConfigError(path, value, "has the wrong type", "Give a number")
        low, high = (float(end) for end in self.interval[1:-1].split(","))
        above = value > low or (value == low and self.interval[0] == "[")
        below = value < high or (value == high and self.interval[-1] == "]")
        if not math.isfinite(value):
            raise ConfigError(path, value, "must be a finite number", self.fix)
        if not (above and below):
            rules = {"(0, inf)": "must be positive", "[0, inf)": "must not be negative"}
            raise ConfigError(path, value, rules.get(self.interval, f"must lie in {self.interval}"), self.fix)


_LOSS = Real("[0, inf)", "Use 0 for none")
NUMBERS: dict[str, Whole | Real] = {
    "seed": Whole(0, 2**63 - 1),
    "experts.num_routed": Whole(1),
    "experts.granularity": Whole(1),
    "experts.num_shared": Whole(0),
    "experts.drop_ratio": Real("(0, 1]", "Use 0.5, or another experts.init for none"),
    "routing.top_k": Whole(1),
    "routing.scale": Real("(0, inf)", "Use 1.0"),
    "routing.top_groups": Whole(1),
    "routing.max_nodes": Whole(1),
    "routing.capacity_factor": Real("(0, inf)", "Use 1.25, or null for dropless"),
    "routing.jitter": Real("[0, 1)", "Use 0.01"),
    "routing.skew": Real("(0, inf)", "Use 1.0"),
    "balance.rate": Real("[0, inf)", "Use 0.001 or balance.rule=none"),
    "balance.losses.micro_batch": _LOSS,
    "balance.losses.sequence": _LOSS,
    "balance.losses.global_batch": _LOSS,
    "balance.losses.z": _LOSS,
    "mesh.num_nodes": Whole(1, 65_536),
    "mesh.ranks_per_node": Whole(1, 1_024),
    "mesh.dp_replicate": Whole(1),
    "hardware.memory_gib": Real("(0, inf)", "Give the memory of one rank in GiB"),
    "hardware.intra_node_gb_s": Real("(0, inf)", "Give the bandwidth of one rank in 1e9 bytes/s"),
    "hardware.inter_node_gb_s": Real("(0, inf)", "Give the bandwidth of one rank in 1e9 bytes/s"),
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
    "trainer.max_steps": Whole(1),
    "trainer.log_interval": Whole(1),
    "trainer.val_interval": Whole(1),
    "trainer.timeout_s": Whole(1, 1_000_000),
    "trainer.threads_per_rank": Whole(1, 1_024),
    "trainer.save_interval": Whole(0),
    "trainer.keep_last": Whole(0),
    "trainer.max_restarts": Whole(0),
    "verify.steps": Whole(1),
    "bench.rounds": Whole(1),
    "bench.warmup": Whole(1),
    "export.tolerance": Real("(0, inf)", "Use 1e-5"),
}
"""Dotted key -> its range; a key that may be null is checked where it is given."""

_BETA = Real("[0, 1)", "Use [0.9, 0.95]")


def check_numbers(found: Any) -> None:
    """Checks the numbers of a config, or of an object that has some of its groups.

    Raises:
        ConfigError: the first one that is out of its range.
    """
    for path, allowed in NUMBERS.items():
        value = found
        for key in path.split("."):
            value = getattr(value, key, None)
        if value is not None:
            allowed.check(path, value)


def check_schedule(config: Config) -> None:
    """Checks the rest of `optimizer`.

    Raises:
        ConfigError: the first rule that is broken.
    """
    optimizer, max_steps = config.optimizer, config.trainer.max_steps
    if len(optimizer.betas) != 2:
        raise ConfigError("optimizer.betas", optimizer.betas, "must be two numbers", "Use [0.9, 0.95]")
    for i, beta in enumerate(optimizer.betas):
        _BETA.check(f"optimizer.betas[{i}]", beta)
    # A short run for a look keeps the warm-up that a recipe has, and ends before it does.
    shortened = "trainer.max_steps" in config.given and "optimizer.warmup_steps" not in config.given
    if optimizer.warmup_steps > max_steps and not shortened:
        raise ConfigError(
            "optimizer.warmup_steps", optimizer.warmup_steps,
            f"the run ends after trainer.max_steps={max_steps}, before optimizer.lr is reached",
            f"Use at most {max_steps}, or raise trainer.max_steps",
        )  # fmt: skip
