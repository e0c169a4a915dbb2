"""Token ids for a layer that is measured alone, where a hash of them chooses its experts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from moecompile.nn.padding import IDS, Padding, TokenIds

_VOCABULARY = 2**15
Draw = Callable[[torch.Generator], tuple[Tensor, ...]]


def drawing_ids(layer: nn.Module, draw: Draw, shape: tuple[int, int], device: torch.device) -> Draw:
    """`draw`, which also gives `layer` the ids (B, S) of its tokens, if it reads them; they are new in each round."""
    readers = [part for part in layer.modules() if isinstance(part, TokenIds)]
    call = Padding()
    for part in readers:
        part.padding = call

    def drawn(generator: torch.Generator) -> tuple[Tensor, ...]:
        call.now = {IDS: torch.randint(_VOCABULARY, shape, generator=generator).to(device)}
        return draw(generator)

    return drawn if readers else draw
