"""`moecompile.certify`: whether a parallel model computes what one process does, whoever made it parallel.

Algorithm:
  1. Every rank builds the model, whose weights are then moved until each entry has a value of its own (entries.py).
     The user's function makes it parallel. What a rank holds is found again by value, so neither names nor shards have
     to be told; entries that no rank has, or one rank twice, are found too.
  2. All ranks train some steps: several micro-batches each, with unequal numbers of targets, one rank without any.
     Rank 0 runs the micro-batches of all ranks in one process. The same again with recomputation.
  3. Rank 0 compares each entry on each rank: losses, gradients of weights and inputs, norm, counts, weights after the
     last step. Of the worst, diagnosis.py says the factor and the axis.
"""

from __future__ import annotations

import json
import os
import pickle
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
from moecompile.torch_private import local_part, tree_leaves, tree_map_only
from moecompile.verify.checks import ROUNDING, TOLERANCES, Check, Tolerance, counted, explained, with_room
from moecompile.verify.diagnosis import Axes, Difference, difference
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
    comparison was made; those that the given micro-batches do not have, and what could not be compared.
    """

    mesh: Mapping[str, int]
    dtype: str
    checks: Sequence[Check]
    findings: Sequence[Finding]
    tried: Sequence[str]
    not_tried: Sequence[str]
    versions: Mapping[str, str | None]

    @property
    def passed(self) -> bool:
        """Whether every check did."""
        return all(check.passed for check in self.checks)

    def check(self) -> Certificate:
        """Returns itself.

        Raises:
            VerificationFailed: a check failed.
        """
        if not self.passed:
            name = " x ".join(f"{axis} {size}" for axis, size in self.mesh.items())
            raise VerificationFailed(name, [f"{each.name} ({each.where})" for each in self.checks if not each.passed])
        return self

    def save(self, path: str | Path) -> None:
        """Writes it as JSON."""
        fields = {
            "passed": self.passed, "mesh": dict(self.mesh), "dtype": self.dtype, "tried": list(self.tried),
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
        ranks = " x ".join(f"{axis} {size}" for axis, size in self.mesh.items())
        console.print(f"\n{ranks}, {self.dtype}: {'passed' if self.passed else 'FAILED'}")
        console.print(f"tried: {', '.join(self.tried)}")
        if self.not_tried:
            console.print(f"not tried: {', '.join(self.not_tried)}")
        return text.getvalue()


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
            that micro-batches have unequally many targets and one rank has none; otherwise that is up to `batch`.
        mesh: axis -> size.
        loss: (module, batch) -> sum of the losses of the targets, a scalar. None: cross entropy of the next token of
            `module(**batch).logits`.
        reduction: what finished gradients are: "mean", the sum over all micro-batches divided by the number of ranks
            with batches of their own (DDP, FSDP2); "sum"; "targets", the sum divided by the targets of all ranks.
        same_batch: axes whose ranks get the same micro-batches (tensor parallelism).
        steps: optimizer steps.
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
        dist.init_process_group("gloo", timeout=timedelta(seconds=timeout_s))
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
    dist.init_process_group("gloo", store=store, rank=rank, world_size=job.axes.num_ranks, timeout=timeout)
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
    checks: list[Check] = []
    findings: list[Finding] = []
    left_out: list[str] = []
    for label, recomputed in variants.items():
        held = job.in_parallel(device_mesh, recomputed)
        gathered: list[Any] = [None] * dist.get_world_size() if dist.get_rank() == 0 else []
        dist.gather_object(held, gathered or None)
        if gathered:
            reference = reference or job.reference(held.clips)
            comparison = _Comparison(job, reference, gathered, label)
            checks += comparison.checks()
            findings += comparison.findings
            left_out = comparison.left_out
    result: list[Any] = [None]
    if reference is not None:
        tried, not_tried = job.conditions()
        result = [
            Certificate(
                mesh=dict(job.axes.sizes), dtype=str(job.dtype).removeprefix("torch."), checks=checks,
                findings=findings, tried=tried, not_tried=[*not_tried, *left_out], versions=versions(),
            )
        ]  # fmt: skip
    dist.broadcast_object_list(result, 0)
    certificate: Certificate = result[0]
    return certificate


# -- both sides --------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class _Held:
    """The record of one side: one process, or one rank.

    losses: of each micro-batch of step 0. inputs: gradients of its floating-point tensors, by micro-batch of step 0 and
    place. weights: name -> numbers of the entries that the tensor has (ranks), or values (one process); grads: the same
    names, per step, None for a weight without gradient; norms: before clipping, per step, None if torch cannot tell;
    clips: whether gradients are clipped. buffers, after: buffers and weights after the last step. Of one process only:
    trained: weights that are not frozen.
    """

    losses: list[float] = field(default_factory=list)
    inputs: dict[str, Tensor | None] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    grads: list[dict[str, Tensor | None]] = field(default_factory=list)
    norms: list[float | None] = field(default_factory=list)
    clips: bool = False
    trained: set[str] = field(default_factory=set)
    buffers: dict[str, Tensor] = field(default_factory=dict)
    after: dict[str, Tensor] = field(default_factory=dict)


def _with_rounding(tolerance: Tolerance, held: _Held, exact: _Held) -> Tolerance:
    pairs = [(grad, exact.grads[step][name]) for step, grads in enumerate(held.grads) for name, grad in grads.items()]
    most = ROUNDING[torch.float32] * max((_largest(grad) for grad, _ in pairs if grad is not None), default=0.0)
    grads = [(a.double(), b) for a, b in pairs if a is not None and b is not None and _largest(a) > most]
    norms = [(_row(a), _row(b)) for a, b in zip(held.norms, exact.norms, strict=True)]
    return replace(tolerance, grads=with_room(tolerance.grads, grads), norm=with_room(tolerance.norm, norms))


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
        step, place = divmod(number, self.num_batches * self.accumulation)
        labels = batch["labels"].clone()
        length = labels.shape[1]
        without = place // self.accumulation == 1 if self.num_batches > 1 else place % 2 == 1
        keep = 0 if step == 0 and without else length - number % max(length // 2, 1)
        labels[:, keep:] = IGNORED
        return {**batch, "labels": labels}

    def conditions(self) -> tuple[list[str], list[str]]:
        """What was tried, and what was not."""
        per_rank = [
            [self.micro_batch(self.number(0, index, i)) for i in range(self.accumulation)]
            for index in range(self.num_batches)
        ]
        sizes = [sum(num_targets(b) if _has_labels(b) else _size(b) for b in batches) for batches in per_rank]
        all_conditions = {
            f"{self.steps} optimizer steps": True,
            f"{self.accumulation} micro-batches a step": self.accumulation > 1,
            "unequal numbers of targets": len(set(sizes)) > 1,
            "a rank without any": self.num_batches > 1 and 0 in sizes,
            "recomputation": self.recompute,
        }
        tried = [name for name, holds in all_conditions.items() if holds]
        return tried, [name for name, holds in all_conditions.items() if not holds]

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

    def alone(self, clips: bool) -> tuple[Entries, _Held]:
        """One process that runs the micro-batches of all ranks in order."""
        side, held = self.whole(), _Held(clips=clips)
        entries = Entries(side.module)
        held.trained = {name for name, weight in side.module.named_parameters() if weight.requires_grad}
        held.weights = {name: weight.detach().clone() for name, weight in side.module.named_parameters()}
        per_step = self.num_batches * self.accumulation
        numbers = [range(step * per_step, (step + 1) * per_step) for step in range(self.steps)]
        self._train(side, held, numbers, self._divide)
        held.after = {name: weight.detach().clone() for name, weight in side.module.named_parameters()}
        return entries, held

    def in_parallel(self, device_mesh: DeviceMesh, recomputed: bool) -> _Held:
        """A rank."""
        whole = self.whole().module
        entries, held = Entries(whole), _Held()
        side = _side(self.parallelize(whole, device_mesh), "parallelize")
        held.clips = side.clip is not None
        if recomputed:
            _recompute(side.module)
        weights = dict(side.module.named_parameters())
        held.weights = {name: entries.locate(local_part(w)) for name, w in weights.items() if w.is_floating_point()}
        mine = self.batch_index(dist.get_rank())
        numbers = [[self.number(step, mine, i) for i in range(self.accumulation)] for step in range(self.steps)]
        self._train(side, held, numbers, None)
        weights = dict(side.module.named_parameters())
        held.after = {name: local_part(weights[name]).detach().clone() for name in held.weights}
        return held

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
        for step, of_step in enumerate(numbers):
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
                if step == 0:
                    held.losses.append(float(loss.detach()))
                    held.inputs.update({f"{number}, tensor {i}": tensor.grad for i, tensor in enumerate(inputs)})
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
        checks = [] if self.label else [self._counted(*fault) for fault in self.places.faults().items()]
        checks.append(self._losses())
        if any(held.inputs for held in self.ranks):
            checks.append(self._inputs())
        for step in range(self.job.steps):
            checks += self._gradients(step)
        if all(None not in held.norms for held in (self.wanted, *self.ranks)):
            checks.append(self._norms())
        else:
            self.left_out.append("gradient norm, which torch cannot tell over several meshes: give Parallel.clip")
        checks += self._of_buffers()
        if idle := self._idle():
            more = f" and {len(idle) - 4} more" * (len(idle) > 4)
            self.left_out.append(f"gradients that are zero in every step: {', '.join(idle[:4])}{more}")
        if self.tolerance.weights is None:
            self.left_out.append("updates of weights in float32")
        else:
            checks.append(self._updates(self.tolerance.weights))
        return checks

    def _losses(self) -> Check:
        pairs = []
        for rank, held in enumerate(self.ranks):
            mine = self.job.batch_index(rank)
            for i, loss in enumerate(held.losses):
                wanted = self.wanted.losses[self.job.number(0, mine, i)]
                pairs.append((f"micro-batch {i} of rank {rank}", loss, wanted))
        scale = max(abs(wanted) for _, _, wanted in pairs)
        differences = {
            name: difference(_row(got), _row(wanted)[0], Axes({}), self.tolerance.norm, scale)
            for name, got, wanted in pairs
        }
        return self._worst("losses of micro-batches", differences, self.tolerance.norm)

    def _inputs(self) -> Check:
        differences = {}
        for rank, held in enumerate(self.ranks):
            for name, grad in held.inputs.items():
                wanted = self.wanted.inputs[name]
                key = f"micro-batch {name} on rank {rank}"
                if grad is None or wanted is None:
                    if (grad is None) != (wanted is None):
                        differences[key] = Difference(error=float("inf"), text="on one side only")
                    continue
                rows = finite(grad.double().flatten()).unsqueeze(0)
                differences[key] = difference(rows, wanted.double().flatten(), Axes({}), self.tolerance.grads)
        return self._worst("gradients of inputs", differences, self.tolerance.grads)

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
        differences = {}
        for name in dict.fromkeys(name for held in (self.wanted, *self.ranks) for name in held.buffers):
            of_all = [held.buffers.get(name) for held in (self.wanted, *self.ranks)]
            values = [each for each in of_all if each is not None]
            if len(values) < len(of_all) or len({each.shape for each in values}) > 1:
                self.left_out.append(f"buffer {name}, which has another shape on a rank, or is on one side only")
            elif values[0].numel():
                wanted, *held_R = [finite(each.double().flatten()) for each in values]
                most = self.tolerance.outputs if values[0].is_floating_point() else 0.0
                differences[name] = difference(torch.stack(held_R), wanted, self.axes, most)
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


def _row(value: float | None) -> Tensor:
    assert value is not None
    return finite(torch.tensor([[value]], dtype=torch.float64))


def _largest(values: Tensor) -> float:
    return float(values.abs().max()) if values.numel() else 0.0
