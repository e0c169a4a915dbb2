"""A model that computes one stage of a pipeline at a time, by its own forward.

Units (layers, embedding, norm, head) of other stages have an `Absent` in their place. Those before the stage return
what was received of them, or zeros that nobody reads; the first one after it ends the forward. So the model's own code
between the units runs as it is: masks and positions are computed from the same inputs by each stage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moecompile.capture import seed_generators
from moecompile.errors import MoecompileError
from moecompile.stages import Pipeline, Unit
from moecompile.torch_private import own_modules, tree_leaves, tree_map_only, without_values

_PASSAGE = "_moecompile_passage"
_INSIDE = ("output_router_logits", "output_hidden_states", "output_attentions")
"""Arguments by which a model of transformers notes what its layers make: here those of a stage alone."""
_STAGE = 0x9E3779B97F4A7C15  # odd and large: seeds of neighbouring stages are far apart


class _Ended(Exception):
    """The forward of a stage has come to the first unit after it."""


class StageEnded(BaseException):
    """Leaves the code that has called the model, which must not hold it back: this stage has no result for it.

    sent: the tensors that the next stage receives, in the order of its crossings and their places.
    """

    def __init__(self, sent: tuple[Tensor, ...]) -> None:
        super().__init__("this stage of the pipeline has ended")
        self.sent = sent


@dataclass
class Passage:
    """What a model that is cut into stages computes now.

    Attributes:
        stage: now; None: the model must not be called. calls: of the model in this stage so far.
        received: unit -> entries of its output that came from the stage before.
        made: unit -> its output, of those that later stages need.
        absent: unit -> what stands in its place; present: unit -> the module itself, of those that this rank has.
    """

    pipeline: Pipeline
    stage: int | None = None
    calls: int = 0
    received: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)
    made: dict[str, tuple[Tensor, ...]] = field(default_factory=dict)
    absent: dict[str, Absent] = field(default_factory=dict)
    present: dict[str, nn.Module] = field(default_factory=dict)

    @property
    def is_last(self) -> bool:
        """Whether the current stage is the last one."""
        return self.stage == len(self.pipeline.stages) - 1

    @property
    def sent(self) -> tuple[Tensor, ...]:
        """What the stage after the current one receives."""
        assert self.stage is not None
        found: list[Tensor] = []
        for crossing in self.pipeline.stages[self.stage + 1].receives:
            source = self.made if crossing.unit in self.made else self.received
            if crossing.unit not in source:
                raise MoecompileError(
                    f"stage {self.stage} ended before {crossing.unit} was called, whose output the next needs"
                )
            found += self._entries(crossing.unit, crossing.places, source[crossing.unit])
        return tuple(found)

    def _entries(self, unit: str, places: Sequence[int], held: Sequence[Tensor]) -> list[Tensor]:
        """Entries of a unit's output, of which all (it was made here) or those of its crossing are held."""
        if unit in self.made:
            return [held[place] for place in places]
        assert self.stage is not None
        of = next(c for c in self.pipeline.stages[self.stage].receives if c.unit == unit)
        return [held[of.places.index(place)] for place in places]

    @contextmanager
    def running(self, model: nn.Module, stage: int, tensors: Sequence[Tensor]) -> Iterator[None]:
        """The model computes this stage; tensors: what it receives, as `sent` of the stage before."""
        left = list(tensors)
        for crossing in self.pipeline.stages[stage].receives:
            number = len(crossing.places)
            self.received[crossing.unit], left = tuple(left[:number]), left[number:]
        assert not left
        self.stage, self.calls = stage, 0
        own = {unit.path for unit in self.pipeline.stages[stage].units}
        put(model, {path: module if path in own else self.absent[path] for path, module in self.present.items()})
        try:
            yield
        finally:
            self.stage, self.received, self.made = None, {}, {}
            put(model, self.present)

    def __deepcopy__(self, memo: dict[int, Any]) -> Passage:
        return self


def put(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Puts modules at these paths of the model."""
    for path, module in modules.items():
        owner, _, name = path.rpartition(".")
        own_modules(model.get_submodule(owner))[name] = module


class Absent(nn.Module):
    """Stands for a unit of another stage; has its plain attributes, and no weights.

    Args:
        unit: whose output it returns. stage: to which it belongs. shape: a copy of its module on the meta device, which
            has its attributes and shapes.
    """

    def __init__(self, unit: Unit, stage: int, shape: nn.Module, passage: Passage) -> None:
        super().__init__()
        vars(self).update(unit=unit, of_stage=stage, passage=passage, shape=shape)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["shape"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What was received of the unit, or zeros; ends the forward if its stage comes later."""
        if self.passage.stage is None:
            raise MoecompileError(f"{self.unit.path} is on another stage of the pipeline")
        if self.of_stage > self.passage.stage:
            raise _Ended("a part of the model was called by itself, which has the layers of one stage alone")
        if self.unit.path in self.passage.received:
            crossing = next(
                c for c in self.passage.pipeline.stages[self.passage.stage].receives if c.unit == self.unit.path
            )
            return self._formed(dict(zip(crossing.places, self.passage.received[self.unit.path], strict=True)))
        if self.unit.is_layer:
            hidden = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
            return self._formed({0: hidden})
        return self._zeros(*args, **kwargs)

    def _formed(self, entries: Mapping[int, Tensor]) -> Any:
        if self.unit.form not in ("tuple", "list"):
            return entries[0]
        output = [entries.get(i) for i in range(self.unit.size)]
        return output if self.unit.form == "list" else tuple(output)

    @torch.no_grad()
    def _zeros(self, *args: Any, **kwargs: Any) -> Any:
        # Llama 4 moves ids to the device of the embedding's weight, which is meta here.
        tensors = [*tree_leaves(self.passage.received), *tree_leaves((args, kwargs))]
        device = next(leaf for leaf in tensors if isinstance(leaf, Tensor)).device
        meta = tree_map_only(Tensor, lambda x: x.detach().to("meta"), (args, kwargs))
        output = self.shape(*meta[0], **meta[1])
        return tree_map_only(Tensor, lambda x: torch.zeros(x.shape, dtype=x.dtype, device=device), output)


# -- the whole model ------------------------------------------------------------------------------------------------


def passage_of(model: nn.Module) -> Passage | None:
    """That of a model that is cut into stages; None: it is whole."""
    found: Passage | None = vars(model).get(_PASSAGE)
    return found


def is_here(model: nn.Module, path: str) -> bool:
    """Whether the module at `path` is on this rank: always, unless the model is cut into stages."""
    passage = passage_of(model)
    if passage is None:
        return True
    units = [unit for unit in passage.absent if f"{path}.".startswith(f"{unit}.")]
    return not units or units[0] in passage.present


def tied_names(model: nn.Module) -> dict[str, str]:
    """Names of weights of the last stage that are copies of the first one's -> their names in the whole model.

    Empty where the last stage is not here. model: cut into stages, or with such a model inside.
    """
    found = next(((path, p) for path, module in model.named_modules() if (p := passage_of(module))), None)
    if found is None:
        return {}
    prefix, pipeline = f"{found[0]}." if found[0] else "", found[1].pipeline
    here = dict(model.named_parameters())
    return {prefix + last: prefix + first for first, last in pipeline.tied if prefix + last in here}


def cut_into_stages(
    model: nn.Module, pipeline: Pipeline, stages: Sequence[int],
    shapes_of: Callable[[nn.Module], nn.Module] = without_values,
) -> Passage:  # fmt: skip
    """Keeps the units of these stages and puts an `Absent`, with the shapes of the module, in the place of each other
    one; in place.
    """
    passage = Passage(pipeline)
    for number, stage in enumerate(pipeline.stages):
        for unit in stage.units:
            module = model.get_submodule(unit.path)
            passage.absent[unit.path] = Absent(unit, number, shapes_of(module), passage)
            if number in stages:
                passage.present[unit.path] = module
    put(model, {path: absent for path, absent in passage.absent.items() if path not in passage.present})
    own = vars(model).get("forward")
    whole = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if passage.stage is None:
            raise MoecompileError(
                "this rank has some stages of the model alone, so the model can be called in training_step, "
                "validation_step, test_step and predict_step only, where the strategy runs all stages"
            )
        if asked := [name for name in _INSIDE if kwargs.get(name)]:
            raise MoecompileError(
                f"the model is called with {', '.join(asked)}, and a stage of a pipeline has what its own layers make "
                "alone: leave it out (balance=aux balances routers), or use no stages"
            )
        passage.calls += 1
        if passage.calls > 1:
            raise MoecompileError(
                "the model is called twice in a step, and earlier stages of a pipeline end theirs at the first call: "
                "call it once, with both inputs in one batch, or use no stages"
            )
        if passage.is_last:
            return whole(*args, **kwargs)
        try:
            whole(*args, **kwargs)
        except _Ended:
            return passage.sent
        raise MoecompileError(f"the forward of stage {passage.stage} returned before it came to the next one")

    forward.without_stages = own  # type: ignore[attr-defined]
    model.forward = forward
    vars(model)[_PASSAGE] = passage
    return passage


def end_stages(model: nn.Module) -> list[RemovableHandle]:
    """Adds the hooks that note what later stages need, and that leave the calling code at the end of a stage.

    They come after those of FSDP, which must see that a module has returned.
    """
    passage = passage_of(model)
    assert passage is not None
    needed = {crossing.unit for stage in passage.pipeline.stages for crossing in stage.receives}
    noted = [path for path in passage.present if path in needed]
    handles = [passage.present[path].register_forward_hook(_noted(path, passage)) for path in noted]

    for number, stage in enumerate(passage.pipeline.stages):
        first = stage.units[0].path
        if number and first in passage.present:
            handles.append(passage.present[first].register_forward_pre_hook(_seeded(number, passage)))

    def leave(_: nn.Module, args: Any, output: Any) -> None:
        if passage.stage is not None and not passage.is_last:
            raise StageEnded(output)

    return [*handles, model.register_forward_hook(leave)]


def _seeded(stage: int, passage: Passage) -> Any:
    """A stage draws other numbers than the one before, which began with the same seed of the micro-batch."""

    def seed(_: nn.Module, args: Any) -> None:
        if passage.stage is not None and torch.is_grad_enabled():
            seed_generators((torch.initial_seed() + stage * _STAGE) % 2**63)

    return seed


def _noted(path: str, passage: Passage) -> Any:
    def note(_: nn.Module, args: Any, output: Any) -> None:
        passage.made[path] = (output,) if isinstance(output, Tensor) else tuple(output)

    return note


def uncut(model: nn.Module) -> None:
    """Undoes `cut_into_stages` of all stages in one process."""
    passage = passage_of(model)
    assert passage is not None
    put(model, passage.present)
    own = model.forward.without_stages  # type: ignore[attr-defined]
    del model.forward
    if own is not None:
        model.forward = own
    del vars(model)[_PASSAGE]
