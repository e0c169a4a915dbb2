"""One rank's optimizer step on a mesh of any size, in one process: nothing is computed and nothing is sent.

Tensors have shapes and no values, the process groups have ranks and no connections. All else is what trains:
Lightning's Trainer, the strategy, FSDP2, the optimizer, the compiled model. Algorithm:
  1. Shard the model on the meta device, as every rank does.                               -> the strategy's setup
  2. From its shards on, all tensors are fake. Sizes that values decide (how many rows come with an exchange) are those
     of a load.                                                                            -> ops/sizes.py, `Fake`
  3. Watch every op: what it allocates, until that is freed; and each collective, in order.                 -> `Watch`
The same watch can look at a rank that really trains.

For a mesh of GPUs, attention is the operator that keeps no matrix of scores. What is beside the tensors of the program
is not seen: gaps of an allocator, memory of libraries, and streams, by which FSDP on a GPU gathers a layer while the
one before still computes.
"""

from __future__ import annotations

import dataclasses
import os
import weakref
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, fx, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from moecompile.capture.record import one_sequence_in_a_row
from moecompile.mesh import MeshSpec
from moecompile.ops.baton import landed
from moecompile.ops.exchange import group_of
from moecompile.ops.lookups import bytes_given
from moecompile.ops.sizes import Load, meanwhile_of_last, under
from moecompile.passes.base import on_an_axis
from moecompile.passes.context_parallel import attention_of_a_gpu
from moecompile.pipeline import plan_of
from moecompile.plan import EXCHANGE_OPS, EXCHANGES, Plan
from moecompile.planner.lookups import different
from moecompile.planner.traffic import assignments, rows_given
from moecompile.row_formats import ROW_FORMATS
from moecompile.runtime.even_batches import made_even
from moecompile.runtime.messages import MESSAGES
from moecompile.runtime.module import LanguageModule
from moecompile.runtime.pipeline import Shape, Wires, Work
from moecompile.runtime.strategy import ExpertParallelStrategy
from moecompile.runtime.training import make_trainer
from moecompile.schema import Config, accumulation_steps
from moecompile.torch_private import (
    TorchDispatchMode,
    fake_values,
    gathered_bytes,
    local_part,
    process_group_of,
    scalar_of,
    tree_leaves,
    watch_resizes,
    whole_shapes_unseen,
)

# -- what is seen of a rank -------------------------------------------------------------------------------------------

# Of the ops of moecompile with an axis, those that communicate; beside the exchanges, with one argument that travels.
_SENDING = (*EXCHANGE_OPS, "gradient_start", "join_tokens", "gather_slices", "sum_ranks", "join_columns",
            "exchange_dims", "join_positions")  # fmt: skip
_LANDING = ("all_to_all", "all_gather", "reduce_scatter", "all_to_all_wait", "gradient_wait")  # wait for rows
_INPUTS = {name + end: row.inputs for name, row in EXCHANGES.items() for end in ("", "_start")}
_GIVEN = ("input", "inputs", "input_tensor", "input_tensors", "tensors")  # arguments of c10d that this rank gives
_SILENT = ("barrier",)
_NO_PURPOSE = ("default_pg", "undefined")  # torch's words
OBJECTS = "objects"
"""Python objects of all ranks of a group, as a collective of a rehearsal."""


@dataclass(frozen=True, kw_only=True)
class Sent:
    """A collective, or a message to or from another stage of a pipeline.

    axis: mesh axis of its group, or its purpose. bytes: of what this rank gives to it, with its own part; of a message
    that is received, what comes. group: its name, if ranks of other stages are rehearsed that are in it; together: how
    many of the pipeline are. peer: of a message, place along pp of the other rank; form: dtype and shape of its tensor;
    message: (whether forward, the stage that sends it, micro-batch).
    """

    moment: str
    op: str
    axis: str
    ranks: int
    bytes: int
    group: str = ""
    together: int = 0
    peer: int = -1
    form: str = ""
    message: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Moment:
    """Bytes of all tensors of this rank: the most within a moment of the step, and at its end."""

    name: str
    peak: int
    end: int


@dataclass(kw_only=True)
class Seen:
    """What was seen. start: bytes before the first micro-batch. waits: of messages, which alone are not waited for at
    once: (entries of `sent` so far, which of them is waited for).
    """

    start: int = 0
    moments: list[Moment] = field(default_factory=list)
    sent: list[Sent] = field(default_factory=list)
    waits: list[tuple[int, int]] = field(default_factory=list)


class Watch(TorchDispatchMode):
    """Sees every op of this process while it is active; `begin` begins a moment, in which collectives are kept.

    Args:
        beside: global ranks of the pipeline that is rehearsed.
    """

    def __init__(self, beside: Sequence[int] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen = Seen()
        self._beside, self._shared = set(beside), dict[str, int]()
        self._now = ""
        self._live = self._peak = 0
        self._sizes: dict[int, int] = {}
        self._watched: dict[int, weakref.ref[torch.UntypedStorage]] = {}
        self._patches = ExitStack()

    def __enter__(self) -> Watch:
        self._patches.enter_context(whole_shapes_unseen())
        self._patches.enter_context(watch_resizes(self._resized))
        self._patches.enter_context(self._objects())
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        self._patches.close()

    def begin(self, name: str) -> None:
        """Ends the moment before, and begins one; empty: nothing is kept until the next."""
        if self._now:
            self.seen.moments.append(Moment(name=self._now, peak=self._peak, end=self._live))
        elif not self.seen.moments:
            self.seen.start = self._live
        self._now, self._peak = name, self._live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """torch's. Of a DTensor, the ops on its shard are seen."""
        if any(issubclass(each, DTensor) for each in types):
            return NotImplemented
        if self._now and func.namespace in ("moecompile", "c10d"):
            self._keep(func, args, kwargs or {})
        result, (before, beside) = self.run(func, args, kwargs or {}), meanwhile_of_last()
        self._peak = max(self._peak, self._live + before)
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.add(leaf)
        self._peak = max(self._peak, self._live + beside)
        return result

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Runs an op."""
        return func(*args, **kwargs)

    def add(self, tensor: Tensor) -> None:
        """Counts the memory of a tensor until it is freed."""
        storage = tensor.untyped_storage()
        key = id(storage)
        if key not in self._sizes:
            self._sizes[key] = 0
            self._watched[key] = weakref.ref(storage, lambda _: self._freed(key))
            self._resized(storage)

    def _resized(self, storage: torch.UntypedStorage) -> None:
        key = id(storage)
        if key in self._sizes:
            size = storage.nbytes()
            self._live += size - self._sizes[key]
            self._sizes[key] = size
            self._peak = max(self._peak, self._live)

    def _freed(self, key: int) -> None:
        self._live -= self._sizes.pop(key, 0)
        self._watched.pop(key, None)

    def _keep(self, func: Any, args: Any, kwargs: Any) -> None:
        name = func._opname
        if func.namespace == "moecompile":
            if (of_lookup := bytes_given(name, args)) is not None:
                self._keep_one(name, group_of(args[-1]), of_lookup)
            if name not in _SENDING:
                return
            group, given, peer = group_of(args[-1]), args[: _INPUTS.get(name, 1)], -1
        else:
            named = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False))
            found = process_group_of(named.get("process_group"))
            if name in _SILENT or found is None:
                return
            group, given = found, [named.get(argument) for argument in _GIVEN]
            peer = cast(int, named.get("dst", named.get("src", -1)))
        narrow, given = kwargs.get("narrow"), [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]
        sizes = (
            rows.shape[0] * ROW_FORMATS[narrow].row_bytes(rows.shape[1]) if narrow else rows.nbytes for rows in given
        )
        size = sum(sizes)
        self._keep_one(name.strip("_"), group, size, peer)

    def _keep_one(self, op: str, group: ProcessGroup, size: int, peer: int = -1) -> None:
        name = str(group.group_name)
        if name not in self._shared:
            self._shared[name] = len(self._beside.intersection(dist.get_process_group_ranks(group)))
        together = self._shared[name]
        self.seen.sent.append(
            Sent(
                moment=self._now, op=op, axis=axis_of(group), ranks=group.size(), bytes=size,
                group=name if together > 1 else "", together=together, peer=peer if op in MESSAGES else -1,
            )
        )  # fmt: skip

    @contextmanager
    def _objects(self) -> Iterator[None]:
        """A gather of objects is one collective, whatever it is made of."""
        whole = dist.all_gather_object

        def gather(object_list: Any, obj: Any, group: Any = None) -> None:
            over = dist.group.WORLD if group is None else group
            assert over is not None
            if self._now:
                self._keep_one(OBJECTS, over, 0)
            now, self._now = self._now, ""
            try:
                self.gather(whole, object_list, obj, over)
            finally:
                self._now = now

        dist.all_gather_object = gather
        try:
            yield
        finally:
            dist.all_gather_object = whole

    def gather(self, whole: Callable[..., None], found: list[Any], mine: Any, group: ProcessGroup) -> None:
        """Gathers objects."""
        whole(found, mine, group=group)

    # -- messages between stages: `Witness` of runtime/pipeline.py ---------------------------------------------------

    def posted(self, work: Work, tensor: Tensor, message: Hashable) -> Work:
        """Adds to the last operation, which this watch has seen, what it is about."""
        if not self._now:
            return work
        last = self.seen.sent[-1]
        assert last.op in MESSAGES and last.bytes == max(tensor.nbytes, 1)
        form = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
        of = tuple(map(int, message)) if isinstance(message, tuple) else ()
        self.seen.sent[-1] = dataclasses.replace(last, form=form, message=of)
        return cast(Work, _Waited(work, self.seen, len(self.seen.sent) - 1))

    def tells(self, stage: int, shapes: list[Shape]) -> None:
        """Nothing: tensors have values."""

    def told(self, stage: int) -> list[Shape] | None:
        """None: tensors have values."""
        return None


@dataclass
class _Waited:
    """A message, of which it is noted when it is waited for."""

    work: Work
    seen: Seen
    index: int

    def wait(self) -> None:
        """Waits for it."""
        self.seen.waits.append((len(self.seen.sent), self.index))
        if self.work is not None:
            self.work.wait()


def axis_of(group: ProcessGroup) -> str:
    """The mesh axis of a group, or its purpose; `all` for the group of all ranks, whatever else it is."""
    purpose = str(group.group_desc)
    return "all" if purpose in _NO_PURPOSE else purpose.removeprefix("mesh_")


class Moments(Callback):
    """Tells a watch where the step is: forward and backward of each micro-batch, and the optimizer's step. It ends with
    the first optimizer step. The forwards and backwards of a pipeline are one moment, the sums of gradients after them
    another.
    """

    def __init__(self, watch: Watch) -> None:
        self.watch, self.number, self.has_stages = watch, 0, False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning's hook. Weights that are older than the watch count too."""
        if (wires := wires_of(trainer)) is not None:
            self.has_stages, wires.witness = True, self.watch
        for tensor in (*pl_module.parameters(), *pl_module.buffers()):
            self.watch.add(local_part(tensor))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Lightning's hook."""
        if trainer.global_step == 0:
            self.number += 1
            if not self.has_stages:
                self.watch.begin(f"forward {self.number}")
            elif self.number == 1:
                self.watch.begin(PIPELINE)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Lightning's hook."""
        if trainer.global_step == 0 and not self.has_stages:
            self.watch.begin(f"backward {self.number}")
        elif trainer.global_step == 0 and self.number == trainer.accumulate_grad_batches:
            self.watch.begin(SUMS)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        """Lightning's hook."""
        if trainer.global_step == 0:
            self.watch.begin(STEP)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Lightning's hook."""
        if trainer.global_step == 1:
            self.watch.begin("")


PIPELINE, SUMS, STEP = "pipeline", "sums", "optimizer step"

# -- a rank that is not there -----------------------------------------------------------------------------------------


class Post(Protocol):
    """How the rehearsed ranks of a pipeline tell each other what crosses a cut."""

    def tells(self, stage: int, shapes: list[Shape]) -> None:
        """`Witness.tells`."""

    def told(self, stage: int) -> list[Shape] | None:
        """`Witness.told`."""


class Fake(Watch):
    """A watch over fake tensors, in which a value that the program reads is zero (a float: one), and objects of other
    ranks are those of this one.
    """

    def __init__(self, beside: Sequence[int], post: Post | None) -> None:
        super().__init__(beside)
        self.post = post

    def gather(self, whole: Callable[..., None], found: list[Any], mine: Any, group: ProcessGroup) -> None:
        """Gathers objects."""
        found[:] = [mine] * len(found)

    def tells(self, stage: int, shapes: list[Shape]) -> None:
        """Tells the rank of a stage, which reads no values either."""
        if self.post is not None:
            self.post.tells(stage, shapes)

    def told(self, stage: int) -> list[Shape] | None:
        """What the rank of the stage before tells."""
        return None if self.post is None else self.post.told(stage)

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Runs an op."""
        if func is torch.ops.aten.nonzero.default:
            return args[0].new_empty((0, args[0].ndim), dtype=torch.int64)
        if not scalar_of(func):
            result = func(*args, **kwargs)
            if func.namespace == "moecompile" and func._opname in _LANDING:
                landed(None)
            return result
        dtype = args[0].dtype
        return 1.0 if dtype.is_floating_point else False if dtype is torch.bool else 0


@contextmanager
def variables_of(rank: int, mesh: MeshSpec) -> Iterator[None]:
    """The environment of a rank, which Lightning reads."""
    per_node = mesh.ranks_per_node
    values = {
        "RANK": rank, "WORLD_SIZE": mesh.world_size, "LOCAL_RANK": rank % per_node, "LOCAL_WORLD_SIZE": per_node,
        "GROUP_RANK": rank // per_node, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1, "TORCHELASTIC_RUN_ID": "fake",
    }  # fmt: skip
    before = {name: os.environ.get(name) for name in values}
    os.environ |= {name: str(value) for name, value in values.items()}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """What was seen of one rank. weights: bytes of its shards, and of what FSDP gathers at most, which is `gathered`.
    optimizer: of its state.
    """

    rank: int
    weights: int
    gathered: int
    optimizer: int
    seen: Seen


@dataclass(kw_only=True)
class _Batches:
    """Micro-batches of full sequences, as fake as what is active."""

    names: Sequence[str]
    number: int
    shape: tuple[int, int]

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return iter([{name: torch.zeros(self.shape, dtype=torch.int64) for name in self.names}] * self.number)


def rehearse(
    model: nn.Module, plan: Plan, config: Config, rank: int, load: Load, run_dir: Path, *,
    materialize: Callable[[torch.device], None], callbacks: Sequence[Callback] = (), beside: Sequence[int] = (),
    post: Post | None = None,
) -> Rehearsal:  # fmt: skip
    """One optimizer step of rank `rank`, which this process is from now on; `fake_group` has made it that rank.

    Args:
        model: compiled by `plan`, on the meta device. config: its global batch is that of the rehearsal. load: its
            `received` is filled in, with `fullest` for the exchanges between ranks of a node.
        materialize: allocates the shards on a device. callbacks: further ones, of the Trainer. beside: global ranks of
            the pipeline that is rehearsed; post: what joins them.
    """
    mesh, watch = plan.mesh, Fake(beside, post)
    with ExitStack() as stack:
        stack.enter_context(variables_of(rank, mesh))
        if mesh.device != "cpu":
            stack.enter_context(attention_of_a_gpu(model))
        stack.enter_context(one_sequence_in_a_row())

        def begin(device: torch.device) -> None:  # Step 2
            load.received = _received(model, load)
            for context in (fake_values(), watch, under(load)):
                stack.enter_context(context)
            materialize(device)

        module = LanguageModule(model, config.optimizer, config.trainer.max_steps)
        here = dataclasses.replace(plan, mesh=dataclasses.replace(mesh, device="cpu"))
        trainer = make_trainer(config, here, run_dir, [Moments(watch), *callbacks], loggers=[], materialize=begin)
        shape = (config.data.micro_batch_size, config.data.seq_len)
        number = accumulation_steps(config, mesh)
        trainer.fit(module, made_even(_Batches(names=BATCH, number=number, shape=shape), number))
        return seen_of(trainer, watch, rank)


BATCH = ("input_ids", "labels")


def wires_of(trainer: Trainer) -> Wires | None:
    """The messages of the rank that a trainer trains; None without a pipeline."""
    stages = trainer.strategy._stages if isinstance(trainer.strategy, ExpertParallelStrategy) else None
    return None if stages is None else stages.stages.wires


def seen_of(trainer: Trainer, watch: Watch, rank: int) -> Rehearsal:
    """What a watch has seen of the rank that a trainer has trained."""
    assert trainer.strategy.model is not None
    kept = [value for optimizer in trainer.optimizers for state in optimizer.state.values() for value in state.values()]
    optimizer = sum(local_part(value).nbytes for value in kept if isinstance(value, Tensor))
    gathered = gathered_bytes(trainer.strategy.model, at_once=plan_of(trainer.strategy.model).gather == "step")
    weights = watch.seen.start + gathered
    return Rehearsal(rank=rank, weights=weights, gathered=gathered, optimizer=optimizer, seen=watch.seen)


def _received(model: nn.Module, load: Load) -> dict[str, float]:
    """`Load.received`: rows reach the nodes of their experts evenly, and the ranks of a node as the load says."""
    graphs = [module for module in model.modules() if isinstance(module, fx.GraphModule)]
    names = {str(node.args[-1]) for graph in graphs for node in on_an_axis(graph)}
    return {name: 1.0 if axis_of(group_of(name)) == "ep_inter" else load.fullest for name in names}


def load_of(plan: Plan, fullest: float) -> Load:
    """The load in which this rank's experts have `fullest` times the mean rows, as the planner counts them.

    Where layers differ, with the mean of those that have as many experts.
    """
    sent: defaultdict[tuple[int, int], list[float]] = defaultdict(list)
    assigned: defaultdict[int, list[float]] = defaultdict(list)
    for layer in plan.layers:
        placement, dispatch = layer.placement, layer.dispatch
        experts, nodes = placement.num_experts, placement.nodes
        if dispatch.row.for_backends:  # a token's row is sent once to a part
            given = rows_given(dispatch.kind, placement, layer.routing, plan.mesh)
            for part, rows in given.items():
                if part == "_intra":
                    sent[experts // nodes, placement.ep // nodes].append(rows / given.get("_inter", 1.0))
                else:
                    sent[experts, nodes if part else placement.ep].append(rows)
        chosen = experts if layer.routing.choice == "expert" else layer.routing.top_k
        assigned[experts].append(assignments(placement, layer.routing) / chosen)
    return Load(
        sent={key: fmean(values) for key, values in sent.items()},
        assigned={key: fmean(values) for key, values in assigned.items()}, fullest=fullest, different=different,
        on_gpu=plan.mesh.device != "cpu",
    )  # fmt: skip
