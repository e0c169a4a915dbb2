"""The weights of a pretrained model under the names that its modules have, a range of rows (or experts) at a time.

Names on disk may differ, and experts are often stored one by one; transformers has rules for both ("conversions"),
which are used as they are. Where a rule stacks experts, only the experts that are asked for are read.

Algorithm:
  1. transformers' rules name the weight that each stored tensor belongs to, and the operations that make it.
  2. Everything is checked by the headers alone: each weight there once, each expert there once, each shape right.
  3. A weight is read: its rows, its experts through the rule's operations, or (other rules) whole and then cut.
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


@dataclass
class _Recipe:
    """How a weight is made. rule: of transformers; None: the stored tensor is the weight.

    sources: (pattern of the rule, stored name), in transformers' order. by_expert: the same, of a rule that stacks.
    """

    target: str
    rule: Any = None
    sources: list[tuple[str, str]] = field(default_factory=list)
    by_expert: dict[int, list[tuple[str, str]]] = field(default_factory=lambda: defaultdict(list))


class Pretrained:
    """The weights of `model`, which is on the meta device and not yet compiled, in a folder.

    Raises:
        ConfigError: a weight or an expert is missing, there twice, or of another shape.
    """

    def __init__(self, stored: Stored, model: Any) -> None:
        self.stored, self.model = stored, model
        self.shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        self.tied: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", {}))
        self.recipes: dict[str, _Recipe] = {}
        self._assign()  # Step 1
        self._check()  # Step 2

    def read(self, name: str, rows: range) -> Iterator[tuple[range, Tensor]]:
        """Some rows of a weight's first dim (step 3), in parts, so that they need not be in memory twice.

        A weight without a dim has no rows and one part.
        """
        recipe = self.recipes[name if name in self.recipes else self.tied[name]]
        if recipe.rule is None:
            yield rows, self.stored.read(recipe.sources[0][1], rows.start, rows.stop)
        elif _stacks_experts(recipe.rule):
            for expert in rows:
                yield range(expert, expert + 1), self._convert(recipe, recipe.by_expert[expert])[name]
        else:
            yield rows, self._convert(recipe, recipe.sources)[name][rows.start : rows.stop]

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
        prefix, wanted, unknown = self.model.base_model_prefix, self.model.state_dict(), list[str]()
        for key in sorted(self.stored.tensors, key=dot_natural_key):
            name, pattern = rename_source_key(key, self._renamings, converters, prefix, wanted)
            if name not in wanted and key in wanted:
                name, pattern = rename_source_key(key, [], [], prefix, wanted)
            if name not in wanted:
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
        """As transformers says: what the class names, and buffers that older versions have saved."""
        buffers = [name for name, _ in self.model.named_buffers()]
        patterns = set(getattr(self.model, "_keys_to_ignore_on_load_unexpected", None) or ())
        if any(name.endswith("rotary_emb.inv_freq") for name in buffers):
            patterns.add(r"rotary_emb\.inv_freq")
        if any(name.endswith("position_ids") for name in buffers):
            patterns.add(r"(^|\.)position_ids$")
        return any(re.search(pattern, key) for pattern in patterns)

    def _check(self) -> None:
        recipes = {name: self.recipes.get(name) or self.recipes.get(self.tied.get(name, "")) for name in self.shapes}
        said = []
        if missing := [name for name, recipe in recipes.items() if recipe is None and name not in self.tied]:
            said.append(f"lacks {some(missing)}")
        if self._unknown:
            said.append(f"holds {some(self._unknown)}, for which the model has no place")
        if said:
            raise self.stored.error("; ".join(said), "Use a whole checkpoint of this model")
        for name, shape in self.shapes.items():
            recipe = recipes[name]
            assert recipe is not None
            if recipe.rule is None:
                self._check_plain(name, shape, recipe)
            elif _stacks_experts(recipe.rule):
                self._check_experts(name, shape, recipe)

    def _check_plain(self, name: str, shape: tuple[int, ...], recipe: _Recipe) -> None:
        keys = [key for _, key in recipe.sources]
        if len(keys) > 1:
            raise self.stored.error(f"{keys[0]} and {keys[1]} are both the weight {name}", "Remove one of them")
        self._check_shape(keys[0], shape)

    def _check_experts(self, name: str, shape: tuple[int, ...], recipe: _Recipe) -> None:
        by_pattern: dict[str, dict[int, list[str]]] = {
            pattern: defaultdict(list) for pattern in recipe.rule.source_patterns
        }
        for pattern, key in recipe.sources:
            by_pattern[pattern][self._expert((pattern, key))].append(key)
        for pattern, found in by_pattern.items():
            if twice := next((keys for keys in found.values() if len(keys) > 1), None):
                raise self.stored.error(f"{twice[0]} and {twice[1]} are the same expert", "Remove one of them")
            example = next(iter(found.values()))[0] if found else f"{name} ({pattern})"
            for expert in range(shape[0]):
                if expert not in found:
                    missing = _with_number(pattern, example, expert)
                    raise self.stored.error(f"lacks {missing}: {name} has {shape[0]} experts", "Use a whole checkpoint")
            if extra := [keys[0] for expert, keys in found.items() if expert >= shape[0]]:
                raise self.stored.error(f"{extra[0]} is one expert too many: {name} has {shape[0]}", "Mend config.json")
            most, _ = Counter(self.stored.tensors[keys[0]].shape for keys in found.values()).most_common(1)[0]
            for keys in found.values():
                self._check_shape(keys[0], most)
        self._check_whole(name, shape, recipe)

    def _check_whole(self, name: str, shape: tuple[int, ...], recipe: _Recipe) -> None:
        """One expert, made of nothing but shapes."""
        first = recipe.by_expert[0]
        made = self._convert(recipe, first, meta=True)[name]
        if tuple(made.shape[1:]) != shape[1:]:
            key = first[0][1]
            raise self.stored.error(
                f"{key} ({self.stored.tensors[key].file.name}) and the other experts make {name} "
                f"{[shape[0], *made.shape[1:]]}, the model has {list(shape)}", "Mend config.json",
            )  # fmt: skip

    def _check_shape(self, key: str, shape: tuple[int, ...]) -> None:
        stored = self.stored.tensors[key]
        if stored.shape != shape:
            raise self.stored.error(
                f"{key} in {stored.file.name} is {list(stored.shape)}, the model needs {list(shape)}",
                "Use a whole checkpoint, or mend config.json",
            )  # fmt: skip

    def _convert(self, recipe: _Recipe, sources: list[tuple[str, str]], *, meta: bool = False) -> dict[str, Tensor]:
        """The rule's weights by name, made of some of its sources."""
        rule = copy.deepcopy(recipe.rule)
        for pattern, key in sources:
            tensor = torch.empty(self.stored.tensors[key].shape, device="meta") if meta else self.stored.read(key)
            rule.add_tensor(recipe.target, key, pattern, tensor)
        made = rule.convert(recipe.target, model=self.model, config=self.model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def _expert(self, source: tuple[str, str]) -> int:
        from transformers.core_model_loading import apply_renamings

        pattern, key = source
        found = _numbered(pattern).search(apply_renamings(key, self._renamings))
        if found is None:
            raise self.stored.error(f"{key} does not say which expert it is", "Use model.load=full")
        return int(found["expert"])


def _stacks_experts(rule: Any) -> bool:
    """Whether a rule stacks one tensor an expert along dim 0 and leaves that dim alone afterwards."""
    first, *others = rule.operations
    if type(first).__name__ != "MergeModulelist" or first.dim != 0 or len(rule.target_patterns) > 1:
        return False
    return all(type(op).__name__ == "Concatenate" and op.dim > 0 for op in others)


def _numbered(pattern: str) -> re.Pattern[str]:
    """`.experts.*.w1.weight` -> a pattern whose group `expert` is the expert's number; what else it is stays."""
    return re.compile(pattern.replace("*.", r"(?P<expert>\d+)\."))


def _with_number(pattern: str, key: str, expert: int) -> str:
    """`key` for another expert."""
    found = _numbered(pattern).search(key)
    if found is None:  # a renaming has changed what the pattern matches
        return f"{key} of expert {expert}"
    return key[: found.start("expert")] + str(expert) + key[found.end("expert") :]


def non_persistent(module: nn.Module) -> dict[str, Tensor]:
    """The module's own buffers that no checkpoint holds."""
    names = module._non_persistent_buffers_set
    return {name: buffer for name, buffer in module.named_buffers(recurse=False) if name in names}
