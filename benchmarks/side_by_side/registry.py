"""Who takes part: a name, what it needs, and how its layer is made."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

import torch
from layer import Dense
from torch import Tensor, nn

from side_by_side.common import Layer, NotHereError, Place, Size, Weights

LIMIT, OURS = "limit", "moecompile"
INSTALL = "make peers, or pip install -r benchmarks/requirements-peers.txt (see docs/understand/peers.md)"


@dataclass(frozen=True)
class Entry:
    """package: its name on PyPI, empty for what is always there. modules: what must be importable.

    most_rounds: of layers that are so slow that a few rounds say enough.
    """

    build: Callable[[Size, Weights, Place], Layer]
    package: str = ""
    modules: tuple[str, ...] = ()
    most_rounds: int | None = None

    @property
    def version(self) -> str | None:
        """Of the package."""
        return version(self.package) if self.package else None

    def require(self) -> None:
        """Returns if it can be built.

        Raises:
            NotHereError: a package is missing.
        """
        try:
            found = self.version
        except PackageNotFoundError:
            raise NotHereError(f"{self.package} is not installed: {INSTALL}") from None
        for module in self.modules:
            if find_spec(module) is None:
                raise NotHereError(f"{self.package} {found} needs {module}, which is not installed: {INSTALL}")


class DenseLayer:
    """A dense SwiGLU FFN with the FLOPs that a token activates: what no MoE layer can beat by less work."""

    def __init__(self, size: Size, weights: Weights, place: Place) -> None:
        self.module: nn.Module = Dense(size.top_k * size.width).to(weights.router_ED.dtype)

    def __call__(self, x_1TD: Tensor) -> Tensor:
        out: Tensor = self.module(x_1TD)
        return out

    def gradients(self) -> Weights:
        raise NotImplementedError("a dense FFN has no experts")


def _made(module: str, name: str, *extra: str) -> Callable[[Size, Weights, Place], Layer]:
    """A layer of a file of this folder, imported when it is built."""

    def build(size: Size, weights: Weights, place: Place) -> Layer:
        layer: Layer = getattr(import_module(f"side_by_side.{module}"), name)(size, weights, place, *extra)
        return layer

    return build


_TITAN = Entry(
    _made("torchtitan_moe", "TorchtitanLayer"), "torchtitan", ("triton", "spmd_types", "tyro", "torch_checkpointing")
)
_DEEPSPEED = Entry(_made("deepspeed_moe", "DeepSpeedLayer"), "deepspeed")
_MEGATRON = Entry(_made("megatron_moe", "MegatronLayer"), "megatron-core")
_AXOLOTL_DISPATCH = "axolotl.integrations.expert_parallel.torch_dispatch"  # since 0.21
_AXOLOTL = {
    f"Axolotl {name}": Entry(_made("axolotl_moe", "AxolotlLayer", chunks), "axolotl", ("addict", _AXOLOTL_DISPATCH))
    for name, chunks in (("torch", "1"), ("torch, 2 chunks", "2"))
}
_GROUPED = _made("hugging_face", "TransformersLayer", "grouped_mm")

ONE_RANK = {
    LIMIT: Entry(DenseLayer),
    OURS: Entry(_made("ours", "MoecompileLayer")),
    "transformers grouped_mm": Entry(_GROUPED, "transformers"),
    "transformers eager": Entry(_made("hugging_face", "TransformersLayer", "eager"), "transformers", most_rounds=3),
    "torchtitan": _TITAN,
    "DeepSpeed": _DEEPSPEED,
    "Megatron-Core": _MEGATRON,
}
MANY_RANKS = {
    LIMIT: Entry(DenseLayer),
    **{
        f"{OURS} {kind}": Entry(_made("ours", "MoecompileLayer", kind))
        for kind in ("auto", "flat", "dedup", "allgather")
    },
    "transformers all_to_all": Entry(_GROUPED, "transformers"),
    "torchtitan all_to_all": _TITAN,
    "DeepSpeed all_to_all": _DEEPSPEED,
    "Megatron-Core allgather": _MEGATRON,
    **_AXOLOTL,
}
TWO_NODES = MANY_RANKS | {f"{OURS} hierarchical": Entry(_made("ours", "MoecompileLayer", "hierarchical"))}


def is_ours(name: str) -> bool:
    """Whether this is one of moecompile's layers."""
    return name.split(maxsplit=1)[0] == OURS


def is_peer(name: str) -> bool:
    """Whether somebody else's layer has this name."""
    return name != LIMIT and not is_ours(name)


def choose(entries: dict[str, Entry], only: list[str] | None) -> tuple[dict[str, Entry], dict[str, str]]:
    """Those that can be built, and of the others why not.

    Raises:
        ValueError: `only` names somebody who is not there.
    """
    if unknown := sorted(set(only or ()) - entries.keys()):
        raise ValueError(f"--only {unknown[0]!r}: there is {', '.join(entries)}")
    chosen, missing = {}, {}
    for name, entry in entries.items():
        if only and name not in only and name != LIMIT:
            continue
        try:
            entry.require()
            chosen[name] = entry
        except NotHereError as error:
            missing[name] = str(error)
    return chosen, missing


def versions(chosen: dict[str, Entry]) -> dict[str, str]:
    """package -> version, torch included."""
    packages = {entry.package: entry.version for entry in chosen.values() if entry.package}
    return {"torch": torch.__version__} | {name: found for name, found in sorted(packages.items()) if found}
