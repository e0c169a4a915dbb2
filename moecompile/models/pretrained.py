"""Reads the weights of a pretrained model by the names of its modules, a range of rows (or experts) at a time.

Names on disk may differ, and experts are often stored separately. transformers has rules for both ("conversions"),
which are applied here. If a rule stacks experts, only the requested experts are read.

Algorithm:
  1. Find the weight that each stored tensor belongs to, and the operations that build it, from transformers' rules.
  2. Check from the headers that each weight, each part of one and each expert is there exactly once, with the right
     shape.
  3. Read a weight: its rows, also of parts that a rule joins; its experts, through the operations of the rule; or
     (other rules) all of it, then cut.
"""

from __future__ import annotations

import copy
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from moecompile.models.loading import some
from moecompile.models.stored import Stored
from moecompile.torch_private import non_persistent as own_non_persistent


@dataclass
class _Recipe:
    """How to build a weight. rule: of transformers; None: the stored tensor is the weight.

    sources: (pattern of the rule, stored name), in transformers' order. by_expert: the same for a rule that stacks.
    """

    target: str
    rule: Any = None
    sources: list[tuple[str, str]] = field(default_factory=list)
    by_expert: dict[int, list[tuple[str, str]]] = field(default_factory=lambda: defaultdict(list))


_SCALES = ("_scale_inv", "_scale", "_scales", "_blocks", ".absmax", ".qweight")
"""Ends of the names that quantized checkpoints have beside weights, or in place of them."""


class Pretrained:
    """The stored weights of `model`, which is on the meta device and not compiled yet.

    Raises:
        ConfigError: a weight or an expert is missing, duplicated, or of another shape.
    """

    note: str | None = None

    def __init__(self, stored: Stored, model: Any) -> None:
        self.stored, self.model = stored, model
        self.shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        self.tied: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", {}))
        self.recipes: dict[str, _Recipe] = {}
        self._assign()  # Step 1
        self._check()  # Step 2

    def names(self) -> Iterator[str]:
        """All weights, in the order of the model's modules."""
        return iter(self.shapes)

    def read(self, name: str, rows: range, within: tuple[slice, ...] = ()) -> Iterator[tuple[range, Tensor]]:
        """Rows of a weight's first dim (step 3), in parts, so that they are not in memory twice.

        A scalar has no rows and one part.

        Args:
            within: what is read of each row: a slice for each of the other dims; empty: all.
        """
        recipe = self.recipes[name if name in self.recipes else self.tied[name]]
        if recipe.rule is None:
            yield rows, self.stored.read(recipe.sources[0][1], rows.start, rows.stop, within)
        elif _stacks_experts(recipe.rule):
            for expert in rows:
                yield range(expert, expert + 1), self._expert_part(recipe, expert, within)
        elif _joins_rows(recipe.rule):
            yield from self._joined(recipe, rows, within)
        else:
            yield rows, self._convert(recipe, recipe.sources)[name][rows.start : rows.stop, *within]

    def _joined(
        self, recipe: _Recipe, rows: range, within: tuple[slice, ...]
    ) -> Iterator[tuple[range, Tensor]]:  # fmt: skip
        """Rows of a table that is stored in parts."""
        past = 0
        for _, key in sorted(recipe.sources, key=lambda source: recipe.rule.source_patterns.index(source[0])):
            held = range(past, past + self.stored.tensors[key].shape[0])
            part = range(max(rows.start, held.start), min(rows.stop, held.stop))
            if part:
                yield part, self.stored.read(key, part.start - past, part.stop - past, within)
            past = held.stop

    def _expert_part(self, recipe: _Recipe, expert: int, within: tuple[slice, ...]) -> Tensor:
        """A stack of one expert; of one that is cut, only what is `within` is read."""
        sources, shape = recipe.by_expert[expert], self.shapes[recipe.target]
        dims = [op.dim - 1 for op in recipe.rule.operations[1:]]  # along which its tensors lie beside each other
        if all(cut == slice(0, size) for cut, size in zip(within, shape[1:], strict=False)) or len(dims) > 1:
            return self._convert(recipe, sources)[recipe.target][:, *within]
        parts, past = [], 0
        for _, key in sorted(sources, key=lambda source: recipe.rule.source_patterns.index(source[0])):
            mine = list(within)
            for dim in dims:
                size = self.stored.tensors[key].shape[dim]
                mine[dim] = slice(max(0, within[dim].start - past), min(size, within[dim].stop - past))
                past += size
            if all(cut.start < cut.stop for cut in mine):
                parts.append(self.stored.read(key, mine[0].start, mine[0].stop, tuple(mine[1:])))
        return torch.cat(parts, *dims).unsqueeze(0)

    def whole(self, name: str) -> Tensor:
        """All rows of a weight."""
        shape = self.shapes[name]
        parts = [part for _, part in self.read(name, range(shape[0] if shape else 0))]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _assign(self) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            dot_natural_key,
            rename_source_key,
        )

        rules = get_model_conversion_mapping(self.model)
        self._renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
        prefix, weights, unknown = self.model.base_model_prefix, self.model.state_dict(), list[str]()
        for key in sorted(self.stored.tensors, key=dot_natural_key):
            name, pattern = rename_source_key(key, self._renamings, converters, prefix, weights)
            if name not in weights and key in weights:
                name, pattern = rename_source_key(key, [], [], prefix, weights)
            if name not in weights:
                unknown.append(key)
                continue
            rule: Any = by_pattern[pattern] if pattern is not None else None
            recipe = self.recipes.setdefault(name, _Recipe(name, rule))
            recipe.sources.append((pattern or name, key))
            if rule is not None and _stacks_experts(rule):
                recipe.by_expert[self._expert(recipe.sources[-1])].append(recipe.sources[-1])
            for other in rule.target_patterns[1:] if rule is not None else ():
                self.recipes[name.replace(rule.target_patterns[0], other, 1)] = recipe
        self._unknown = [key for key in unknown if not self._may_be_ignored(key)]

    def _may_be_ignored(self, key: str) -> bool:
        """As in transformers: names that the class ignores, and buffers that older versions saved."""
        buffers = [name for name, _ in self.model.named_buffers()]
        patterns = set(getattr(self.model, "_keys_to_ignore_on_load_unexpected", None) or ())
        if any(name.endswith("rotary_emb.inv_freq") for name in buffers):
            patterns.add(r"rotary_emb\.inv_freq")
        if any(name.endswith("position_ids") for name in buffers):
            patterns.add(r"(^|\.)position_ids$")
        return any(re.search(pattern, key) for pattern in patterns)

    def _check(self) -> None:
        recipes = {name: self.recipes.get(name) or self.recipes.get(self.tied.get(name, "")) for name in self.shapes}
        problems = []
        if missing := [name for name, recipe in recipes.items() if recipe is None and name not in self.tied]:
            problems.append(f"lacks {some(missing)}")
        if self._unknown:
            problems.append(f"holds {some(self._unknown)}, which the model does not have")
        if any(key.endswith(_SCALES) for key in self._unknown):
            rule = f"holds {some(self._unknown)}: weights in 8 bits or fewer with scales, which are not read by shards"
            raise self.stored.error(rule, "Use model.load=full, with which transformers makes bf16 weights of them")
        if problems:
            raise self.stored.error("; ".join(problems), "Use a whole checkpoint of this model")
        for name, shape in self.shapes.items():
            recipe = recipes[name]
            assert recipe is not None
            if recipe.rule is None:
                self._check_plain(name, shape, recipe)
            elif _stacks_experts(recipe.rule):
                self._check_experts(name, shape, recipe)
            else:
                self._check_made(name, shape, recipe)

    def _check_plain(self, name: str, shape: tuple[int, ...], recipe: _Recipe) -> None:
        keys = [key for _, key in recipe.sources]
        if len(keys) > 1:
            raise self.stored.error(f"{keys[0]} and {keys[1]} are both the weight {name}", "Remove one of them")
        self._check_shape(keys[0], shape)

    def _check_made(self, name: str, shape: tuple[int, ...], recipe: _Recipe) -> None:
        """Checks the shape of a weight that other rules make; of tables in parts, so that no part is missing."""
        try:
            made: Any = tuple(self._convert(recipe, recipe.sources, meta=True)[name].shape)
        except NotImplementedError:  # it depends on values
            return
        except (RuntimeError, ValueError, KeyError, IndexError) as error:
            made = f"no weight ({error})"
        if made != shape:
            keys = some(key for _, key in recipe.sources)
            rule = (
                f"{keys} make {made if isinstance(made, str) else list(made)} of {name}, the model needs {list(shape)}"
            )
            raise self.stored.error(rule, "Use a whole checkpoint, or correct config.json")

    def _check_experts(self, name: str, shape: tuple[int, ...], recipe: _Recipe) -> None:
        by_pattern: dict[str, dict[int, list[str]]] = {
            pattern: defaultdict(list) for pattern in recipe.rule.source_patterns
        }
        for pattern, key in recipe.sources:
            by_pattern[pattern][self._expert((pattern, key))].append(key)
        for pattern, by_expert in by_pattern.items():
            if twice := next((keys for keys in by_expert.values() if len(keys) > 1), None):
                raise self.stored.error(f"{twice[0]} and {twice[1]} are the same expert", "Remove one of them")
            example = next(iter(by_expert.values()))[0] if by_expert else f"{name} ({pattern})"
            for expert in range(shape[0]):
                if expert not in by_expert:
                    missing = _with_number(pattern, example, expert)
                    raise self.stored.error(f"lacks {missing}: {name} has {shape[0]} experts", "Use a whole checkpoint")
            if extra := [keys[0] for expert, keys in by_expert.items() if expert >= shape[0]]:
                rule = f"{extra[0]} is one expert too many: {name} has {shape[0]}"
                raise self.stored.error(rule, "Correct config.json")
            usual, _ = Counter(self.stored.tensors[keys[0]].shape for keys in by_expert.values()).most_common(1)[0]
            for keys in by_expert.values():
                self._check_shape(keys[0], usual)
        self._check_whole(name, shape, recipe)

    def _check_whole(self, name: str, shape: tuple[int, ...], recipe: _Recipe) -> None:
        """Checks the shape of one expert, converted on the meta device."""
        first = recipe.by_expert[0]
        converted = self._convert(recipe, first, meta=True)[name]
        if tuple(converted.shape[1:]) != shape[1:]:
            key = first[0][1]
            raise self.stored.error(
                f"{key} ({self.stored.tensors[key].file.name}) and the other experts make {name} "
                f"{[shape[0], *converted.shape[1:]]}, the model has {list(shape)}", "Correct config.json",
            )  # fmt: skip

    def _check_shape(self, key: str, shape: tuple[int, ...]) -> None:
        stored = self.stored.tensors[key]
        if stored.shape != shape:
            raise self.stored.error(
                f"{key} in {stored.file.name} is {list(stored.shape)}, the model needs {list(shape)}",
                "Use a whole checkpoint, or correct config.json",
            )  # fmt: skip

    def _convert(self, recipe: _Recipe, sources: list[tuple[str, str]], *, meta: bool = False) -> dict[str, Tensor]:
        """The weights of a rule by name, converted from some of its sources."""
        rule = copy.deepcopy(recipe.rule)
        for pattern, key in sources:
            tensor = torch.empty(self.stored.tensors[key].shape, device="meta") if meta else self.stored.read(key)
            rule.add_tensor(recipe.target, key, pattern, tensor)
        weights = rule.convert(recipe.target, model=self.model, config=self.model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in weights.items()}

    def _expert(self, source: tuple[str, str]) -> int:
        from transformers.core_model_loading import apply_renamings

        pattern, key = source
        match = _numbered(pattern).search(apply_renamings(key, self._renamings))
        if match is None:
            raise self.stored.error(f"{key} has no expert number", "Use model.load=full")
        return int(match["expert"])


def _stacks_experts(rule: Any) -> bool:
    """Whether a rule stacks one tensor per expert along dim 0 and does not change that dim afterwards."""
    first, *others = rule.operations
    if type(first).__name__ != "MergeModulelist" or first.dim != 0 or len(rule.target_patterns) > 1:
        return False
    return all(type(op).__name__ == "Concatenate" and op.dim > 0 for op in others)


def _joins_rows(rule: Any) -> bool:
    """Whether a rule puts tensors one below another, and does nothing else."""
    kinds = [(type(op).__name__, getattr(op, "dim", None)) for op in rule.operations]
    return kinds == [("Concatenate", 0)] and len(rule.target_patterns) == 1


def _numbered(pattern: str) -> re.Pattern[str]:
    """`.experts.*.w1.weight` -> the same pattern with a group `expert` for the number of the expert."""
    return re.compile(pattern.replace("*.", r"(?P<expert>\d+)\."))


def _with_number(pattern: str, key: str, expert: int) -> str:
    """`key` with the number of another expert."""
    match = _numbered(pattern).search(key)
    if match is None:  # the pattern matches only a renamed key
        return f"{key} of expert {expert}"
    return key[: match.start("expert")] + str(expert) + key[match.end("expert") :]


def non_persistent(module: nn.Module) -> dict[str, Tensor]:
    """The module's own non-persistent buffers, which are in no checkpoint."""
    names = own_non_persistent(module)
    return {name: buffer for name, buffer in module.named_buffers(recurse=False) if name in names}
