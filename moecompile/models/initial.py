"""The initial weights of a model from a config, of which a rank keeps its shards (`model.init`).

Both ways repeat what the model's own constructor does (recorded.py), and give the same values on every mesh:
  * `Replayed` draws the numbers of the whole model in the constructor's order on every rank, one weight at a time: bit
    for bit the model that one process builds. It takes as long on every mesh.
  * `Keyed` draws each block of rows from a random key of its own, so that a rank draws its rows alone. The
    distributions are the constructor's, the numbers are not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from types import MappingProxyType

import torch
from torch import Tensor, nn

from moecompile.models.recorded import Op, Record, View, record, replayed
from moecompile.torch_private import apply, local_part, own_parameters, tree_map_only

MOST_REPLAYED = 4_000_000_000
"""`model.init=auto` replays models of at most so many numbers: less than a minute for each rank."""
_BLOCK = 2**16
_MIX = 0x9E3779B1  # odd: keys of different blocks differ modulo 2^32, all that torch's generator takes of a seed
_CONSTANT = frozenset(("fill_", "zero_"))
_SAME_SHAPE = frozenset((
    "_to_copy", "clone", "empty", "empty_like", "full", "full_like", "ones", "ones_like", "rand", "rand_like", "randn",
    "randn_like", "zeros", "zeros_like",
))  # fmt: skip


class Replayed:
    """All weights in the order of `names`; the others are gone or not there yet.

    Raises:
        NotRecorded: the constructor cannot be repeated.
    """

    note: str | None = (
        "initial weights: each rank draws the numbers of the whole model, one weight at a time, and keeps its shards: "
        "those of one process (model.init=replay)"
    )

    def __init__(self, build: Callable[[], nn.Module], seed: int) -> None:
        self.build, self._record, self._seed = build, record(build), seed
        self._values: dict[str, Tensor] = {}

    def names(self) -> Iterator[str]:
        """The name of each parameter and buffer, as its values are ready: they can be read until the next one."""
        for names, value in replayed(self._record, self._seed):
            self._values = {names[0]: value}
            yield names[0]
        self._values = {}

    def read(self, name: str, rows: range, within: tuple[slice, ...] = ()) -> Iterator[tuple[range, Tensor]]:
        """Rows of the first dim, of each what is `within`; a scalar has none."""
        value = self._values[name]
        yield rows, value[rows.start : rows.stop, *within] if value.ndim else value

    def whole(self, name: str) -> Tensor:
        """All rows; memory of its own."""
        return self._values[name].clone()


@dataclass(frozen=True)
class _Draw:
    """What makes a weight. ops: of its own memory and what it depends on. first: number of its first block of rows.

    by_rows: whether each op does the same to every row.
    """

    view: View
    ops: tuple[Op, ...]
    first: int
    by_rows: bool

    @property
    def rows_of_block(self) -> int:
        return max(1, _BLOCK // prod(self.view.shape[1:]))

    @property
    def num_blocks(self) -> int:
        return -(-self.view.shape[0] // self.rows_of_block) if self.by_rows else 1


class Keyed:
    """Weights in any order and any part.

    A weight is drawn by blocks of rows, of at least 65,536 numbers if there are so many; a stack of experts by expert.
    Its block has the key (seed, place of the weight in the model, block). A weight that is small, or made in a way that
    has no rows (an orthogonal matrix), is one block.

    Raises:
        NotRecorded: the constructor cannot be repeated.
    """

    note: str | None = (
        "initial weights: each rank draws its own rows alone, from keys: the same on every mesh, but not the numbers "
        "that transformers draws (model.init=keyed)"
    )

    def __init__(self, build: Callable[[], nn.Module], seed: int) -> None:
        made = record(build)
        self._seed, self._draws = seed, _draws(made)
        self._last: tuple[str, Tensor] | None = None

    def names(self) -> Iterator[str]:
        """The name of each parameter and buffer."""
        return iter(self._draws)

    def read(self, name: str, rows: range, within: tuple[slice, ...] = ()) -> Iterator[tuple[range, Tensor]]:
        """Rows of the first dim, of each what is `within`, by blocks; a scalar has none."""
        draw = self._draws[name]
        if not draw.by_rows:
            if self._last is None or self._last[0] != name:  # a stack in the order of a placement is read by experts
                self._last = (name, self._drawn_whole(draw))
            value = self._last[1]
            yield rows, value[rows.start : rows.stop, *within] if value.ndim else value
            return
        each = draw.rows_of_block
        for number in range(rows.start // each, -(-rows.stop // each)):
            first, last = number * each, min((number + 1) * each, draw.view.shape[0])
            part = range(max(rows.start, first), min(rows.stop, last))
            block = self._drawn_block(draw, number, range(first, last))
            yield part, block[part.start - first : part.stop - first, *within]

    def whole(self, name: str) -> Tensor:
        """All rows; memory of its own."""
        shape = self._draws[name].view.shape
        parts = [part for _, part in self.read(name, range(shape[0] if shape else 0))]
        return torch.cat(parts) if len(parts) > 1 else parts[0].clone()

    def _drawn_whole(self, draw: _Draw) -> Tensor:
        memories: dict[int, torch.UntypedStorage] = {}
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self._key(draw.first))
            for op in draw.ops:
                op.run(memories)
        return draw.view.of(memories[draw.view.memory])

    def _drawn_block(self, draw: _Draw, number: int, rows: range) -> Tensor:
        """The rows of one block: every tensor of the ops is as long as the block."""
        whole, shape = list(draw.view.shape), [len(rows), *draw.view.shape[1:]]
        tensors: dict[int, Tensor] = {}

        def of_block(value: View) -> Tensor:
            if value.memory not in tensors:
                tensors[value.memory] = torch.empty(shape if value.shape else (), dtype=value.dtype)
            return tensors[value.memory]

        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self._key(draw.first + number))
            for op in draw.ops:
                if op.name in _CONSTANT and op.writes[0].shape != draw.view.shape:
                    filled = _rows_of(op.writes[0], draw.view)
                    assert filled is not None
                    part = slice(max(filled.start - rows.start, 0), max(filled.stop - rows.start, 0))
                    op.call((of_block(draw.view)[part], *op.args[1:]), op.kwargs)
                    continue
                sized = tuple(shape if isinstance(arg, (list, tuple)) and [*arg] == whole else arg for arg in op.args)
                made = op.call(*tree_map_only(View, of_block, (sized, op.kwargs)))
                tensors.update({view.memory: made for view in op.makes})
        return tensors[draw.view.memory]

    def _key(self, block: int) -> int:
        return (self._seed * 1_000_003 + block * _MIX) % 2**32


def _draws(made: Record) -> dict[str, _Draw]:
    """What makes each parameter and buffer, by its first name."""
    needed = made.needed({view.memory for view in made.names}, keeps_order=False)
    related: dict[int, set[int]] = {}  # memory -> all memory that is computed from each other
    for op in needed:
        together = set[int]().union(*(related.get(view.memory, {view.memory}) for view in op.views))
        related |= dict.fromkeys(together, together)
    ops: dict[int, list[Op]] = {}
    views: dict[int, list[View]] = {}
    for op in needed:
        ops.setdefault(id(related[op.views[0].memory]), []).append(op)
    for view in made.names:
        views.setdefault(id(related[view.memory]), []).append(view)
    found, first = dict[View, _Draw](), 0
    for group, mine in views.items():
        is_random = any(op.is_random for op in ops[group])
        by_rows = is_random and all(_is_by_rows(op, view) for view in mine for op in ops[group])
        draws = [_Draw(view, tuple(ops[group]), first, by_rows) for view in mine]
        found |= dict(zip(mine, draws, strict=True))
        first += draws[0].num_blocks
    return {names[0]: found[view] for view, names in made.names.items()}


def _is_by_rows(op: Op, weight: View) -> bool:
    """Whether a weight is large, and an op does the same to each of its rows, or sets whole rows to a constant."""
    if prod(weight.shape) <= _BLOCK:
        return False
    if op.name in _CONSTANT and op.writes[0].shape != weight.shape:
        return op.writes[0].memory == weight.memory and _rows_of(op.writes[0], weight) is not None
    like = (weight.shape, weight.stride, 0)
    if any(view.shape and (view.shape, view.stride, view.offset) != like for view in op.views):
        return False
    if any(isinstance(value, Tensor) and value.ndim for value in (*op.args, *op.kwargs.values())):
        return False
    return torch.Tag.pointwise in getattr(op.function, "tags", ()) or op.overwrites or op.name in _SAME_SHAPE


def _rows_of(part: View, weight: View) -> range | None:
    """The rows of a weight that a part of it is; None if it is something else."""
    each = prod(weight.shape[1:])
    of_row = len(part.shape) - len(weight.shape) + 1  # dims before those of a row
    is_row = of_row in (0, 1) and (part.shape[of_row:], part.stride[of_row:]) == (weight.shape[1:], weight.stride[1:])
    if not is_row or part.offset % each or (of_row and part.stride[0] != each):
        return None
    return range(part.offset // each, part.offset // each + prod(part.shape) // each)


def materialise(
    model: nn.Module, device: torch.device, elsewhere: Mapping[str, Tensor] = MappingProxyType({})
) -> None:  # fmt: skip
    """Allocates tensors that are on the meta device and moves all others to `device`. Tied weights stay tied.

    elsewhere: memory that is there already, for these parameters.
    """
    given = {id(model.get_parameter(name)): memory for name, memory in elsewhere.items()}
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)

    def real(tensor: Tensor) -> Tensor:
        if id(tensor) in given:
            return given[id(tensor)]
        return torch.empty_like(tensor, device=device) if local_part(tensor).is_meta else tensor.to(device)

    apply(model, real)  # FSDP2 sees the new shards through its own
    for first, *others in names.values():
        for name in others:
            owner, _, attribute = name.rpartition(".")
            own_parameters(model.get_submodule(owner))[attribute] = model.get_parameter(first)


@torch.no_grad()
def fill_whole(structure: nn.Module, weights: Keyed) -> nn.Module:
    """Fills a model on the meta device, in place; returns it."""
    materialise(structure, torch.device("cpu"))
    tensors: dict[str, Tensor] = {**dict(structure.named_parameters()), **dict(structure.named_buffers())}
    for name in weights.names():
        tensors[name].copy_(weights.whole(name))
    return structure
