"""One optimizer step of a pipeline on a rank: forwards and backwards of its stages, in the order of the schedule.

Algorithm, for each action of `Pipeline.order`:
  forward    receive what crosses the cut; call the caller's step, which calls the model and is left at the end of the
             stage; send what crosses the next cut.
  backward   receive the gradients of what was sent, and the weight of this micro-batch's auxiliary losses: one backward
             through outputs and auxiliary losses together; send the gradients of what was received.
Exactly one forward a micro-batch and stage. A message is sent as soon as it is there, and never waited for before it is
known to have arrived. Forward and backward messages, and those over cuts after which the model goes on at an earlier
rank, go through groups of their own, so that within a group all go one way, and ranks that follow a valid order never
wait in a circle. Shapes are sent once for each shape of the inputs: they follow from it. What a rank hands over to
itself is kept, not sent.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from moecompile.errors import MoecompileError
from moecompile.mesh import MeshSpec, Part
from moecompile.nn.padding import padding_of
from moecompile.nn.stages import Passage, StageEnded
from moecompile.ops.baton import Baton, Kept, together
from moecompile.stages import EXCHANGES, Action, Pipeline
from moecompile.torch_private import (
    at_end_of_backward,
    dispatch_modes,
    know_all_sharded,
    root_state,
    tree_leaves,
    under_modes,
)

_DTYPES = (
    torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.bool, torch.uint8,
)  # fmt: skip
_DIMS = 8
Shape = tuple[tuple[int, ...], torch.dtype, bool]
Message = tuple[bool, int, int]
"""(whether forward, the stage that sends it, micro-batch)."""
Work = dist.Work | None


class Witness(Protocol):
    """Who watches the messages of a rank (moecompile.runtime.rehearsal)."""

    def posted(self, work: Work, tensor: Tensor, message: Hashable) -> Work:
        """A tensor that is being sent or received; what is returned is waited for in the place of `work`."""

    def tells(self, stage: int, shapes: list[Shape]) -> None:
        """What this rank tells a stage about what crosses the cut before it."""

    def told(self, stage: int) -> list[Shape] | None:
        """What a stage of this rank is told, where tensors have no values to read it from; None: they have."""


class Wires:
    """Messages between this rank's stages and those before and after them.

    Args:
        mesh, rank: this rank's place. groups: along pp, by (whether forward, `Pipeline.goes_back` of the cut).

    Attributes:
        witness: is shown each message.
    """

    def __init__(
        self, mesh: MeshSpec, rank: int, pipeline: Pipeline, groups: Mapping[tuple[bool, bool], dist.ProcessGroup],
        device: torch.device,
    ) -> None:  # fmt: skip
        self.ranks, self.pipeline, self.device = mesh.group(Part.LAYERS, rank=rank), pipeline, device
        self.groups = groups
        self._handed: dict[tuple[bool, int, Hashable], list[Tensor]] = {}
        self._pending: dict[Hashable, list[tuple[Work, Tensor]]] = {}
        self._shapes: dict[tuple[int, Hashable], list[Shape]] = {}
        self.sent_bytes = 0
        self.witness: Witness | None = None

    def send(self, tensors: Iterable[Tensor], stage: int, message: Hashable = None, *, is_forward: bool) -> None:
        """Sends tensors to the rank of a stage, in order, without waiting. They are kept until `settle(message)`."""
        cut = stage if is_forward else stage + 1
        if self.pipeline.is_local(cut):
            self._handed[is_forward, cut, message] = [tensor.detach() for tensor in tensors]
            return
        group = self._group(cut, is_forward=is_forward)
        to = self.ranks[self.pipeline.rank_of(stage)]
        for tensor in tensors:
            whole = tensor.detach().contiguous()
            self.sent_bytes += whole.numel() * whole.element_size()
            work = self._seen(dist.isend(_bytes(whole), to, group=group), whole, message)
            self._pending.setdefault(message, []).append((work, whole))

    def receive(
        self, shapes: Sequence[Shape], stage: int, message: Hashable = None, *, is_forward: bool
    ) -> list[Tensor]:
        """Receives tensors from the rank of a stage, in order."""
        cut = stage + 1 if is_forward else stage
        if self.pipeline.is_local(cut):
            return self._handed.pop((is_forward, cut, message))
        group = self._group(cut, is_forward=is_forward)
        source = self.ranks[self.pipeline.rank_of(stage)]
        made = [torch.empty(shape, dtype=dtype, device=self.device) for shape, dtype, _ in shapes]
        works = [self._seen(dist.irecv(_bytes(tensor), source, group=group), tensor, message) for tensor in made]
        for work in works:
            if work is not None:
                work.wait()
        return made

    def _seen(self, work: Work, tensor: Tensor, message: Hashable) -> Work:
        return work if self.witness is None else self.witness.posted(work, tensor, message)

    def _group(self, cut: int, *, is_forward: bool) -> dist.ProcessGroup:
        """That of messages over the cut before a stage."""
        return self.groups[is_forward, self.pipeline.goes_back(cut)]

    def send_live(self, tensors: Sequence[Tensor], stage: int, key: Hashable, message: Hashable = None) -> None:
        """Sends what crosses the cut before a stage. key: of the inputs, from which shapes follow."""
        shapes = [(tuple(t.shape), t.dtype, t.requires_grad) for t in tensors]
        known = self._shapes.setdefault((stage, key), shapes)
        if known is shapes and not self.pipeline.is_local(stage):
            if self.witness is not None:
                self.witness.tells(stage, shapes)
            self.send([_header(shapes, self.device)], stage, message, is_forward=True)
        elif known != shapes:
            raise MoecompileError(
                f"what crosses the cut before stage {stage} of the pipeline has other shapes, types or gradients than "
                f"before for inputs of the same shape: {shapes}, not {known}. Shapes must follow from those of the "
                "inputs, and weights must not be frozen or trained anew within a run"
            )
        self.send(tensors, stage, message, is_forward=True)

    def receive_live(self, stage: int, key: Hashable, message: Hashable = None) -> list[Tensor]:
        """Receives what crosses the cut before a stage, as leaves with a gradient where they have one."""
        if (stage, key) not in self._shapes:
            number = sum(len(crossing.places) for crossing in self.pipeline.stages[stage].receives)
            header = ((number, 3 + _DIMS), torch.int64, False)
            (words,) = self.receive([header], stage - 1, message, is_forward=True)
            told = None if self.witness is None else self.witness.told(stage)
            self._shapes[stage, key] = _shapes(words) if told is None else told
        shapes = self._shapes[stage, key]
        tensors = self.receive(shapes, stage - 1, message, is_forward=True)
        return [t.requires_grad_(has_grad) for t, (_, _, has_grad) in zip(tensors, shapes, strict=True)]

    def settle(self, *messages: Hashable) -> None:
        """Waits for messages that are known to have been received, and lets their tensors go."""
        for message in messages:
            for work, _ in self._pending.pop(message, ()):
                if work is not None:
                    work.wait()

    def finish(self) -> None:
        """Waits until all messages are sent."""
        self.settle(*tuple(self._pending))


def _bytes(tensor: Tensor) -> Tensor:
    """The tensor as a back end takes it: gloo has no bool and no bf16 reductions, but sends any bytes."""
    return tensor.reshape(-1).view(torch.uint8) if tensor.numel() else tensor.new_empty(1, dtype=torch.uint8)


def _header(shapes: Sequence[Shape], device: torch.device) -> Tensor:
    words = [
        [_DTYPES.index(dtype), int(has_grad), len(shape), *shape, *[0] * (_DIMS - len(shape))]
        for shape, dtype, has_grad in shapes
    ]
    return torch.tensor(words, dtype=torch.int64, device=device)


def _shapes(words: Tensor) -> list[Shape]:
    return [(tuple(dims[:n]), _DTYPES[dtype], bool(has_grad)) for dtype, has_grad, n, *dims in words.tolist()]


def key_of(batch: Any) -> Hashable:
    """Shapes and dtypes of the tensors of a batch."""
    leaves = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
    return tuple((tuple(leaf.shape), leaf.dtype) for leaf in leaves)


@dataclass
class Computed:
    """The result of the last stage for a micro-batch.

    objective: what backward starts from. weight: of the auxiliary losses of all stages in the objective. result: what
    the caller wants to have back.
    """

    objective: Tensor
    weight: Tensor
    result: Any = None


@dataclass
class _Kept:
    """A forward until its backward."""

    received: list[Tensor]
    sent: tuple[Tensor, ...] = ()
    aux: Tensor | None = None
    computed: Computed | None = None


@dataclass
class _Given:
    """What a backward begins from: the weight of its auxiliary losses, roots and their gradients."""

    kept: _Kept
    weight: Tensor
    roots: list[Tensor]
    grads: list[Tensor | None]


@dataclass
class Steps:
    """What the caller does in a step.

    forward: runs a micro-batch, and returns its result on the last stage. objective: of that result. aux: takes the
    auxiliary losses of the forward of a stage and a micro-batch, which has just run. before: enters what belongs to a
    micro-batch and a stage, in its forward and in its backward. weighed: is told a micro-batch, the weight of its
    auxiliary losses, and the stage.
    """

    forward: Callable[[int], Any]
    objective: Callable[[Any], Computed]
    aux: Callable[[int, int], Tensor | None]
    before: Callable[[Action], AbstractContextManager[None]]
    weighed: Callable[[int, Tensor, int], None]


@dataclass
class _Step:
    """A step, see `Stages.step`. left: backwards by stage. known: of `_known_received`. results: by micro-batch."""

    keys: Sequence[Hashable]
    steps: Steps
    after_backward: Callable[[], None]
    left: dict[int, int]
    known: Mapping[tuple[int, int], Sequence[Hashable]]
    results: dict[int, Any] = field(default_factory=dict)


class _Handed(torch.autograd.Function):
    """The identity, whose result a layer may write to: unlike a leaf, or a view of one."""

    @staticmethod
    def forward(ctx: Any, received: Tensor) -> Tensor:
        return received.detach()  # of the same version: a stage before that has saved it sees the write

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class _Beside:
    """Runs a forward beside a backward (moecompile.ops.baton).

    Both have random numbers, padding masks and a state of FSDP's root of their own, and the settings of this thread.
    """

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.device = device
        self._executor: ThreadPoolExecutor | None = None
        self._kept = [Kept(torch.get_rng_state, torch.set_rng_state)]
        if device.type == "cuda":
            self._kept.append(
                Kept(partial(torch.cuda.get_rng_state, device), partial(torch.cuda.set_rng_state, device=device))
            )
        if (padding := padding_of(model)) is not None:
            self._kept.append(Kept(lambda: padding.now, partial(setattr, padding, "now")))
        if isinstance(model, FSDPModule):
            self._kept.append(Kept(*root_state(model)))

    def run(self, forward: Callable[[], None], backward: Callable[[Baton], None]) -> None:
        """Runs both, forward first."""
        if self._executor is None:
            self._executor = ThreadPoolExecutor(1, thread_name_prefix="backward")
        is_cast, dtype = torch.is_autocast_enabled(self.device.type), torch.get_autocast_dtype(self.device.type)
        modes = dispatch_modes()

        def in_thread(baton: Baton) -> None:
            with under_modes(modes), torch.autocast(self.device.type, dtype, enabled=is_cast):
                backward(baton)

        together(lambda _: forward(), in_thread, self._executor, self._kept)


class Stages:
    """The stages of this rank.

    Args:
        model: cut into stages and sharded. reduces_each, gathers_once: `Plan.reduce` and `Plan.gather`.
    """

    def __init__(
        self, model: nn.Module, passage: Passage, wires: Wires, index: int, *, reduces_each: bool, gathers_once: bool
    ) -> None:
        self.model, self.passage, self.wires, self.index = model, passage, wires, index
        self.reduces_each, self.gathers_once = reduces_each, gathers_once
        own = self.own = passage.pipeline.stages_of(index)
        self._beside = _Beside(model, wires.device)
        self.of_root = [stage for stage in own if passage.pipeline.stages[stage].has_root]
        self.kept: dict[tuple[int, int], _Kept] = {}
        self._runs: dict[int, bool] = {}  # whether a stage has a backward: not if all of it and before is frozen

    @property
    def pipeline(self) -> Pipeline:
        """Of the plan."""
        return self.passage.pipeline

    @property
    def has_loss(self) -> bool:
        """Whether the last stage is on this rank."""
        return self.index == self.pipeline.rank_with_loss

    def step(self, keys: Sequence[Hashable], steps: Steps, after_backward: Callable[[], None]) -> list[Any]:
        """One optimizer step over micro-batches with these keys; returns their results, on the last stage."""
        self._know_sharded()
        run = _Step(keys, steps, after_backward, dict.fromkeys(self.own, len(keys)), self._known_received(len(keys)))
        for stage in self.own:  # at the end of any backward, FSDP reshards what it may of the whole model
            for module, _ in self._sharded(stage):
                module.set_reshard_after_backward(not self.gathers_once, recurse=False)
        for actions in self.pipeline.groups(self.index, len(keys)):
            if len(actions) == 2 and self.pipeline.overlap == EXCHANGES:
                ahead, back = actions
                with self._backward_of(back, run) as given:
                    kept = self._receive_forward(ahead, keys[ahead.micro_batch])
                    self._beside.run(
                        partial(self._forward, ahead, kept, run), partial(self._backward, back, given, steps)
                    )
                continue
            for action in actions:
                if action.is_forward:
                    kept = self._receive_forward(action, keys[action.micro_batch])
                    self._forward(action, kept, run)
                else:
                    with self._backward_of(action, run) as given:
                        self._backward(action, given, steps)
        self.wires.finish()
        assert not self.kept
        return [run.results.get(number) for number in range(len(keys))]

    def _known_received(self, micro_batches: int) -> dict[tuple[int, int], list[Hashable]]:
        """Forward of a micro-batch in a stage of ours -> gradients that the stage before must have received by then.

        It has sent this micro-batch after the backwards that come before in its order.
        """
        known: dict[tuple[int, int], list[Hashable]] = {}
        for stage in self.pipeline.stages_of(self.index):
            done: list[Hashable] = []
            for action in self.pipeline.order(self.pipeline.rank_of(stage - 1), micro_batches) if stage else ():
                if action.stage == stage - 1 and action.is_forward:
                    known[stage, action.micro_batch], done = done, []
                elif action.stage == stage - 1:
                    done.append((False, stage, action.micro_batch))
        return known

    def _receive_forward(self, action: Action, key: Hashable) -> _Kept:
        stage, number = action.stage, action.micro_batch
        received = self.wires.receive_live(stage, key, (True, stage - 1, number)) if stage else []
        kept = self.kept[stage, number] = _Kept(received)
        return kept

    def _forward(self, action: Action, kept: _Kept, run: _Step) -> None:
        stage, number, steps = action.stage, action.micro_batch, run.steps
        handed = [_Handed.apply(tensor) for tensor in kept.received]  # type: ignore[no-untyped-call]
        with steps.before(action), self.passage.running(self.model, stage, handed):
            is_last = self.passage.is_last
            try:
                output = steps.forward(number)
            except StageEnded as ended:
                kept.sent = ended.sent
            else:
                if not is_last:
                    raise MoecompileError("training_step has not called the model, which the next stages wait for")
                kept.computed = steps.objective(output)
        kept.aux = steps.aux(stage, number)
        roots = (*kept.sent, kept.aux, None if kept.computed is None else kept.computed.objective)
        self._runs[stage] = any(root is not None and root.requires_grad for root in roots)
        if kept.computed is None:
            self.wires.send_live(kept.sent, stage + 1, run.keys[number], (True, stage, number))
        else:
            run.results[number] = kept.computed.result
        self.wires.settle(*run.known.get((stage, number), ()))

    @contextmanager
    def _backward_of(self, action: Action, run: _Step) -> Iterator[_Given]:
        """Around a backward: what it begins from, and how FSDP reduces and reshards."""
        run.left[action.stage] -= 1
        left = {stage: run.left[stage] for stage in self._running()}  # each has run forward by now
        is_last, is_end = not run.left[action.stage], not any(left.values())
        is_last_of_root = is_last and not any(left.get(stage) for stage in self.of_root)
        with self._synced(action.stage, is_last=is_last, is_last_of_root=is_last_of_root, is_end=is_end):
            yield self._receive_backward(action)
        if any(run.left.values()):
            run.after_backward()

    def _running(self) -> list[int]:
        """The stages of this rank whose backwards reach a weight: in others FSDP does nothing."""
        return [stage for stage in self.own if self._runs.get(stage, True)]

    def _receive_backward(self, action: Action) -> _Given:
        stage, number = action.stage, action.micro_batch
        kept = self.kept.pop((stage, number))
        if kept.computed is not None:
            return _Given(kept, kept.computed.weight, [kept.computed.objective], [None])
        outputs: list[Tensor] = [tensor for tensor in kept.sent if tensor.requires_grad]
        shapes: list[Shape] = [((), torch.float64, False), *((tuple(t.shape), t.dtype, True) for t in outputs)]
        weight, *grads = self.wires.receive(shapes, stage + 1, (False, stage + 1, number), is_forward=False)
        self.wires.settle((True, stage, number))
        return _Given(kept, weight, outputs, [*grads])

    def _backward(self, action: Action, given: _Given, steps: Steps, baton: Baton | None = None) -> None:
        stage, number, kept, weight = action.stage, action.micro_batch, given.kept, given.weight
        roots, grads = given.roots, given.grads
        if kept.aux is not None:
            roots, grads = [*roots, kept.aux], [*grads, weight.to(kept.aux)]
        steps.weighed(number, weight, stage)
        with steps.before(action):
            if pairs := [(root, grad) for root, grad in zip(roots, grads, strict=True) if root.requires_grad]:
                roots = [root for root, _ in pairs]
                if baton is not None:  # what FSDP does at the end of a backward is about the forward's weights too
                    roots = at_end_of_backward(roots, baton.await_other)
                torch.autograd.backward(roots, [grad for _, grad in pairs])
        if stage:
            leaves = [tensor for tensor in kept.received if tensor.requires_grad]
            back = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
            self.wires.send([weight.to(torch.float64), *back], stage - 1, (False, stage, number), is_forward=False)

    @contextmanager
    def _synced(self, stage: int, *, is_last: bool, is_last_of_root: bool, is_end: bool) -> Iterator[None]:
        """FSDP reduces gradients in the last backward of a stage, those of the root in that of the stages that have its
        weights: embedding, norm, head. The last backward of the rank reshards the root, and with `gathers_once` no
        other; else those of the rank's first stage, which is the one that ends it.

        Replicas' sums wait until then too. Those of a root of two stages do not if each backward reduces: FSDP would
        add up what it keeps of different weights.
        """
        if isinstance(self.model, FSDPModule) and len(self.own) > 1:
            self.model.set_modules_to_backward_prefetch(self._layers(stage)[-1:])
        for module, is_root in self._sharded(stage):
            last = is_last_of_root and stage in self.of_root if is_root else is_last
            module.set_requires_gradient_sync(last or self.reduces_each, recurse=False)
            at_once = is_root and self.reduces_each and len(self.of_root) > 1
            module.set_requires_all_reduce(last or at_once, recurse=False)
            ends = is_end if is_root else is_last
            each = not self.gathers_once and (not is_root or [stage] == self._running()[:1])
            module.set_reshard_after_backward(ends or each, recurse=False)
        yield

    def _know_sharded(self) -> None:
        """Before the first forward, in which the layers of one stage alone are there.

        In backward FSDP gathers early what came before in forward: with several stages, the layer before in its own.
        """
        if not isinstance(self.model, FSDPModule):
            return
        know_all_sharded(self.model)
        for stage in self.own if len(self.own) > 1 else ():
            layers = self._layers(stage)
            for before, layer in zip([*layers[:1], *layers], layers, strict=False):
                layer.set_modules_to_backward_prefetch([before])

    def _layers(self, stage: int) -> list[FSDPModule]:
        return [module for module, is_root in self._sharded(stage) if not is_root]

    def modules_of(self, stage: int) -> list[nn.Module]:
        """The units of a stage of this rank."""
        return [self.passage.present[unit.path] for unit in self.pipeline.stages[stage].units]

    def _sharded(self, stage: int) -> Iterator[tuple[FSDPModule, bool]]:
        if isinstance(self.model, FSDPModule):
            yield self.model, True
        for unit in self.modules_of(stage):
            for module in unit.modules():
                if isinstance(module, FSDPModule):
                    yield module, False

    # -- without gradients ------------------------------------------------------------------------------------------

    def evaluate(self, key: Hashable, forward: Callable[[], Any]) -> Any:
        """One micro-batch through all stages of this rank; returns its result, on the last stage."""
        self._know_sharded()
        result, key = None, ("without gradients", key)
        for stage in self.pipeline.stages_of(self.index):
            received = self.wires.receive_live(stage, key) if stage else []
            with self.passage.running(self.model, stage, received):
                is_last = self.passage.is_last
                try:
                    result = forward()
                except StageEnded as ended:
                    self.wires.send_live(ended.sent, stage + 1, key)
                else:
                    if not is_last:
                        raise MoecompileError("the step has not called the model, which the next stages wait for")
        self.wires.finish()
        return result
