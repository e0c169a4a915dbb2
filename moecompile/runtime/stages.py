"""A Lightning step over a pipeline: the user's own training step, once for each micro-batch and stage.

Lightning calls `training_step` and `backward` for one micro-batch after another. Here the calls are kept, and the last
one of a window runs the schedule over all of them (runtime/pipeline.py). Its result has the sums of the whole window
where the last stage is, and zeros elsewhere; those of earlier calls are zeros. Gradients are set aside until Lightning
has zeroed the old ones and calls `backward`.

What the step logs is known where the loss is. It is logged again on all ranks after the schedule, so progress bars,
loggers and monitors work as without a pipeline.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from itertools import chain
from typing import Any, Protocol

import torch
import torch.distributed as dist
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.data import extract_batch_size
from torch import Tensor, nn
from torch.optim import Optimizer

from moecompile import kept_groups
from moecompile.capture import seed_generators
from moecompile.errors import ConfigError, PlanError
from moecompile.mesh import MeshSpec, Part
from moecompile.nn import LayerLoad
from moecompile.nn.losses import keepers_of
from moecompile.nn.stages import Passage, passage_of
from moecompile.passes.same_weights import tensor_hash
from moecompile.plan import Plan
from moecompile.runtime.gradients import set_aside
from moecompile.runtime.groups import Groups, along
from moecompile.runtime.pipeline import Computed, Stages, Steps, Wires, key_of
from moecompile.stages import Action, stage_of
from moecompile.torch_private import local_part, parameters_of, tree_leaves, tree_map_only

_ODD = 0x61C8864680B583EB


class Driver(Protocol):
    """What `PipelineSteps` needs of the strategy: see there."""

    loss: str
    seed: int
    checkpointing: str
    aux_losses: dict[str, Tensor]
    _window: Any
    _tokens: Any
    _finish: Any

    @property
    def global_rank(self) -> int: ...
    @property
    def model(self) -> Any: ...
    @property
    def lightning_module(self) -> Any: ...
    @property
    def root_device(self) -> torch.device: ...
    @property
    def groups(self) -> Groups: ...
    def take_auxiliary_loss(self) -> Tensor | None: ...
    def _after_backward(self, parameters: list[nn.Parameter]) -> None: ...
    def _module_step(self, *args: Any, **kwargs: Any) -> Any: ...
    def _count_tokens(self, output: Any) -> None: ...
    def _complete_gradients(self) -> None: ...
    def _random_numbers(
        self, place: int | None = None, modules: Sequence[nn.Module] = ()
    ) -> AbstractContextManager[None]: ...


def loss_kinds(model: nn.Module) -> list[str]:
    """The kinds of auxiliary losses of a model."""
    return sorted({kind for _, keeper in keepers_of(model) for kind in keeper.losses})


def check_held(module: nn.Module, compiled: nn.Module) -> None:
    """Checks that a LightningModule has no weights beside the compiled model: earlier stages would not train them.

    Raises:
        PlanError: it has.
    """
    inside = set(compiled.parameters())
    outside = [name for name, parameter in module.named_parameters() if parameter not in inside]
    if outside:
        raise PlanError(
            "mesh.pp", outside[0], "is a weight outside of the compiled model, and belongs to no stage of the pipeline",
            "Move it into the model before it is compiled, or use no stages",
        )  # fmt: skip


def _ways(plan: Plan, device_type: str) -> dict[tuple[bool, bool], dist.ProcessGroup]:
    """The groups of messages, of the ways that cuts have."""
    pipeline = plan.pipeline
    assert pipeline is not None
    names = {(True, False): "forward", (False, False): "backward"}
    if any(map(pipeline.goes_back, range(1, len(pipeline.stages)))):
        names |= {(True, True): "forward again", (False, True): "backward again"}
    return {way: along(plan.mesh, device_type, Part.LAYERS, purpose=name) for way, name in names.items()}


class PipelineSteps:
    """Runs the steps of a strategy in a pipeline.

    Args:
        strategy: whose window, random numbers and loss are used. model: cut into stages and sharded. index: of this
            rank along pp. kinds: of auxiliary losses, in the whole model.

    Attributes:
        uncounted: weights of this rank that count on another stage, in a norm over all.
        aux_tokens: tokens by which `strategy.aux_losses` must be multiplied, to be summed over ranks.
    """

    def __init__(self, strategy: Driver, model: nn.Module, plan: Plan, index: int, kinds: Sequence[str]) -> None:
        passage = passage_of(model)
        assert passage is not None and plan.pipeline is not None
        self.strategy, self.model, self.mesh = strategy, model, plan.mesh
        device = strategy.root_device
        wires = Wires(plan.mesh, strategy.global_rank, plan.pipeline, _ways(plan, device.type), device)
        self.stages = Stages(
            model, passage, wires, index, reduces_each=plan.reduce == "each", gathers_once=plan.gather == "step"
        )
        self.over = strategy.groups.stages or along(plan.mesh, device.type, Part.LAYERS, purpose="stages")
        self.tied = _TiedWeights(model, plan, device.type, strategy.global_rank)
        self.uncounted = self.tied.uncounted
        self.aux_tokens: Tensor | None = None
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self._give_gradients = _none
        self._evaluated = 0
        self._sums: dict[str, Tensor] = {}
        self._kinds = kinds

    # -- training ---------------------------------------------------------------------------------------------------

    def training_step(self, args: tuple[Any, ...], kwargs: dict[str, Any], *, is_last: bool) -> Any:
        """Keeps the call, or runs the schedule over those of the window."""
        strategy = self.strategy
        if strategy._window.num_micro_batches == 0:
            self._calls = []
        self._calls.append((args, kwargs))
        strategy._window.num_micro_batches += 1
        if not is_last:
            zero = torch.zeros((), device=strategy.root_device)
            self.aux_tokens, strategy.aux_losses = zero, dict.fromkeys(self._kinds, zero)
            return self._result(zero, zero.long())
        return self._run()

    def _run(self) -> Any:
        strategy, calls = self.strategy, self._calls
        parameters = parameters_of(strategy.model)
        give_old_ones_back = set_aside(parameters)
        self._sums = {kind: torch.zeros((), dtype=torch.float64, device=strategy.root_device) for kind in self._kinds}
        self._aux: dict[tuple[int, int], dict[str, Tensor]] = {}
        steps = Steps(
            forward=self._forward, objective=self._objective, aux=self._take_aux, before=self._before,
            weighed=self._weighed,
        )  # fmt: skip
        self._check_same_batches(calls)
        with _Logs(strategy.lightning_module, self.stages.passage) as self._logs:
            results = self.stages.step(
                [key_of(call) for call in calls], steps, lambda: strategy._after_backward(parameters)
            )
        self._logs.repeat(self.over, self.stages.has_loss)
        self._give_gradients = set_aside(parameters)
        give_old_ones_back()
        self._calls = []
        strategy.aux_losses, self.aux_tokens = self._sums, torch.ones((), device=strategy.root_device)
        zero = torch.zeros((), device=strategy.root_device)
        found = [result for result in results if result is not None]
        loss = sum((loss.double() for loss, _ in found), zero.double())
        total = sum((tokens for _, tokens in found if tokens is not None), zero.long())
        if strategy.loss == "mean":
            loss = loss / len(calls)
        strategy._window.num_tokens = total
        return self._result(loss, total)

    def _check_same_batches(self, calls: Any) -> None:
        """Checks that all stages are given the same micro-batches: the first computes with the inputs, the last with
        the targets.

        Raises:
            ConfigError: they have not.
        """
        total = torch.tensor(len(calls), dtype=torch.int64, device=self.strategy.root_device)
        for leaf in tree_leaves(calls):
            if isinstance(leaf, Tensor):
                total = total * _ODD + tensor_hash(leaf.detach()).to(total.device) + leaf.shape.numel()
        extremes = torch.stack((total, ~total))  # ~x reverses the order, so one MAX gives both extremes
        dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=self.over)
        if bool(extremes[0] != ~extremes[1]):
            raise ConfigError(
                "train_dataloader", f"rank {self.strategy.global_rank}",
                "gives the stages of a pipeline different micro-batches", "Split the data by "
                "trainer.strategy.distributed_sampler_kwargs, which is the same on all stages, not by the global rank",
            )  # fmt: skip

    def _result(self, loss: Tensor, tokens: Tensor) -> Any:
        return {"loss": loss, "num_tokens": tokens} if self.strategy.loss == "sum" else loss

    def _forward(self, number: int) -> Any:
        # Containers of its own for each stage: a step may take something out of its batch.
        args, kwargs = tree_map_only(Tensor, lambda leaf: leaf, self._calls[number])
        self._logs.batch = args[0] if args else None
        return self.strategy._module_step(*args, **kwargs)

    def _before(self, action: Action) -> AbstractContextManager[None]:
        """Random numbers of a micro-batch, for its stage; those of layers that are computed again are drawn again."""
        if action.is_forward or self.strategy.checkpointing != "none":
            return self.strategy._random_numbers(action.micro_batch, self.stages.modules_of(action.stage))
        return nullcontext()

    def _objective(self, output: Any) -> Computed:
        """As the strategy's, without auxiliary losses, which earlier stages have too."""
        strategy = self.strategy
        assert strategy.lightning_module is not None
        if strategy.loss == "sum":
            strategy._count_tokens(output)
            tokens = strategy._tokens.last
            loss, weight = output["loss"], strategy.groups.of_micro_batch(tokens).to(torch.float64)
            strategy._window.add_loss(loss)
            return Computed(loss, weight, (loss.detach(), tokens))
        if not isinstance(output, (Tensor, Mapping)):
            raise ConfigError(
                "loss", output, "training_step must return a loss for each micro-batch of a pipeline",
                "Return a loss, or use no stages",
            )  # fmt: skip
        loss = output["loss"] if isinstance(output, Mapping) else output
        share = 1 / (strategy.lightning_module.trainer.accumulate_grad_batches * strategy.groups.num_batches)
        strategy._window.add_loss(loss)
        weight = torch.tensor(share, dtype=torch.float64, device=loss.device)
        return Computed(loss * share, weight, (loss.detach(), None))

    def _take_aux(self, stage: int, number: int) -> Tensor | None:
        aux = self.strategy.take_auxiliary_loss()
        if aux is not None:
            self._aux[stage, number] = self.strategy.aux_losses
        return aux

    def _weighed(self, number: int, weight: Tensor, stage: int) -> None:
        for kind, loss in self._aux.pop((stage, number), {}).items():
            self._sums[kind] = self._sums[kind] + weight * loss.detach().double()

    def backward(self, loss: Tensor, *, is_last: bool) -> None:
        """Completes the gradients of the window, which are there since the last training step."""
        strategy = self.strategy
        if is_last:
            parameters = parameters_of(strategy.model)
            if not strategy._finish.is_open:
                strategy._finish.open(parameters)
            self._give_gradients()
            self._give_gradients = _none
            strategy._complete_gradients()

    # -- over stages ------------------------------------------------------------------------------------------------

    def of_all_stages(self, loads: Sequence[LayerLoad]) -> list[LayerLoad]:
        """The loads of all layers, in the order of the model, on every rank."""
        gathered: list[Any] = [None] * self.over.size()
        dist.all_gather_object(gathered, list(loads), group=self.over)
        pipeline = self.stages.pipeline
        found = [load for part in gathered for load in part]

        path = next(path for path, module in self.strategy.model.named_modules() if module is self.model)
        prefix = f"{path}." if path else ""

        def stage(load: LayerLoad) -> int:
            found = stage_of(pipeline, load.name.removeprefix(prefix))
            assert found is not None
            return found

        return sorted(found, key=stage)

    def evaluate(self, forward: Callable[[], Any], args: Any) -> Any:
        """A step of validation, test or prediction through all stages."""
        self._check_same_batches([args])
        strategy = self.strategy
        devices = [strategy.root_device] if strategy.root_device.type == "cuda" else []
        self._evaluated += 1
        number = self._evaluated * self.mesh.num_batches + strategy.groups.batch_index
        with _Logs(strategy.lightning_module, self.stages.passage) as logs, torch.random.fork_rng(devices):
            if isinstance(args, tuple) and args[0]:
                logs.batch = args[0][0]

            def keyed() -> Any:  # each stage draws the same numbers for its inputs
                seed_generators((strategy.seed * _ODD + number) % 2**63)
                return forward()

            result = self.stages.evaluate(key_of(args), keyed)
        logs.repeat(self.over, self.stages.has_loss)
        return result


def _none() -> None:
    """There are no gradients."""


class _Logs:
    """What a LightningModule logs while a pipeline runs, kept to be logged again on all ranks."""

    def __init__(self, module: Any, passage: Passage) -> None:
        self.module, self.passage, self.calls = module, passage, list[tuple[tuple[Any, ...], dict[str, Any]]]()
        self.batch: Any = None  # of the micro-batch that runs

    def __enter__(self) -> _Logs:
        def log(name: str, value: Any, *args: Any, **kwargs: Any) -> None:
            if hasattr(value, "compute"):
                raise ConfigError(
                    "self.log", name, "logs a metric object, which the other stages of a pipeline do not have",
                    "Log a tensor or a number, or use no stages",
                )  # fmt: skip
            if not self.passage.is_last:
                return
            if kwargs.get("batch_size") is None and self.batch is not None:
                with suppress(MisconfigurationException):
                    kwargs["batch_size"] = extract_batch_size(self.batch)
            self.calls.append(((name, value, *args), kwargs))

        self.module.log = log
        return self

    def __exit__(self, *_: object) -> None:
        del self.module.log

    def repeat(self, over: dist.ProcessGroup, has_loss: bool) -> None:
        """Logs on every rank what was logged on the stage with the loss."""
        plain = [(_on_cpu(args), _on_cpu(kwargs)) for args, kwargs in self.calls] if has_loss else []
        gathered: list[list[Any]] = [[] for _ in range(over.size())]
        dist.all_gather_object(gathered, plain, group=over)
        for args, kwargs in chain(*gathered):
            here = tree_map_only(Tensor, lambda value: value.to(self.module.device), args)
            self.module.log(*here, **kwargs)


def _on_cpu(values: Any) -> Any:
    if isinstance(values, Tensor):
        return values.detach().cpu()
    if isinstance(values, Mapping):
        return {key: _on_cpu(value) for key, value in values.items()}
    return tuple(map(_on_cpu, values)) if isinstance(values, tuple) else values


class _TiedWeights:
    """Weights that the first and the last stage both have: each has a part of the gradient, and they are summed.

    None where both are on one rank: there it is one weight, whose gradient autograd sums.

    Attributes:
        uncounted: those of the last stage, which count on the first one.
    """

    def __init__(self, model: nn.Module, plan: Plan, device_type: str, rank: int) -> None:
        assert plan.pipeline is not None
        pairs = [mesh_group_ends(plan.mesh, each) for each in range(plan.mesh.world_size)]
        tied, self.group = () if plan.pipeline.tied_to_itself else plan.pipeline.tied, None
        if tied:
            self.group = kept_groups.of_members(device_type, pairs, "tied")
        here = dict(model.named_parameters())
        self.weights = [here[name] for names in tied for name in names if name in here]
        self.uncounted = {here[last] for _, last in tied if last in here}

    @torch.no_grad()
    def sum_gradients(self) -> None:
        """Sums the gradients over both stages, in place; they have the same shards."""
        for weight in self.weights:
            without = torch.tensor(weight.grad is None, dtype=torch.int64, device=local_part(weight).device)
            dist.all_reduce(without, group=self.group)
            if int(without) == 2:
                continue
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            dist.all_reduce(local_part(weight.grad), group=self.group)

    def check_settings(self, optimizers: Sequence[Optimizer]) -> None:
        """Checks that both stages step a weight in the same way, or it would not stay the same.

        Raises:
            ConfigError: they do not.
        """
        for weight in self.weights:
            mine: list[Any] = []
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    if any(each is weight for each in group["params"]):
                        plain = {k: v for k, v in group.items() if isinstance(v, (int, float, str, bool, tuple))}
                        mine.append((type(optimizer).__name__, sorted(plain.items())))
            both: list[Any] = [None, None]
            dist.all_gather_object(both, mine, group=self.group)
            if both[0] != both[1]:
                raise ConfigError(
                    "configure_optimizers", both[0], f"steps a weight that the embedding and the head share, and the "
                    f"head's stage steps it with {both[1]}", "Give both the same settings",
                )  # fmt: skip


def mesh_group_ends(mesh: MeshSpec, rank: int) -> tuple[int, ...]:
    """The ranks of the first and the last stage for the tokens of `rank`; () where it is in neither."""
    ranks = mesh.group(Part.LAYERS, rank=rank)
    return (ranks[0], ranks[-1]) if rank in (ranks[0], ranks[-1]) else ()
