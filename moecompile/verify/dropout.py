"""Dropout rates, set to 0: what is dropped depends on all that a process drew before, so N ranks drop other entries
than one process, and both are right.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

_SETTINGS = ("config", "cfg", "args")
"""Attributes with an object of which modules may read a rate in forward."""


def without_dropout(model: nn.Module) -> dict[str, float]:
    """Sets all rates to 0, in place: of dropout modules, in attributes named like "drop", and in a module's config, of
    which it gets a copy.

    Returns:
        the rates that were not 0, by path.
    """
    found: dict[str, float] = {}
    copies: dict[int, Any] = {}
    for path, module in model.named_modules():
        for name, value in list(vars(module).items()):
            if _is_rate(name, value, module):
                found[f"{path}.{name}".lstrip(".")] = float(value)
                setattr(module, name, 0.0)
            elif name in _SETTINGS and (rates := _rates_of(value)):
                if id(value) not in copies:
                    found.update({f"{path}.{name}.{each}".lstrip("."): rate for each, rate in rates.items()})
                    copies[id(value)] = _copy_without(value, rates)
                setattr(module, name, copies[id(value)])
    return found


def _is_rate(name: str, value: object, module: nn.Module) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
        return False
    if name == "p":
        return isinstance(module, nn.modules.dropout._DropoutNd) or "drop" in type(module).__name__.lower()
    return isinstance(value, float) and "drop" in name.lower()


def _rates_of(settings: object) -> dict[str, float]:
    if isinstance(settings, nn.Module) or not hasattr(settings, "__dict__"):
        return {}
    named = vars(settings).items()
    return {name: value for name, value in named if isinstance(value, float) and 0 < value <= 1 and "drop" in name}


def _copy_without(settings: Any, rates: dict[str, float]) -> Any:
    copied = copy.copy(settings)
    vars(copied).update(dict.fromkeys(rates, 0.0))  # setattr would refuse where it is frozen
    return copied
