"""Hooks that a rewrite would lose: on modules inside an FFN or inside experts, which are not called any more.

Hooks on a module that a graph replaces move to the graph; modules around it are not changed.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

from torch import nn

from moecompile.torch_private import hooks_of


def lost_hooks(path: str, region: nn.Module, is_lost: Callable[[str], bool]) -> str | None:
    """A message about the first module below the region that has hooks and would not be called any more.

    Also warns, because the site stays as it is although the user asked for a rewrite.

    Args:
        path: of the region. is_lost: whether a module, by its path below the region, is not called any more.
    """
    for name, module in region.named_modules(remove_duplicate=False):
        if name and is_lost(name):
            for hook in hooks_of(module):
                full = f"{path}.{name}" if path else name
                reason = f"{full} has {hook}, which would not run any more: remove it, or put it on a module around"
                warnings.warn(f"{path or 'the model'} stays as it is: {reason}", stacklevel=2)
                return reason
    return None
