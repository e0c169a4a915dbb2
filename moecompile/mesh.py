"""The device mesh as plain numbers: its axes, and which ranks share a node, a group or a micro-batch.

One set of ranks is factored twice, because dense weights and experts are placed differently (folding):

    dense weights  (pp, dp_replicate, dp_shard, cp, tp)  world = pp * dp_replicate * dp_shard * cp * tp
    experts        (pp, dp_replicate, edp, ep)           world = pp * dp_replicate * edp * ep

Rank order (the same everywhere): nodes are contiguous ranks, and the last axis varies fastest, so the groups of `tp`,
of `cp` (without `tp`) and of `ep`, and all ranks of a stage of `pp`, are contiguous ranks:

    of_batch = (pp_index * dp_replicate + dp_replicate_index) * dp_shard + dp_shard_index
    rank     = (of_batch * cp + cp_index) * tp + tp_index
             = ((pp_index * dp_replicate + dp_replicate_index) * edp_shard + edp_index) * ep + ep_index

What an axis is stands in its row of `AXES` and nowhere else. Sizes, groups, sums of gradients, batches and memory ask
`MeshSpec` about a `Part`: `mesh.size(Part.SEQUENCE)` is the number of ranks that have parts of the same sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import cache, cached_property
from math import isqrt, prod

from moecompile.errors import ConfigError


class Part(Enum):
    """What the ranks along an axis have different parts of.

    Where tokens are split, each rank has a part of a weight's gradient, and they are summed. Where weights are owned, a
    rank computes with its part alone, and its gradient is whole. Stored weights are gathered for use (FSDP).
    """

    BATCH = "micro-batches"
    SEQUENCE = "positions of the same sequences, in all layers"
    TOKENS = "tokens of the same micro-batch, inside MoE layers"
    HEADS = "heads of attention"
    LAYERS = "layers: each rank owns some"
    WEIGHTS = "dense weights, owned, where the model's tp_plan splits them"
    STORED = "dense weights, stored"
    EXPERTS = "experts, owned"
    STORED_EXPERTS = "experts, stored"
    ROWS = "rows of embedding tables, owned"


@dataclass(frozen=True, kw_only=True, eq=False)  # a row is itself alone, and its hash is cheap
class Axis:
    """An axis of the mesh.

    splits: what its ranks have different parts of. dense, experts: whether it is in that factorization. given: whether
    the config gives its size; else it has all ranks that the others leave. group: its ranks in a message, if they must
    fill whole nodes or fit into one. searched: whether `search` varies it.
    """

    name: str
    splits: tuple[Part, ...]
    dense: bool = True
    experts: bool = False
    given: bool = True
    group: str = ""
    searched: bool = False


AXES = (
    Axis(name="pp", splits=(Part.LAYERS,), experts=True, searched=True),
    Axis(name="dp_replicate", splits=(Part.BATCH, Part.ROWS), experts=True, searched=True),
    Axis(name="dp_shard", splits=(Part.BATCH, Part.STORED, Part.ROWS), given=False),
    Axis(name="cp", splits=(Part.SEQUENCE, Part.HEADS, Part.STORED, Part.ROWS), group="a CP group"),
    Axis(name="tp", splits=(Part.TOKENS, Part.HEADS, Part.WEIGHTS), group="a TP group", searched=True),
    Axis(name="edp", splits=(Part.STORED_EXPERTS,), dense=False, experts=True, given=False),
    Axis(name="ep", splits=(Part.EXPERTS,), dense=False, experts=True, group="an EP group", searched=True),
)  # fmt: skip
"""All axes. Those of one factorization are in the order of the rank's numbering, the last of which varies fastest."""


def dense_axes() -> tuple[str, ...]:
    """The axes of dense weights, in the order of the numbering."""
    return tuple(axis.name for axis in AXES if axis.dense)


def expert_axes() -> tuple[str, ...]:
    """The axes of experts, in the order of the numbering."""
    return tuple(axis.name for axis in AXES if axis.experts)


def axes_that_split(*of: str | Part) -> tuple[str, ...]:
    """The axes of these names, and those that split one of these parts, in the order of the numbering.

    Raises:
        KeyError: no axis has this name.
    """
    return _that_split(AXES, of)


@cache  # a search asks a million times
def _that_split(axes: tuple[Axis, ...], of: tuple[str | Part, ...]) -> tuple[str, ...]:
    if unknown := [name for name in of if isinstance(name, str) and name not in {axis.name for axis in axes}]:
        raise KeyError(f"{unknown[0]} is not an axis: {', '.join(axis.name for axis in axes)}")
    return tuple(axis.name for axis in axes if axis.name in of or not set(axis.splits).isdisjoint(of))


class LinkClass(str, Enum):
    """What lies between two ranks."""

    SELF = "self"
    INTRA_NODE = "intra_node"
    INTER_NODE = "inter_node"


@dataclass(frozen=True, kw_only=True)
class MeshSpec:
    """A validated mesh; every size is a number of ranks.

    Raises:
        ConfigError: the sizes do not multiply up, or a TP, CP or EP group would straddle nodes unevenly.
    """

    num_nodes: int = 1
    ranks_per_node: int = 1
    ep: int = 1
    dp_replicate: int = 1
    tp: int = 1
    cp: int = 1
    pp: int = 1
    device: str = "cpu"

    def __post_init__(self) -> None:
        given = {axis.name: axis for axis in reversed(AXES) if axis.given}
        for name in ["num_nodes", "ranks_per_node"] + list(given):
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(f"mesh.{name}", value, "must be at least 1", "Give a positive number")
        self._check_stages()
        for axis in given.values():
            if axis.group:
                self._check_contiguous(axis)
        self._check_replicas("expert copies", ("ep",))
        self._check_replicas("micro-batches", self.sharing)

    def _check_stages(self) -> None:
        """Checks that the ranks of a stage fill whole nodes, or that nodes have whole stages."""
        fitting = [
            n for n in divisors(self.world_size) if not (self.num_nodes % n and n % self.num_nodes)
            and not (n > self.num_nodes and self.ranks_per_node % (n // self.num_nodes))
        ]  # fmt: skip
        if self.pp not in fitting:
            rule = f"stages must have equally many ranks, of whole nodes or within one ({self._shape})"
            raise ConfigError("mesh.pp", self.pp, rule, f"Use one of {fitting}")

    def _check_contiguous(self, axis: Axis) -> None:
        """Checks that the groups of an axis that varies fastest divide the ranks, and the nodes evenly; of `cp`, with
        the ranks of `tp` between its own.
        """
        size, path = self.size(axis.name), f"mesh.{axis.name}"
        faster = dense_axes()[dense_axes().index(axis.name) + 1 :] if axis.dense else ()
        inside = prod(getattr(self, name) for name in faster)
        fitting = [n for n in divisors(self.ranks_per_stage) if not self.ranks_per_stage % (n * inside)]
        times = "".join(f", times mesh.{name}={getattr(self, name)}," for name in faster if getattr(self, name) > 1)
        if self.ranks_per_stage % (size * inside):
            rule = f"must{times} divide the world size ({self._shape})"
            if self.pp > 1:
                of_stage = f"{self.ranks_per_stage} ranks of a stage ({self._shape}, mesh.pp={self.pp})"
                rule = f"must{times} divide the {of_stage}"
            raise ConfigError(path, size, rule, f"Use one of {fitting}")
        fits = {n: not (n * inside % self.ranks_per_node and self.ranks_per_node % (n * inside)) for n in fitting}
        if not fits[size]:
            fitting = [n for n in fitting if fits[n]]
            rule = f"{axis.group}{times} must fill whole nodes or fit into one ({self._shape})"
            raise ConfigError(path, size, rule, f"Use one of {fitting}")

    def _check_replicas(self, what: str, inside: Sequence[str]) -> None:
        """Checks that the replicas divide what there is `world / inside` times."""
        inside = tuple(dict.fromkeys((*self.axes(Part.LAYERS), *inside)))
        copies = self.world_size // self.size(*inside)
        sizes = ", ".join(f"{name}={self.size(name)}" for name in inside)
        for axis in AXES:
            if axis.given and Part.BATCH in axis.splits:
                if copies % self.size(axis.name):
                    left = f"{' / '.join(('world', *inside))} = {copies}"
                    rule = f"must divide the number of {what}, {left} ({self._shape}, {sizes})"
                    fix = f"Use one of {divisors(copies)}"
                    raise ConfigError(f"mesh.{axis.name}", self.size(axis.name), rule, fix)
                copies //= self.size(axis.name)

    @property
    def _shape(self) -> str:
        sizes = ((self.num_nodes, "node"), (self.ranks_per_node, "rank"), (self.world_size, "rank"))
        nodes, each, ranks = (f"{size} {noun}{'s' * (size != 1)}" for size, noun in sizes)
        return f"{nodes} x {each} = {ranks}"

    @cached_property
    def _sizes(self) -> dict[str, int]:
        sizes = {axis.name: getattr(self, axis.name) for axis in AXES if axis.given}
        for names in (dense_axes(), expert_axes()):
            (rest,) = (name for name in names if name not in sizes)
            sizes[rest] = self.world_size // prod(sizes[name] for name in names if name != rest)
        return sizes

    def size(self, *of: str | Part) -> int:
        """The number of ranks along the axes of these names, and those that split these parts.

        Raises:
            KeyError: no axis has this name.
        """
        return prod(self._sizes[name] for name in axes_that_split(*of))

    def axes(self, *of: str | Part) -> tuple[str, ...]:
        """Of these axes, those of more than one rank."""
        return tuple(name for name in axes_that_split(*of) if self._sizes[name] > 1)

    def share(self, number: int, *of: str | Part) -> int:
        """The largest of the parts into which these axes cut `number`."""
        return -(-number // self.size(*of))

    def setting(self, *of: str | Part) -> str:
        """`mesh.cp=2`: what sets these axes, for a message."""
        return ", ".join(f"mesh.{name}={self._sizes[name]}" for name in axes_that_split(*of))

    @property
    def sharing(self) -> tuple[str, ...]:
        """The axes of more than one rank along which ranks share a micro-batch."""
        return tuple(axis for axis in self.axes(*dense_axes()) if axis not in axes_that_split(Part.BATCH))

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.num_nodes * self.ranks_per_node

    @property
    def ranks_per_stage(self) -> int:
        """Number of ranks that have the same layers."""
        return self.world_size // self.size(Part.LAYERS)

    @property
    def edp(self) -> int:
        """Number of ranks that hold (a shard or a replica of) the same experts."""
        return self.ranks_per_stage // self.ep

    @cached_property
    def stage(self) -> MeshSpec:
        """The ranks of one stage, as a mesh of their own."""
        if self.pp == 1:
            return self
        nodes = max(1, self.num_nodes // self.pp)
        return replace(self, num_nodes=nodes, ranks_per_node=self.ranks_per_stage // nodes, pp=1)

    @property
    def edp_shard(self) -> int:
        """Number of ranks over which one copy of an expert is FSDP-sharded: the size of the axis `edp`."""
        return self._sizes["edp"]

    @property
    def dp_shard(self) -> int:
        """Number of ranks along the axis `dp_shard`."""
        return self._sizes["dp_shard"]

    @property
    def num_batches(self) -> int:
        """Number of different micro-batches at a time: the data-parallel size."""
        return self.size(Part.BATCH)

    @property
    def nodes_per_ep_group(self) -> int:
        """Number of nodes that one EP group spans."""
        return max(1, self.ep // self.ranks_per_node)

    def _strides(self, names: Sequence[str]) -> dict[str, int]:
        """How far apart neighbours along each axis are, in the factorization that has the axes `names`."""
        factors = dense_axes() if set(names) <= set(dense_axes()) else expert_axes()
        return {name: prod(self._sizes[inner] for inner in factors[i + 1 :]) for i, name in enumerate(factors)}

    def index(self, rank: int, *of: str | Part) -> int:
        """The place of global `rank` along these axes together, the last of which varies fastest."""
        names, index = axes_that_split(*of), 0
        strides = self._strides(names)
        for name in names:
            index = index * self._sizes[name] + rank // strides[name] % self._sizes[name]
        return index

    def group(self, *of: str | Part, rank: int = 0) -> tuple[int, ...]:
        """Global ranks whose place differs from that of `rank` along these axes alone, in their order."""
        names = axes_that_split(*of)
        strides = self._strides(names)
        ranks = [rank - sum(rank // strides[name] % self._sizes[name] * strides[name] for name in names)]
        for name in names:
            ranks = [first + i * strides[name] for first in ranks for i in range(self._sizes[name])]
        return tuple(ranks)

    def dims(self, *together: Sequence[str]) -> dict[str, int]:
        """Names and sizes of the dims of a device mesh of dense weights: axes of more than one rank.

        Args:
            together: axes that make one dim, of any size, named `dp_shard_cp`; they are neighbours.
        """
        joined = {name: "_".join(names) for names in together for name in names}
        dims: dict[str, int] = {}
        for name in dense_axes():
            if name in joined or self._sizes[name] > 1:
                dim = joined.get(name, name)
                assert dim not in dims or dim == next(reversed(dims)), f"{dim} are not neighbours"
                dims[dim] = dims.get(dim, 1) * self._sizes[name]
        return dims

    def expert_dims(self) -> dict[str, int]:
        """Names and sizes of the dims of a device mesh of experts: their axes, without stages if there is one."""
        stages = axes_that_split(Part.LAYERS)
        return {name: self._sizes[name] for name in expert_axes() if self._sizes[name] > 1 or name not in stages}

    def batch_index(self, rank: int) -> int:
        """The index of the micro-batch of global `rank` among `num_batches`."""
        return self.index(rank, Part.BATCH)

    def counts_in_stage(self, rank: int) -> bool:
        """Whether global `rank` is the one of those of a stage with the same tokens that counts them."""
        shared = set(self.sharing).difference(axes_that_split(Part.SEQUENCE, Part.LAYERS))
        return self.index(rank, *shared) == 0

    def node_of(self, rank: int) -> int:
        """The node that holds global `rank`."""
        return rank // self.ranks_per_node

    def ep_peers(self, rank: int) -> tuple[int, ...]:
        """Global ranks of the EP group of `rank`, in EP order."""
        return self.group("ep", rank=rank)

    def link(self, a: int, b: int) -> LinkClass:
        """The link class between two global ranks."""
        if a == b:
            return LinkClass.SELF
        return LinkClass.INTRA_NODE if self.node_of(a) == self.node_of(b) else LinkClass.INTER_NODE


def divisors(n: int) -> list[int]:
    """The divisors of `n`, the smallest first."""
    small = [d for d in range(1, isqrt(n) + 1) if n % d == 0]
    return small + [n // d for d in reversed(small) if d * d != n]
