"""`moecompile.certify`: whether a parallel model computes what one process does, whoever made it parallel.

Algorithm:
  1. Every rank builds the model, whose weights are then moved until each entry has a value of its own (entries.py).
     The user's function makes it parallel. What a rank holds is found again by value, so neither names nor shards have
     to be told; entries that no rank has, or one rank twice, are found too.
     Rates of dropout become 0 on both sides (dropout.py).
  2. All ranks train some steps: several micro-batches each, with unequal numbers of targets; in the last of several
     steps one rank has none. Rank 0 runs the micro-batches of all ranks in one process. The same again with
     recomputation.
  3. Rank 0 compares each entry on each rank: losses, gradients of weights and inputs, norm, counts, weights after the
     last step. Of the worst, diagnosis.py says the factor and the axis.
  4. If something differs, both sides run again with other random numbers. A side that differs from itself cannot be
     compared, which is the verdict then.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from rich.console import Console
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from moecompile import hub_kernels
from moecompile.atomic import replacing, write_text
from moecompile.errors import ArgumentError, UserError, VerificationFailed
from moecompile.report.console import print_checks
from moecompile.runtime.data import IGNORED
from moecompile.runtime.ranks import started_ranks, worker_variables
from moecompile.torch_private import init_process_group, local_part, tree_leaves, tree_map_only
from moecompile.verify.checks import ROUNDING, TOLERANCES, Check, Tolerance, counted, explained, with_room
from moecompile.verify.diagnosis import Axes, Difference, difference
from moecompile.verify.dropout import without_dropout
from moecompile.verify.entries import Entries, Places, finite, local_gradient, make_distinct
from moecompile.version import versions

Loss = Callable[[nn.Module, Any], Tensor]
_CLIP = 1.0
_ERROR = "error"
"""The file in which a rank leaves a mistake that its user can correct."""
_WRAPPERS = {"module", "_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}


@dataclass(kw_only=True)
class Parallel:
    """A parallel model, with what its users do in a step beside `loss(...).backward()`; `parallelize` may return one.

    Also one process may return it from `build`, for example to move a bias.

    module: what a rank runs.
    finish: called after the last backward of a step with the number of targets of this rank's micro-batches; reduces
        what is not reduced yet, and moves biases.
    clip: clips to a norm, and returns the norm before; None: nothing is clipped, and the norm is that of torch's
        `clip_grad_norm_`, where it can (one mesh for all weights).
    optimizer: makes it from the module; None: AdamW.
    gradients: name of the parameter -> its gradient, where it is not in `.grad`.
    counts: further tensors to compare, by name, such as numbers of tokens per expert over all ranks.
    """

    module: nn.Module
    finish: Callable[[int], Any] | None = None
    clip: Callable[[float], Any] | None = None
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] | None = None
    gradients: Callable[[], Mapping[str, Tensor | None]] | None = None
    counts: Callable[[], Mapping[str, Tensor]] | None = None


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something that differs. check: the name of its check; name: of the weight, buffer or micro-batch."""

    check: str
    name: str
    difference: Difference

    def __str__(self) -> str:
        return f"{self.name}: {self.difference.text}"


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """What `certify` found. It prints as a table.

    findings: everything that differs, the largest error of a check first. tried, not_tried: conditions under which the
    comparison was made; those that it does not cover, and what could not be compared. not_comparable: the side that
    computes something else each time it runs, and what; of values there are no checks and findings then.
    """

    mesh: Mapping[str, int]
    dtype: str
    checks: Sequence[Check]
    findings: Sequence[Finding]
    tried: Sequence[str]
    not_tried: Sequence[str]
    versions: Mapping[str, str | None]
    not_comparable: str = ""

    @property
    def passed(self) -> bool:
        """Whether values could be compared, and every check passed."""
        return not self.not_comparable and all(check.passed for check in self.checks)

    @property
    def verdict(self) -> str:
        """In one line, with what it does not cover."""
        said = "passed" if self.passed else "FAILED"
        if self.not_comparable:
            wrong = any(not check.passed for check in self.checks)
            said = f"{'FAILED, and values are ' * wrong}not comparable: {self.not_comparable}"
        left_out = f"; not tried: {'; '.join(self.not_tried)}" if self.not_tried else ""
        return f"{_shown(self.mesh)}, {self.dtype}: {said}{left_out}"

    def check(self) -> Certificate:
        """Returns itself.

        Raises:
            VerificationFailed: a check failed, or values could not be compared.
        """
        if not self.passed:
            wrong = [f"{each.name} ({each.where})" for each in self.checks if not each.passed]
            wrong += [f"not comparable: {self.not_comparable}"] if self.not_comparable else []
            raise VerificationFailed(_shown(self.mesh), wrong)
        return self

    def save(self, path: str | Path) -> None:
        """Writes it as JSON."""
        fields = {
            "passed": self.passed, "verdict": self.verdict, "not_comparable": self.not_comparable,
            "mesh": dict(self.mesh), "dtype": self.dtype, "tried": list(self.tried),
            "not_tried": list(self.not_tried), "versions": dict(self.versions),
            "checks": [check.row() for check in self.checks],
            "findings": [
                {"check": f.check, "name": f.name, "error": f.difference.error, "factor": f.difference.factor,
                 "axes": list(f.difference.axes), "text": f.difference.text}
                for f in self.findings
            ],
        }  # fmt: skip
        write_text(Path(path), json.dumps(fields, indent=2) + "\n")

    def __str__(self) -> str:
        text = StringIO()
        console = Console(file=text, width=160)
        print_checks([check.row() for check in self.checks], console)
        return f"{text.getvalue()}\n{self.verdict}\ntried: {', '.join(self.tried)}\n"


def _shown(mesh: Mapping[str, int]) -> str:
    return " x ".join(f"{axis} {size}" for axis, size in mesh.items())


def certify(
    build: Callable[[], nn.Module | Parallel],
    parallelize: Callable[[nn.Module, DeviceMesh], nn.Module | Parallel],
    batch: Callable[[int], Any],
    mesh: Mapping[str, int],
    *,
    loss: Loss | None = None,
    reduction: str = "mean",
    same_batch: Sequence[str] = (),
    steps: int = 2,
    accumulation: int = 2,
    recompute: bool = True,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    timeout_s: float = 120,
) -> Certificate:
    """Compares N ranks with one process: every gradient, norm, count and weight of a few optimizer steps.

    It starts the ranks (so the functions must be importable, and a script needs `if __name__ == "__main__":`), or uses
    those that torchrun or a process group has started already.

    Args:
        build: the whole model, on the CPU. It is called on every rank with the same random numbers.
        parallelize: makes it parallel: (model with other values in its weights, device mesh) -> what this rank trains.
        batch: number of a micro-batch -> what `loss` gets. With "labels" among its keys, some of them are masked, so
            that micro-batches have unequally many targets, and in the last of several steps one rank has none;
            otherwise that is up to `batch`.
        mesh: axis -> size.
        loss: (module, batch) -> sum of the losses of the targets, a scalar. None: cross entropy of the next token of
            `module(**batch).logits`.
        reduction: what finished gradients are: "mean", the sum over all micro-batches divided by the number of ranks
            with batches of their own (DDP, FSDP2); "sum"; "targets", the sum divided by the targets of all ranks.
        same_batch: axes whose ranks get the same micro-batches (tensor parallelism).
        steps: optimizer steps. A fault that begins later is not seen.
        accumulation: micro-batches of a rank in each step.
        recompute: whether everything is repeated with activation checkpointing of the layers.
        dtype: of weights. float64 tells a wrong factor from rounding best; float32 where a kernel has no other.
        timeout_s: of a collective.

    Returns:
        the certificate, on every rank.

    Raises:
        ArgumentError: an argument that breaks a rule.
    """
    _check_functions({"build": build, "parallelize": parallelize, "batch": batch, "loss": loss or next_token_loss})
    _check_arguments(mesh, reduction, same_batch, dtype, steps, accumulation, timeout_s)
    job = _Job(
        build=build, parallelize=parallelize, batch=batch, axes=Axes(dict(mesh)), loss=loss or next_token_loss,
        reduction=reduction, same_batch=tuple(same_batch), steps=steps, accumulation=accumulation, recompute=recompute,
        dtype=dtype, seed=seed,
    )  # fmt: skip
    if dist.is_initialized():
        return _in_place(job)
    if started_ranks() is not None:
        init_process_group("gloo", timeout=timedelta(seconds=timeout_s))
        try:
            return _in_place(job)
        finally:
            dist.destroy_process_group()
    return _started(job, timeout_s)


def next_token_loss(module: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """The sum of the cross entropies of next tokens, in nats, over those whose label is not -100."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits = module(**inputs).logits[:, :-1]
    loss: Tensor = F.cross_entropy(
        logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="sum", ignore_index=IGNORED
    )
    return loss


def num_targets(batch: Any) -> int:
    """Of next-token labels; 0 for a batch without labels."""
    return int((batch["labels"][:, 1:] != IGNORED).sum()) if _has_labels(batch) else 0


def _has_labels(batch: Any) -> bool:
    return isinstance(batch, Mapping) and isinstance(batch.get("labels"), Tensor)


def _check_functions(functions: Mapping[str, object]) -> None:
    for name, function in functions.items():
        if not callable(function) or (name == "build" and isinstance(function, nn.Module)):
            raise ArgumentError(name, type(function).__name__, "it must be a function", f"Give one: def {name}(...)")


def _check_arguments(
    mesh: Mapping[str, int], reduction: str, same_batch: Sequence[str], dtype: torch.dtype, steps: int,
    accumulation: int, timeout_s: float,
) -> None:  # fmt: skip
    if not isinstance(mesh, Mapping) or not mesh or any(not _is_count(size) for size in mesh.values()):
        shown = dict(mesh) if isinstance(mesh, Mapping) else mesh
        raise ArgumentError("mesh", shown, "it needs axes with at least one rank each", 'Give {"ep": 2}')
    if reduction not in ("mean", "sum", "targets"):
        raise ArgumentError("reduction", reduction, "it is none of mean, sum, targets", "Choose one of them")
    if unknown := [name for name in same_batch if name not in mesh]:
        raise ArgumentError("same_batch", unknown[0], "the mesh has no such axis", f"Choose of {', '.join(mesh)}")
    if dtype not in TOLERANCES:
        raise ArgumentError("dtype", dtype, "it is neither float64 nor float32", "Choose one of them")
    for name, value in (("steps", steps), ("accumulation", accumulation)):
        if not _is_count(value):
            raise ArgumentError(name, value, "it must be at least 1", f"Give {name}=1 or more")
    if not timeout_s > 0:
        raise ArgumentError("timeout_s", timeout_s, "it must be more than 0", "Give seconds, such as 120")


def _is_count(value: object) -> bool:
    return isinstance(value, int) and value >= 1


# -- ranks -------------------------------------------------------------------------------------------------------------


def _started(job: _Job, timeout_s: float) -> Certificate:
    """Starts the ranks on this machine."""
    try:
        pickled = pickle.dumps(job)
    except Exception as error:
        raise ArgumentError(
            "build, parallelize, batch, loss", str(error), "the ranks that are started cannot import it",
            "Define them at the top level of a module, or start the script by torchrun",
        ) from error  # fmt: skip
    main = getattr(sys.modules["__main__"], "__file__", None)  # ranks run it first, if there is one
    if (main is None and b"__main__" in pickled) or (main is not None and not Path(main).is_file()):
        raise ArgumentError(
            "build, parallelize, batch, loss", main or "__main__",
            "ranks that are started cannot import a session without a file, such as a notebook",
            "Write them into a module, and import it; or write a script",
        )  # fmt: skip
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory(prefix="moecompile-certify-") as folder:
        path = Path(folder) / "certificate"
        arguments = (job, store.port, timeout_s, path)
        try:
            mp.start_processes(_rank, arguments, nprocs=job.axes.num_ranks, start_method="spawn")
        except mp.ProcessRaisedException:
            if (said := path.with_name(_ERROR)).exists():
                raise pickle.loads(said.read_bytes()) from None
            raise
        certificate: Certificate = pickle.loads(path.read_bytes())
    return certificate


def _rank(rank: int, job: _Job, port: int, timeout_s: float, path: Path) -> None:
    os.environ.update(worker_variables(1, one_machine=True))
    torch.set_num_threads(1)
    timeout = timedelta(seconds=timeout_s)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timeout)
    init_process_group("gloo", store=store, rank=rank, world_size=job.axes.num_ranks, timeout=timeout)
    try:
        certificate = _in_place(job)
    except UserError as error:
        with replacing(path.with_name(_ERROR)) as partial:
            partial.write_bytes(pickle.dumps(error))
        raise
    if rank == 0:
        path.write_bytes(pickle.dumps(certificate))
    dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # a gloo thread may abort the interpreter's own shutdown


def _in_place(job: _Job) -> Certificate:
    if dist.get_world_size() != job.axes.num_ranks:
        raise ArgumentError(
            "mesh", dict(job.axes.sizes), f"it has {job.axes.num_ranks} ranks and {dist.get_world_size()} were started",
            "Start as many",
        )  # fmt: skip
    if job.reduction == "targets" and not _has_labels(job.batch(0)):
        raise ArgumentError(
            "reduction", job.reduction, 'micro-batches have no "labels" by which targets are counted',
            "Use reduction='sum', and divide in the loss or in Parallel.finish",
        )  # fmt: skip
    device_mesh = init_device_mesh("cpu", tuple(job.axes.sizes.values()), mesh_dim_names=tuple(job.axes.sizes))
    reference: _Reference | None = None
    variants = {"": False, **({"recomputed, ": True} if job.recompute else {})}
    sides: list[_Held] = []
    comparisons: list[_Comparison] = []
    checks: list[Check] = []
    for label, recomputed in variants.items():
        sides.append(job.in_parallel(device_mesh, recomputed))
        gathered: list[Any] = [None] * dist.get_world_size() if dist.get_rank() == 0 else []
        dist.gather_object(sides[-1], gathered or None)
        if gathered:
            reference = reference or job.reference(sides[-1].clips)
            comparisons.append(_Comparison(job, reference, gathered, label))
            checks += comparisons[-1].checks()
    has_failed = _first(any(not check.passed for check in checks))
    not_comparable = job.not_comparable(device_mesh, sides[0], reference) if has_failed else ""
    certificate: Certificate | None = None
    if reference is not None:
        if not_comparable:
            checks = comparisons[0].of_places()
            comparisons = comparisons[:1]
        tried, not_tried = job.conditions(reference.held)
        left_out = [text for comparison in comparisons for text in comparison.left_out]
        certificate = Certificate(
            mesh=dict(job.axes.sizes), dtype=str(job.dtype).removeprefix("torch."), checks=checks,
            findings=[finding for comparison in comparisons for finding in comparison.findings], tried=tried,
            not_tried=list(dict.fromkeys([*not_tried, *left_out])), versions=versions(), not_comparable=not_comparable,
        )  # fmt: skip
    found: Certificate = _first(certificate)
    return found


def _first(value: Any) -> Any:
    """What rank 0 gives; all ranks call it."""
    objects = [value]
    dist.broadcast_object_list(objects, 0)
    return objects[0]


# -- both sides --------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class _Held:
    """The record of one side: one process, or one rank.

    losses: of each micro-batch, by number. inputs: gradients of its floating-point tensors, by number and place.
    weights: name -> numbers of the entries that the tensor has (ranks), or values (one process); grads: the same
    names, per step, None for a weight without gradient; norms: before clipping, per step, None if torch cannot tell;
    clips: whether gradients are clipped. buffers, after: buffers and weights after the last step. dropout: rates that
    were set to 0, by name. draws: whether training took random numbers. Of one process only: trained: weights that are
    not frozen. Of ranks only: plain: names of tensors that are no DTensors, of whose other shards torch does not know.
    """

    losses: dict[int, float] = field(default_factory=dict)
    inputs: dict[tuple[int, int], Tensor | None] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    grads: list[dict[str, Tensor | None]] = field(default_factory=list)
    norms: list[float | None] = field(default_factory=list)
    clips: bool = False
    trained: set[str] = field(default_factory=set)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    after: dict[str, Tensor] = field(default_factory=dict)
    dropout: dict[str, float] = field(default_factory=dict)
    draws: bool = False
    plain: set[str] = field(default_factory=set)

    def other(self, again: _Held, most: float) -> str:
        """What another run of the same side computed otherwise; empty: nothing."""
        scale = max(map(abs, self.losses.values()), default=0.0)
        if any(not abs(loss - again.losses[number]) <= most * scale for number, loss in self.losses.items()):
            return "losses"
        for step, grads in enumerate(self.grads):
            pairs = [(grad, again.grads[step].get(name)) for name, grad in grads.items()]
            scale = max((_largest(grad) for grad, _ in pairs if grad is not None), default=0.0)
            if any(_apart(one, other) > most * scale for one, other in pairs):
                return "gradients"
        scale = max(map(_largest, self.after.values()), default=0.0)
        if any(_apart(value, again.after[name]) > most * scale for name, value in self.after.items()):
            return "weights after the last step"
        return ""


def _apart(one: Tensor | None, other: Tensor | None) -> float:
    if one is None or other is None:
        return 0.0 if one is other else float("inf")
    return _largest(finite(one.double()).flatten().nan_to_num() - finite(other.double()).flatten().nan_to_num())


def _with_rounding(tolerance: Tolerance, held: _Held, exact: _Held) -> Tolerance:
    pairs = [(grad, exact.grads[step][name]) for step, grads in enumerate(held.grads) for name, grad in grads.items()]
    most = ROUNDING[torch.float32] * max((_largest(grad) for grad, _ in pairs if grad is not None), default=0.0)
    grads = [(a.double(), b) for a, b in pairs if a is not None and b is not None and _largest(a) > most]
    norms = [(_row(a), _row(b)) for a, b in zip(held.norms, exact.norms, strict=True)]
    norms.append((_losses_of(held), _losses_of(exact)))
    return replace(tolerance, grads=with_room(tolerance.grads, grads), norm=with_room(tolerance.norm, norms))


def _losses_of(held: _Held) -> Tensor:
    return finite(torch.tensor(list(held.losses.values()), dtype=torch.float64))


@dataclass(frozen=True, kw_only=True)
class _Reference:
    """One process. tolerance: with the rounding error of this processor, where that was measured."""

    entries: Entries
    held: _Held
    tolerance: Tolerance


@dataclass(frozen=True, kw_only=True)
class _Job:
    build: Callable[[], nn.Module | Parallel]
    parallelize: Callable[[nn.Module, DeviceMesh], nn.Module | Parallel]
    batch: Callable[[int], Any]
    axes: Axes
    loss: Loss
    reduction: str
    same_batch: tuple[str, ...]
    steps: int
    accumulation: int
    recompute: bool
    dtype: torch.dtype
    seed: int

    @property
    def num_batches(self) -> int:
        """Ranks with micro-batches of their own."""
        return self.axes.num_ranks // self.axes.size(self.same_batch)

    def batch_index(self, rank: int) -> int:
        """Of a rank among those with micro-batches of their own."""
        index = 0
        for name, at in self.axes.place(rank).items():
            if name not in self.same_batch:
                index = index * self.axes.sizes[name] + at
        return index

    def number(self, step: int, batch_index: int, i: int) -> int:
        """Of a rank's micro-batch `i` of a step, in the order of one process."""
        return (step * self.num_batches + batch_index) * self.accumulation + i

    def micro_batch(self, number: int) -> Any:
        """Micro-batch `number`, in the precision of the job, some of its labels masked."""
        batch = tree_map_only(Tensor, partial(_as_input, dtype=self.dtype), self.batch(number))
        if not _has_labels(batch):
            return batch
        labels = batch["labels"].clone()
        columns = torch.where((labels[:, 1:] != IGNORED).any(0))[0] + 1  # those with a target
        if self._is_without(number):
            labels[:] = IGNORED
        elif len(columns):
            labels[:, columns[-1] + 1 - number % max(len(columns) // 2, 1) :] = IGNORED
        return {**batch, "labels": labels}

    def _is_without(self, number: int) -> bool:
        """Whether a micro-batch gets no targets: those of one rank in the last step, if it had some in a step before;
        of ranks that all have the same, every second one.
        """
        step, place = divmod(number, self.num_batches * self.accumulation)
        if step < self.steps - 1:
            return False
        return place // self.accumulation == 1 and self.steps > 1 if self.num_batches > 1 else place % 2 == 1

    def conditions(self, alone: _Held) -> tuple[list[str], list[str]]:
        """What was tried, and what was not.

        Args:
            alone: one process.
        """
        num_targets = [
            [
                [self._num_targets(self.number(step, index, i)) for i in range(self.accumulation)]
                for index in range(self.num_batches)
            ]
            for step in range(self.steps)
        ]
        per_rank = torch.tensor(num_targets).sum(2)  # (step, rank)
        all_conditions = {
            f"{self.steps} optimizer steps": True,
            f"{self.accumulation} micro-batches a step": self.accumulation > 1,
            "unequal numbers of targets": bool((per_rank != per_rank[:, :1]).any()),
            "a rank without any": self.num_batches > 1 and bool((per_rank == 0).any()),
            "recomputation": self.recompute,
        }
        tried = [name for name, holds in all_conditions.items() if holds]
        not_tried = [name for name, holds in all_conditions.items() if not holds]
        for rank in range(self.axes.num_ranks):
            mine = self.batch_index(rank)
            numbers = [self.number(s, mine, i) for s in range(self.steps) for i in range(self.accumulation)]
            if not any(alone.losses[number] for number in numbers):
                not_tried.append(f"rank {rank}, whose losses are all 0")
        return tried, [*not_tried, f"more than {self.steps} optimizer steps"]

    def _num_targets(self, number: int) -> int:
        batch = self.micro_batch(number)
        return num_targets(batch) if _has_labels(batch) else _size(batch)

    def whole(self) -> Parallel:
        """The model with weights that are told apart."""
        torch.manual_seed(self.seed)
        side = _side(self.build(), "build")
        side.module.to(self.dtype)
        make_distinct(side.module, self.seed)
        return side

    def reference(self, clips: bool) -> _Reference:
        """One process; in float32 its own rounding error is measured, as its difference to float64."""
        entries, held = self.alone(clips)
        tolerance = TOLERANCES[self.dtype]
        if self.dtype is torch.float32:
            tolerance = _with_rounding(tolerance, held, replace(self, dtype=torch.float64).alone(clips)[1])
        return _Reference(entries=entries, held=held, tolerance=tolerance)

    def alone(self, clips: bool, draws: int | None = None) -> tuple[Entries, _Held]:
        """One process that runs the micro-batches of all ranks in order. draws: seed of what it draws in training."""
        side, held = self.whole(), _Held(clips=clips)
        held.dropout = without_dropout(side.module)
        entries = Entries(side.module)
        held.trained = {name for name, weight in side.module.named_parameters() if weight.requires_grad}
        held.weights = {name: weight.detach().clone() for name, weight in side.module.named_parameters()}
        per_step = self.num_batches * self.accumulation
        numbers = [range(step * per_step, (step + 1) * per_step) for step in range(self.steps)]
        _seed(draws)
        self._train(side, held, numbers, self._divide)
        held.after = {name: weight.detach().clone() for name, weight in side.module.named_parameters()}
        return entries, held

    def in_parallel(self, device_mesh: DeviceMesh, recomputed: bool, draws: int | None = None) -> _Held:
        """A rank."""
        whole = self.whole().module
        entries, held = Entries(whole), _Held(dropout=without_dropout(whole))
        side = _side(self.parallelize(whole, device_mesh), "parallelize")
        held.dropout |= without_dropout(side.module)  # of modules that it made
        held.clips = side.clip is not None
        if recomputed:
            _recompute(side.module)
        weights = dict(side.module.named_parameters())
        held.weights = {name: entries.locate(local_part(w)) for name, w in weights.items() if w.is_floating_point()}
        held.plain = {name for name in held.weights if not isinstance(weights[name], DTensor)}
        mine = self.batch_index(dist.get_rank())
        numbers = [[self.number(step, mine, i) for i in range(self.accumulation)] for step in range(self.steps)]
        _seed(draws)
        self._train(side, held, numbers, None)
        weights = dict(side.module.named_parameters())
        held.after = {name: local_part(weights[name]).detach().clone() for name in held.weights}
        return held

    def not_comparable(self, device_mesh: DeviceMesh, held: _Held, reference: _Reference | None) -> str:
        """The side that computes something else when it runs again; empty: none. All ranks call it, on which `held` is
        what they computed the first time; rank 0 with the reference.
        """
        most = TOLERANCES[self.dtype].grads
        texts: list[str] = []
        if reference is not None:
            again = self.alone(reference.held.clips, self.seed + 1)[1]
            if what := reference.held.other(again, most):
                texts.append(f"one process computes other {what}")
        draws: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(draws, held.draws)
        if any(draws):  # else they are wrong in another way each time, which is no reason to pardon them
            own = held.other(self.in_parallel(device_mesh, False, self.seed + 1), most)
            of_all: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(of_all, own)
            if what := next(filter(None, of_all), ""):
                texts.append(f"ranks compute other {what}")
        return f"{' and '.join(texts)} when run again with other random numbers" if texts else ""

    def _divide(self, module: nn.Module, targets: int) -> None:
        divisor = {"mean": self.num_batches, "sum": 1, "targets": max(targets, 1)}[self.reduction]
        for weight in module.parameters():
            if weight.grad is not None:
                weight.grad /= divisor

    def _train(
        self, side: Parallel, held: _Held, numbers: Sequence[Sequence[int]],
        divide: Callable[[nn.Module, int], None] | None,
    ) -> None:  # fmt: skip
        module = side.module.train()
        optimizer = side.optimizer(module) if side.optimizer else _adamw(module)
        before = _generators()
        for of_step in numbers:
            optimizer.zero_grad()
            targets = 0
            for number in of_step:
                batch = self.micro_batch(number)
                inputs = [*_floating(batch)]
                for tensor in inputs:
                    tensor.requires_grad_()
                loss = self.loss(module, batch)
                if not isinstance(loss, Tensor) or loss.numel() != 1:
                    shown = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
                    raise ArgumentError("loss", shown, "it must return a scalar", "Return the sum over all targets")
                loss.backward()
                targets += num_targets(batch)
                held.losses[number] = float(loss.detach())
                held.inputs.update({(number, i): tensor.grad for i, tensor in enumerate(inputs)})
            if divide is not None:
                divide(module, targets)
            if side.finish is not None:
                side.finish(targets)
            named = dict(module.named_parameters())
            grads = side.gradients() if side.gradients else {name: weight.grad for name, weight in named.items()}
            held.grads.append(
                {name: local_gradient(named[name], grad) for name, grad in grads.items() if name in named}
            )
            held.norms.append(_norm(side, held.clips))
            optimizer.step()
        held.draws = _generators() != before
        held.buffers = {_plain(name): local_part(buffer).clone() for name, buffer in module.named_buffers()}
        if side.counts is not None:
            held.buffers.update({name: local_part(value).clone() for name, value in side.counts().items()})


def _side(made: object, function: str) -> Parallel:
    """What a function of the user returned."""
    side = made if isinstance(made, Parallel) else Parallel(module=made)  # type: ignore[arg-type]
    if not isinstance(side.module, nn.Module):
        rule = "it must return a torch.nn.Module, or a moecompile.Parallel with one"
        raise ArgumentError(function, type(side.module).__name__, rule, "Return the model that is trained")
    hub_kernels.take_off(side.module)
    return side


def _generators() -> list[object]:
    """The state of all that random numbers are usually drawn from."""
    states: list[object] = [torch.get_rng_state().tolist(), random.getstate()]
    if numpy := sys.modules.get("numpy"):
        _, keys, place, *_ = numpy.random.get_state()
        states.append((keys.tolist(), place))
    return states


def _seed(draws: int | None) -> None:
    if draws is not None:
        torch.manual_seed(draws)


def _adamw(module: nn.Module) -> torch.optim.Optimizer:
    weights = [weight for weight in module.parameters() if weight.requires_grad]
    # A larger eps than usual: Adam would turn rounding errors of tiny gradients into full steps.
    return torch.optim.AdamW(weights, lr=1e-3, eps=1e-5, foreach=False)


def _norm(side: Parallel, clips: bool) -> float | None:
    """The norm of the gradients, which are clipped then if `clips`; None: torch cannot tell."""
    most = _CLIP if clips else float("inf")
    try:
        clip = side.clip or partial(nn.utils.clip_grad_norm_, side.module.parameters())
        norm = clip(most)
    except RuntimeError:  # weights are on different meshes
        if side.clip is not None:
            raise
        return None
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def _recompute(module: nn.Module) -> None:
    """Activation checkpointing of the members of the outermost lists of modules, or of the module if there are none."""
    layers = [layer for each in _outermost_lists(module) for layer in each] or [module]
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def _outermost_lists(module: nn.Module) -> Iterator[nn.ModuleList]:
    if isinstance(module, nn.ModuleList):
        yield module
    else:
        for child in module.children():
            yield from _outermost_lists(child)


def _plain(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _as_input(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    tensor = tensor.detach().clone()
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


def _floating(batch: Any) -> Iterator[Tensor]:
    for leaf in tree_leaves(batch):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            yield leaf


def _size(batch: Any) -> int:
    return next((leaf.numel() for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)), 0)


# -- the comparison ----------------------------------------------------------------------------------------------------


class _Comparison:
    """Compares one process with the ranks, each entry on each rank that holds it. Legend: diagnosis.py."""

    def __init__(self, job: _Job, reference: _Reference, ranks: Sequence[_Held], label: str) -> None:
        self.job, self.axes, self.label, self.ranks = job, job.axes, label, ranks
        self.entries, self.wanted, self.tolerance = reference.entries, reference.held, reference.tolerance
        self.findings: list[Finding] = []
        self.left_out: list[str] = []  # what could not be compared
        self.places = Places(self.entries, [held.weights for held in ranks])

    def checks(self) -> list[Check]:
        """All of them."""
        checks = [] if self.label else self.of_places()
        for step in range(self.job.steps):
            checks.append(self._losses(step))
            if any(held.inputs for held in self.ranks):
                checks.append(self._inputs(step))
            checks += self._gradients(step)
        if any(None in held.norms for held in (self.wanted, *self.ranks)):
            self.left_out.append("gradient norm, which torch cannot tell over several meshes: give Parallel.clip")
        elif local := self._local_shards():
            self.left_out.append(
                f"gradient norm, which torch tells of a rank's own shards alone ({local}): give Parallel.clip"
            )
        else:
            checks.append(self._norms())
        checks += self._of_buffers()
        if idle := self._idle():
            self.left_out.append(f"gradients that are zero in every step: {_some(idle)}")
        if rates := {_plain(n): rate for held in (self.wanted, *self.ranks) for n, rate in held.dropout.items()}:
            told = _some([f"{name} of {rate:g}" for name, rate in rates.items()])
            self.left_out.append(f"dropout, whose rates were set to 0 ({told})")
        if self.tolerance.weights is None:
            self.left_out.append("updates of weights in float32")
        else:
            checks.append(self._updates(self.tolerance.weights))
        return checks

    def of_places(self) -> list[Check]:
        """Whether the ranks have all entries of the model and no others; there are no other findings then."""
        self.findings = []
        return [self._counted(*fault) for fault in self.places.faults().items()]

    def _losses(self, step: int) -> Check:
        pairs = {
            f"micro-batch {i} of rank {rank}": (held.losses[number], self.wanted.losses[number])
            for rank, held in enumerate(self.ranks)
            for i, number in self._numbers(step, rank)
        }
        scale = max(abs(wanted) for _, wanted in pairs.values())
        differences = {
            name: difference(_row(got), _row(wanted)[0], Axes({}), self.tolerance.norm, scale)
            for name, (got, wanted) in pairs.items()
        }
        return self._worst(f"step {step}: losses of micro-batches", differences, self.tolerance.norm)

    def _numbers(self, step: int, rank: int) -> Iterator[tuple[int, int]]:
        """The micro-batches of a rank: which of its own, and which of all."""
        mine = self.job.batch_index(rank)
        return ((i, self.job.number(step, mine, i)) for i in range(self.job.accumulation))

    def _inputs(self, step: int) -> Check:
        differences = {}
        for rank, held in enumerate(self.ranks):
            numbers = {number for _, number in self._numbers(step, rank)}
            for (number, place), grad in held.inputs.items():
                if number not in numbers:
                    continue
                wanted = self.wanted.inputs[number, place]
                key = f"micro-batch {number}, tensor {place} on rank {rank}"
                if grad is None or wanted is None:
                    if (grad is None) != (wanted is None):
                        differences[key] = Difference(error=float("inf"), text="on one side only")
                    continue
                rows = finite(grad.double().flatten()).unsqueeze(0)
                differences[key] = difference(rows, wanted.double().flatten(), Axes({}), self.tolerance.grads)
        return self._worst(f"step {step}: gradients of inputs", differences, self.tolerance.grads)

    def _local_shards(self) -> str:
        """A weight whose norm torch cannot know on a rank, which holds a part of it in a tensor that is no DTensor."""
        if any(held.clips for held in self.ranks):
            return ""
        for weight, by_rank in self.places.parts.items():
            _, shape = self.entries.weights[weight]
            is_seen_RN = torch.zeros(len(by_rank), shape.numel(), dtype=torch.bool)
            for rank, parts in enumerate(by_rank):
                for name, _, there in parts:
                    of_ranks = slice(rank, rank + 1) if name in self.ranks[rank].plain else slice(None)
                    is_seen_RN[of_ranks, there] = True
            is_partial_R = ~is_seen_RN.all(1)
            if weight in self.wanted.trained and is_partial_R.any() and is_seen_RN.any(0).all():
                return f"{weight} on rank {int(is_partial_R.long().argmax())}"
        return ""

    def _gradients(self, step: int) -> list[Check]:
        differences, missing = {}, Counter[str]()
        for weight, wanted in self.wanted.grads[step].items():
            if weight not in self.places.parts:
                continue
            grads_R = [held.grads[step] for held in self.ranks]
            for rank, parts in enumerate(self.places.parts[weight]):
                for name in {name for name, _, _ in parts}:
                    missing[f"{weight} on rank {rank}"] += (grads_R[rank].get(name) is None) != (wanted is None)
            held_RN = self.places.held(weight, grads_R)
            if wanted is None or self._is_rounding(step, held_RN, weight):
                continue
            differences[weight] = difference(held_RN, wanted.double(), self.axes, self.tolerance.grads)
        return [
            self._counted(f"step {step}: gradients on one side only", +missing),
            self._worst(f"step {step}: gradients", differences, self.tolerance.grads),
        ]

    def _idle(self) -> list[str]:
        """Weights, and experts in stacks of them, that no step of one process gave a gradient, such as experts that no
        token chose: of them, wrong and right are both zero.
        """
        idle = []
        for name in self.wanted.trained:
            shape = self.wanted.weights[name].shape
            grads = [grad for of_step in self.wanted.grads if (grad := of_step.get(name)) is not None]
            moved = torch.stack(grads).ne(0).any(0) if grads else torch.zeros(shape.numel(), dtype=torch.bool)
            if not moved.any():
                idle.append(name)
            elif len(shape) == 3 and (rows := torch.where(~moved.view(shape).flatten(1).any(1))[0].tolist()):
                idle.append(f"{name} of {', '.join(map(str, rows))}")
        return sorted(idle)

    def _is_rounding(self, step: int, held_RN: Tensor, weight: str) -> bool:
        """Whether a weight's gradient is only rounding error on both sides: such as the bias of a key."""
        largest = {name: _largest(grad) for name, grad in self.wanted.grads[step].items() if grad is not None}
        bound = ROUNDING[self.job.dtype] * max(largest.values(), default=0.0)
        return all(0 < size <= bound for size in (largest.get(weight, 0.0), _largest(held_RN[~held_RN.isnan()])))

    def _norms(self) -> Check:
        differences = {}
        for step, wanted in enumerate(self.wanted.norms):
            held_R1 = torch.stack([_row(held.norms[step]).squeeze(0) for held in self.ranks])
            differences[f"step {step}"] = difference(held_R1, _row(wanted)[0], self.axes, self.tolerance.norm)
        return self._worst("gradient norm", differences, self.tolerance.norm)

    def _of_buffers(self) -> list[Check]:
        differences, unlike = {}, []
        for name in dict.fromkeys(name for held in (self.wanted, *self.ranks) for name in held.buffers):
            of_all = [held.buffers.get(name) for held in (self.wanted, *self.ranks)]
            values = [each for each in of_all if each is not None]
            if len(values) < len(of_all) or len({each.shape for each in values}) > 1:
                unlike.append(name)
            elif values[0].numel():
                wanted, *held_R = [finite(each.double().flatten()) for each in values]
                most = self.tolerance.outputs if values[0].is_floating_point() else 0.0
                differences[name] = difference(torch.stack(held_R), wanted, self.axes, most)
        if unlike:
            self.left_out.append(f"buffers with another shape on a rank, or on one side only: {_some(unlike, 6)}")
        return [self._worst("buffers and counts", differences, self.tolerance.outputs)] if differences else []

    def _updates(self, most: float) -> Check:
        differences = {}
        for weight, began in self.wanted.weights.items():
            if weight not in self.places.parts or any(
                self._is_rounding(step, self.places.held(weight, [held.grads[step] for held in self.ranks]), weight)
                for step in range(self.job.steps)
            ):
                continue
            before = began.double().flatten()
            moved_RN = self.places.held(weight, [held.after for held in self.ranks]) - before
            wanted = self.wanted.after[weight].double().flatten() - before
            differences[weight] = difference(moved_RN, wanted, self.axes, most, _largest(before))
        return self._worst(f"updates of weights after {self.job.steps} steps", differences, most)

    def _worst(self, check: str, differences: Mapping[str, Difference], tolerance: float) -> Check:
        """One check of many values; those that differ are kept."""
        result, wrong = explained(self.label + check, differences, tolerance)
        self.findings += [Finding(check=result.name, name=name, difference=each) for name, each in wrong]
        return result

    def _counted(self, check: str, numbers: Counter[str]) -> Check:
        result = counted(self.label + check, numbers)
        for name, number in numbers.most_common():
            what = Difference(error=number, text=f"{number} entries")
            self.findings.append(Finding(check=result.name, name=name, difference=what))
        return result


def _some(names: Sequence[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" * (len(names) > most)
    return f"{', '.join(names[:most])}{more}"


def _row(value: float | None) -> Tensor:
    assert value is not None
    return finite(torch.tensor([[value]], dtype=torch.float64))


def _largest(values: Tensor) -> float:
    return float(values.abs().max()) if values.numel() else 0.0
