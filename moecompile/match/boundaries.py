"""Where a model may be cut into stages of a pipeline, and what crosses each cut: from the recorded dataflow.

Every stage runs the model's own forward on the same inputs. Modules of other stages do not run: what comes before the
stage returns what was received (or zeros, if nobody reads it), and the first module after the stage ends the forward.
Masks, positions and whatever else is computed between the modules is computed again by each stage.

Algorithm:
  1. Units are what belongs to one stage as a whole: the layers, and outside of them the outermost modules that have
     weights. Each is called once, and never again after a later unit has begun.
  2. A boundary is before a layer. Units that begin before it are on its earlier side.
  3. What the later side reads of the earlier one, through the code between units, is the live set: outputs of units.
     Every stage that comes later receives what it, or a stage after it, reads.
  4. A weight that both sides use is shared across the cut, which only tied embeddings may be.

    later side:   layer 2 <- x * w <- output of layer 1       crosses: the output of layer 1
                  layer 3 <- scale(output of embedding)       crosses: the output of the embedding, through each stage
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

from torch import Tensor, fx
from torch.nn import Parameter

from moecompile.capture import Example, layers_of
from moecompile.capture.record import TENSOR, Recording
from moecompile.stages import Crossing, Stage, Unit
from moecompile.torch_private import tree_leaves


@dataclass(frozen=True, kw_only=True)
class _Called:
    """A unit in the recording. first, last: places of its first and last function."""

    unit: Unit
    first: int
    last: int

    @property
    def path(self) -> str:
        """Of the module."""
        return self.unit.path

    @property
    def is_layer(self) -> bool:
        """Whether it is one of the layers."""
        return self.unit.is_layer


class Boundaries:
    """The units of a recorded model, and what crosses a cut.

    Attributes:
        units: in the order of their calls.
        refused: why the model cannot be cut anywhere; empty: it can.
    """

    def __init__(self, recording: Recording) -> None:
        self.recording, self.tokens = recording, tokens_of(recording.example)
        self.model = recording.model
        self.order = {node: i for i, node in enumerate(recording.graph.nodes)}
        self.units = self._units()
        self._unit_of_node = {node: self._holder(str(node.meta.get("owner", ""))) for node in self.order}
        self.layers = [unit.path for unit in self.units if unit.is_layer]
        self.refused = self._refused()

    # -- units ------------------------------------------------------------------------------------------------------

    def _units(self) -> list[_Called]:
        """Step 1."""
        names = {module: path for path, module in self.model.named_modules()}
        layers = [names[layer] for layer in layers_of(self.model)]
        above = {path.rpartition(".")[0] for path in layers}
        above |= {parent for path in above for parent in _parents(path)} | {""}
        units: dict[str, bool] = dict.fromkeys(layers, True)
        for path in self.recording.calls:
            module = self.model.get_submodule(path)
            inside = any(path == unit or path.startswith(f"{unit}.") for unit in units)
            if path not in above and not inside and any(True for _ in module.parameters()):
                units[path] = False
        places: dict[str, list[int]] = {path: [] for path in units}
        for node, place in self.order.items():
            owner = str(node.meta.get("owner", ""))
            for path in (owner, *_parents(owner)):
                if path in places:
                    places[path].append(place)
        found = [
            _Called(unit=self._unit(path, is_layer=is_layer), first=min(places[path]), last=max(places[path]))
            for path, is_layer in units.items()
            if places[path]
        ]
        return sorted(found, key=lambda called: called.first)

    def _unit(self, path: str, *, is_layer: bool) -> Unit:
        form = self.recording.forms.get(path)
        if isinstance(form, (tuple, list)):
            return Unit(path=path, is_layer=is_layer, form=type(form).__name__, size=len(form))
        return Unit(path=path, is_layer=is_layer, form=str(form))

    def _holder(self, owner: str) -> str | None:
        paths = {unit.path for unit in self.units}
        return next((path for path in (owner, *_parents(owner)) if path in paths), None)

    def _refused(self) -> str:
        layers = [unit for unit in self.units if unit.is_layer]
        if len(layers) < 2:
            return f"it has {len(layers)} layers in a list of modules that are called one after another"
        for unit in self.units:
            if (times := self.recording.runs[unit.path]) > 1:
                return f"{unit.path} is called {times} times in a forward"
        for one, other in zip(self.units, self.units[1:], strict=False):
            if one.last > other.first:
                return f"{other.path} is called inside of {one.path}"
        weights = dict(self.model.named_parameters())
        for node in self.order:
            is_weight = node.op == "get_attr" and node.target in weights
            if is_weight and any(self._unit_of_node[user] is None for user in node.users):
                return f"the weight {node.target} is used between its layers, and belongs to no module of one stage"
        return ""

    # -- a cut ------------------------------------------------------------------------------------------------------

    def stages(self, firsts: Sequence[str]) -> tuple[Stage, ...]:
        """The stages of a pipeline. firsts: the first layer of each stage but the first one.

        Raises:
            ValueError: why the model cannot be cut so.
        """
        units = self.stage_units(firsts)
        by_path = {called.path: called.unit for called in self.units}
        return tuple(
            Stage(units=tuple(by_path[path] for path in paths), receives=received)
            for paths, received in zip(units, self.crossings(units), strict=True)
        )

    def stage_units(self, firsts: Sequence[str]) -> list[list[str]]:
        """The units of each stage. firsts: the first layer of each stage but the first one.

        A unit between two layers belongs to the stage of the later one.
        """
        stages: list[list[str]] = [[]]
        waiting: list[str] = []
        for unit in self.units:
            if not unit.is_layer:
                waiting.append(unit.path)
                continue
            if unit.path in firsts:
                stages.append([])
            stages[-1] += [*waiting, unit.path]
            waiting = []
        stages[-1] += waiting
        return stages

    def crossings(self, stages: Sequence[Sequence[str]]) -> list[tuple[Crossing, ...]]:
        """What each stage receives: the live set of the cut before it (step 3). The first receives nothing.

        Raises:
            ValueError: why the model cannot be cut so.
        """
        place = {path: i for i, units in enumerate(stages) for path in units}
        self._check_shared(place)
        needed: list[dict[fx.Node, str]] = [self._read(i, place, i == len(stages) - 1) for i in range(len(stages))]
        received: list[tuple[Crossing, ...]] = [()]
        for stage in range(1, len(stages)):
            live = {node: unit for later in needed[stage:] for node, unit in later.items() if place[unit] < stage}
            if not live:
                raise ValueError(f"nothing that {stages[stage][0]} reads comes from the layers before it")
            by_unit: dict[str, list[fx.Node]] = {}
            for node, unit in live.items():
                by_unit.setdefault(unit, []).append(node)
            ordered = [unit.path for unit in self.units if unit.path in by_unit]
            received.append(tuple(self._crossing(unit, by_unit[unit]) for unit in ordered))
        return received

    def _read(self, stage: int, place: dict[str, int], is_last: bool) -> dict[fx.Node, str]:
        """Nodes in units of earlier stages that a stage reads -> their unit."""
        pending = [node for node in self.order if (unit := self._unit_of_node[node]) and place[unit] == stage]
        if is_last:
            pending += [node for node in self.recording.made.get("", ()) if node is not None]
        seen, found = set(pending), dict[fx.Node, str]()
        while pending:
            node = _before_casts(pending.pop())
            unit = self._unit_of_node[node]
            if unit is not None and place[unit] != stage:
                if place[unit] > stage:
                    raise ValueError(f"{unit} is read by a layer before it")
                found[node] = unit
                continue
            for read in node.all_input_nodes:
                if read not in seen:
                    seen.add(read)
                    pending.append(read)
        return found

    def _crossing(self, unit: str, nodes: Collection[fx.Node]) -> Crossing:
        made = [None if node is None else _before_casts(node) for node in self.recording.made.get(unit, ())]
        form = self.recording.forms.get(unit)
        if form != TENSOR and not isinstance(form, (tuple, list)):
            raise ValueError(f"the output of {unit} is a {form}, not a tensor or a tuple of tensors")
        entries = [form] if form == TENSOR else list(form)
        if other := next((each for each in entries if each not in (TENSOR, None)), None):
            raise ValueError(f"the output of {unit} has a {_in_words(other)}, and tensors alone cross a cut")
        for node in nodes:
            if node not in made:
                raise ValueError(f"the result of {node.name} inside of {unit} is read after it, and is no output of it")
        tensors = [i for i, entry in enumerate(entries) if entry == TENSOR]
        places = tuple(tensors[i] for i, node in enumerate(made) if node in nodes)
        shapes = [made[tensors.index(i)].meta["shape"] for i in places]  # type: ignore[union-attr]
        numbers = sum(map(prod, shapes)) / self.tokens
        return Crossing(unit=unit, places=places, numbers=numbers)

    # -- weights ----------------------------------------------------------------------------------------------------

    def _check_shared(self, place: dict[str, int]) -> None:
        """Step 4."""
        tied = {name for names in self.tied for name in names}
        for names in self._names.values():
            stages = {place[unit] for name in names if (unit := self._holder(name.rpartition(".")[0])) in place}
            if len(stages) > 1 and not tied.issuperset(names):
                raise ValueError(f"the weight {names[0]} is also {names[1]}, of another stage")

    @cached_property
    def _names(self) -> dict[Parameter, list[str]]:
        names: dict[Parameter, list[str]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            names.setdefault(parameter, []).append(name)
        return {parameter: found for parameter, found in names.items() if len(found) > 1}

    @cached_property
    def tied(self) -> tuple[tuple[str, str], ...]:
        """Names of weights of one unit before all layers and of one after them, in that order."""
        layers = [unit for unit in self.units if unit.is_layer]
        first = {unit.path for unit in self.units if unit.first < layers[0].first}
        last = {unit.path for unit in self.units if unit.first > layers[-1].first}
        found: list[tuple[str, str]] = []
        for names in self._names.values():
            early = [name for name in names if self._holder(name.rpartition(".")[0]) in first]
            late = [name for name in names if self._holder(name.rpartition(".")[0]) in last]
            if len(early) == len(late) == 1 and len(names) == 2:
                found.append((early[0], late[0]))
        return tuple(found)


def _before_casts(node: fx.Node) -> fx.Node:
    """The node of the same tensor before casts to the dtype that it had, whoever asked for them."""
    while "same" in node.meta:
        node = node.meta["same"]
    return node


def _parents(path: str) -> Iterator[str]:
    while path:
        path = path.rpartition(".")[0]
        yield path


def _in_words(form: object) -> str:
    return f"{type(form).__name__} in it" if isinstance(form, (tuple, list)) else str(form)


def tokens_of(example: Example) -> int:
    """Tokens of an example: entries of its token ids or mask, or rows of its first input."""
    if isinstance(example, Mapping):
        named = next((example[name] for name in ("input_ids", "attention_mask") if name in example), None)
        if named is not None:
            return named.numel()
    first = next(leaf for leaf in tree_leaves(example) if isinstance(leaf, Tensor))
    return first.shape[:-1].numel() if first.is_floating_point() else first.numel()
