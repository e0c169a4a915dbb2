"""Hooks that a rewrite would lose: on modules inside an FFN or inside experts, which nothing calls any more.

Hooks on the module whose place a graph takes go over to the graph; what is around it is not touched.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable

from torch import nn

from moecompile.torch_private import hooks_of


def lost_hooks(path: str, region: nn.Module, is_lost: Callable[[str], bool]) -> str | None:
    """The first module below the region that has hooks and would not be called any more, in words that say what to do.

    Warns too: the site stays as it is, which somebody who asked for a rewrite has to know.

    Args:
        path: of the region. is_lost: whether a module below it, by its path there, is not called any more.
    """
    for name, module in region.named_modules(remove_duplicate=False):
        if name and is_lost(name):
            for hook in hooks_of(module):
                full = f"{path}.{name}" if path else name
                reason = f"{full} has {hook}, which would not run any more: remove it, or put it on a module around"
                warnings.warn(f"{path or 'the model'} stays as it is: {reason}", stacklevel=2)
                return reason
    return None
