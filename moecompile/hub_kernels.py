"""Keeps native kernels of a hub out: by the environment of tasks and ranks, and out of models that have them.

transformers (by itself since 5.25) puts native code of a hub in the place of forwards: when weights are loaded, and at
each change between `model.train()` and `model.eval()`, so also after a model was captured and compared. What is loaded
here is loaded without (`models/without_hub_code.py`); a model that the user has loaded has them taken off.
"""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any

from moecompile.errors import ConfigError

VARIABLE, OFF = "USE_HUB_KERNELS", "NO"
_MEANS_OFF = ("no", "n", "false", "0", "off")
_FIX = "Load it without: from_pretrained(..., use_kernels=False)"


def switch_off(*, told: bool = True) -> None:
    """Sets the variable of this process, before transformers is imported: its decorators read it then.

    Args:
        told: whether it is said that a user's own value does not hold.
    """
    given = os.environ.get(VARIABLE, OFF)
    os.environ[VARIABLE] = OFF
    if told and given.lower() not in _MEANS_OFF:
        print(f"{VARIABLE}={given} does not hold here: no native code of a hub is run, so it is {OFF}", file=sys.stderr)


def take_off(model: Any) -> None:
    """Gives every layer of `model` its own forward again, if kernels of a hub have taken its place, and says so.

    Afterwards `train()` and `eval()` do not bring them back.

    Raises:
        ConfigError: they cannot be taken off.
    """
    if not (having := [module for module in model.modules() if _has_kernels(module)]):
        return
    for module in having:
        name = type(module).__name__
        if getattr(module, "kernel_config", None) is not None:  # may have given it other layers, not only forwards
            raise ConfigError("model", name, "was loaded with a kernel_config, which gives it code of a hub", _FIX)
        try:
            with _allowed():
                module.reset_kernels()
        except Exception as error:  # of another library
            reason = " ".join(str(error).split()).rstrip(".") or type(error).__name__
            rule = f"has kernels of a hub, which cannot be taken off: {reason}"
            raise ConfigError("model", name, rule, _FIX) from error
        if _has_kernels(module) or any("_kernel_repo" in vars(each) for each in module.modules()):
            raise ConfigError("model", name, "has kernels of a hub, which stay when they are taken off", _FIX)
    names = " and ".join(dict.fromkeys(type(module).__name__ for module in having))
    warnings.warn(
        f"{names} had kernels of a hub, native code that nothing here compares; they are taken off. {_FIX}",
        stacklevel=3,
    )


def _has_kernels(module: Any) -> bool:
    kind = type(module)  # wrappers answer with the attributes of what they hold
    return hasattr(kind, "use_kernels") and module.use_kernels is True


@contextlib.contextmanager
def _allowed() -> Iterator[None]:
    """transformers refuses to take kernels off where the variable forbids them. Nothing is loaded meanwhile."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = "YES"
    try:
        yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before
