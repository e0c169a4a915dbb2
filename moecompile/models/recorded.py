"""How a constructor makes the weights of a model: recorded without memory, and made again one weight at a time.

Algorithm:
  1. Run the constructor on fake tensors, and record each operation with the memory that it reads and writes.
  2. Go backwards through the record: an operation is needed if a weight, or another needed operation, reads what it
     writes before all of that is overwritten. transformers draws most weights twice, and only needs the second draw.
  3. Go forwards in real memory, and hand each weight over after the last needed operation on its memory. Of random
     operations that are not needed, the numbers are drawn and dropped: the next ones are those of the constructor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from moecompile.torch_private import OpWatcher, fake_tensors, is_fake, memory_of, tree_leaves, tree_map_only, whole_ops

_OVERWRITE = frozenset((
    "bernoulli_", "cauchy_", "copy_", "exponential_", "fill_", "geometric_", "log_normal_", "normal_", "random_",
    "uniform_", "zero_",
))  # fmt: skip
_MOVE_MEMORY = frozenset(("resize_", "resize_as_", "set_", "swap"))
_UNSET = frozenset(("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"))

_SEED = 0x5EED_0F_7E57  # of the recording: no code has this one
_SEEDS = "its code seeds the random numbers, or draws some that are not recorded"


class NotRecorded(Exception):
    """Why a model's values cannot be made again from a record of its constructor."""


@dataclass(frozen=True)
class View:
    """A tensor as a part of some memory, which `memory` numbers."""

    memory: int
    nbytes: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @property
    def is_all(self) -> bool:
        """Whether it is all of its memory."""
        return prod(self.shape) * self.dtype.itemsize == self.nbytes

    def of(self, memory: torch.UntypedStorage) -> Tensor:
        """The tensor in real memory."""
        return torch.empty(0, dtype=self.dtype).set_(memory, self.offset, self.shape, self.stride)


@dataclass(frozen=True)
class Op:
    """One operation. args, kwargs: with views for tensors. dtype: torch's default one at that time.

    reads, writes, makes: views of memory; `makes` is new. overwrites: nothing of what it writes was read, and it is all
    of its memory.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dtype: torch.dtype
    reads: tuple[View, ...] = ()
    writes: tuple[View, ...] = ()
    makes: tuple[View, ...] = ()
    overwrites: bool = False
    is_random: bool = False

    @property
    def name(self) -> str:
        """Without namespace and overload: `normal_`."""
        schema = getattr(self.function, "_schema", None)
        return self.function.__name__ if schema is None else str(schema.name).rpartition("::")[2]

    @property
    def views(self) -> tuple[View, ...]:
        """All that it touches."""
        return (*self.reads, *self.writes, *self.makes)

    def run(self, memories: dict[int, torch.UntypedStorage]) -> None:
        """Runs it in real memory; what is not there yet is allocated."""

        def real(value: Any) -> Any:
            if isinstance(value, Tensor):  # a constant of the constructor
                return value.clone()
            if not isinstance(value, View):
                return value
            if value.memory not in memories:
                memories[value.memory] = torch.UntypedStorage(value.nbytes)
            return value.of(memories[value.memory])

        made = self.call(*tree_map_only((Tensor, View), real, (self.args, self.kwargs)))
        results = [tensor for tensor in tree_leaves(made) if isinstance(tensor, Tensor)] if self.makes else []
        for view, tensor in zip(self.makes, results, strict=True):
            if view != View(view.memory, tensor.untyped_storage().nbytes(), *_layout(tensor)):
                raise NotRecorded(f"{self.name} makes a tensor of another layout in memory than on fake tensors")
            memories[view.memory] = tensor.untyped_storage()

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs it on these arguments, under the constructor's default dtype."""
        default = torch.get_default_dtype()
        torch.set_default_dtype(self.dtype)
        try:
            return self.function(*args, **kwargs)
        finally:
            torch.set_default_dtype(default)


def _layout(tensor: Tensor) -> tuple[torch.dtype, tuple[int, ...], tuple[int, ...], int]:
    return tensor.dtype, tuple(tensor.shape), tuple(tensor.stride()), int(tensor.storage_offset())


@dataclass
class Record:
    """What a constructor does. names: view -> the parameters and buffers that are this view."""

    ops: list[Op] = field(default_factory=list)
    names: dict[View, list[str]] = field(default_factory=dict)

    def needed(self, memories: Iterable[int], *, keeps_order: bool) -> list[Op]:
        """The operations that the values in these memories need, in order (step 2).

        Args:
            keeps_order: also those of which it depends on values how many random numbers they draw.

        Raises:
            NotRecorded: no operation makes one of them.
        """
        wanted, found = set(memories), list[Op]()
        for op in reversed(self.ops):
            made = {view.memory for view in op.makes}
            if wanted & (made | {view.memory for view in op.writes}) or (keeps_order and op.is_random and op.reads):
                found.append(op)
                wanted -= made | ({view.memory for view in op.writes} if op.overwrites else set())
                wanted |= {view.memory for view in op.reads}
        if wanted:
            names = [name for view, names in self.names.items() if view.memory in wanted for name in names]
            raise NotRecorded(f"{(names or ['a tensor'])[0]} gets its values from outside of the constructor")
        return found[::-1]


def record(build: Callable[[], nn.Module]) -> Record:
    """Records a constructor (step 1). It runs without memory for the weights.

    Raises:
        NotRecorded: it reads values, or draws in ways that cannot be repeated.
    """
    watch = _Recorder()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        before = torch.get_rng_state()
        try:
            with fake_tensors(), watch, whole_ops(watch.whole):
                model = build()
        except NotRecorded:
            raise
        except Exception as error:  # the code of a model may do anything with a fake tensor
            raise NotRecorded(f"its code depends on values: {str(error).strip().partition(chr(10))[0]}") from error
        if not torch.equal(before, torch.get_rng_state()):  # fake tensors draw nothing
            raise NotRecorded(_SEEDS)
    made = Record(watch.ops)
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        made.names.setdefault(watch.view(tensor), []).append(name)
    _refuse_unset(made)
    return made


def _refuse_unset(made: Record) -> None:
    """Raises if a weight is never initialized: each rank would have something else in its part."""
    written = {view.memory for op in made.ops for view in op.writes}
    written |= {view.memory for op in made.ops if op.name not in _UNSET for view in op.makes}
    for view, names in made.names.items():
        if view.nbytes and view.memory not in written:
            raise NotRecorded(f"{names[0]} is not initialized by the model's code")


class _Recorder(OpWatcher):
    """Records the operations of the code inside."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[Op] = []
        self._kept: dict[int, Any] = {}  # memory that is freed would give its number to other memory

    def check_seed(self) -> None:
        """Raises if the random numbers that come next are not the next ones."""
        if torch.initial_seed() != _SEED:
            raise NotRecorded(_SEEDS)

    def view(self, tensor: Tensor) -> View:
        """A fake tensor as a view.

        Raises:
            NotRecorded: it is another tensor.
        """
        if not is_fake(tensor):
            raise NotRecorded("a weight is no plain tensor")
        memory, layout = memory_of(tensor), _layout(tensor)
        self._kept[memory] = tensor.untyped_storage()
        if not all(isinstance(size, int) for size in (*layout[1], *layout[2])):
            raise NotRecorded("the size of a tensor depends on values")
        return View(memory, int(tensor.untyped_storage().nbytes()), *layout)

    def watched(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Runs one operation of aten."""
        schema, is_random = function._schema, torch.Tag.nondeterministic_seeded in function.tags
        if is_random:
            self.check_seed()
        if kwargs.get("generator") is not None:
            raise NotRecorded("its code draws from a generator of its own")
        name = str(schema.name).rpartition("::")[2]
        if name in _MOVE_MEMORY:
            raise NotRecorded(f"its code moves tensors in memory, by {name}")
        as_views = tree_map_only(Tensor, lambda t: self.view(t) if is_fake(t) else t, (args, kwargs))
        by_name = dict(zip((argument.name for argument in schema.arguments), as_views[0], strict=False)) | as_views[1]
        writes: list[View] = []
        reads: list[View] = []
        for argument in schema.arguments:
            is_written = argument.alias_info is not None and argument.alias_info.is_write
            views = [leaf for leaf in tree_leaves(by_name.get(argument.name)) if isinstance(leaf, View)]
            (writes if is_written else reads).extend(views)
        overwrites = name in _OVERWRITE and len(writes) == 1 and writes[0].is_all
        if not overwrites:
            reads += writes
        made = function(*args, **kwargs)
        known = {view.memory for view in (*reads, *writes)}
        makes = [self.view(tensor) for tensor in tree_leaves(made) if isinstance(tensor, Tensor)]
        makes = [view for view in makes if view.memory not in known]
        if writes or makes or is_random:  # others only view
            self.ops.append(
                Op(
                    function, as_views[0], as_views[1], torch.get_default_dtype(), tuple(reads), tuple(writes),
                    tuple(makes), overwrites=overwrites, is_random=is_random,
                )
            )  # fmt: skip
        return made

    def whole(self, function: Callable[..., Any], tensor: Tensor, *args: Any) -> Tensor:
        """Records a function that fills a tensor, and draws as many random numbers as their values ask for."""
        self.check_seed()
        view = self.view(tensor)
        if not view.is_all:
            raise NotRecorded(f"{function.__name__} fills a part of a tensor")
        self.ops.append(
            Op(
                function, (view, *args), {}, torch.get_default_dtype(), writes=(view,), overwrites=True, is_random=True
            )
        )  # fmt: skip
        return tensor


def replayed(made: Record, seed: int) -> Iterator[tuple[list[str], Tensor]]:
    """(names, values) of every parameter and buffer, in the order in which they are done (step 3).

    A tensor is valid until the next one is asked for. The caller's random state stays as it was.
    """
    wanted: dict[int, list[View]] = {}
    for view in made.names:
        wanted.setdefault(view.memory, []).append(view)
    needed = made.needed(wanted, keeps_order=True)
    last = {view.memory: op for op in needed for view in op.views}
    is_needed = {id(op) for op in needed}
    memories: dict[int, torch.UntypedStorage] = {}
    state = torch.Generator().manual_seed(seed).get_state()
    for op in made.ops:
        if id(op) not in is_needed and not op.is_random:
            continue
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(state)
            op.run(memories if id(op) in is_needed else {})
            state = torch.get_rng_state()
        if id(op) in is_needed:
            for memory in dict.fromkeys(view.memory for view in op.views if last[view.memory] is op):
                for view in wanted.get(memory, ()):
                    yield made.names[view], view.of(memories[memory])
                del memories[memory]
