"""Whether a model keeps chats apart that share a row, which nothing in its outputs would show.

transformers' masks keep samples apart where `position_ids` start at 0 again, if the model hands these to its masks.
GPT-OSS and OPT do not, and layers with a state (Mamba, linear attention) have no mask at all.

Algorithm:
  1. Does every layer attend, or has one a state or a convolution over tokens?
  2. A model with values: does another first chat change the logits of the second one? The change is compared with that
     of a row that is one chat, so that rounding is no leak.
  3. A model on the meta device: are its masks made from positions?
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moecompile.capture import is_meta
from moecompile.errors import ConfigError

_LENGTH = 8  # tokens of each of the two chats
_ROUNDING = 0.1  # of the change in one chat; a leak is about as large as that change


def check_packing(model: nn.Module, name: str) -> None:
    """Checks that chats in one row do not see each other.

    Raises:
        ConfigError: they do.
    """
    reason = _state(model) or (_masks_reason(model) if is_meta(model) else _change_reason(model))
    if reason is not None:
        raise ConfigError(
            "data.layout", "pack", f"chats in one row of the model {name} would see each other: {reason}",
            "Use data.layout=pad",
        )  # fmt: skip


def _state(model: nn.Module) -> str | None:
    """Step 1; None: all layers attend."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    kinds = {str(kind) for kind in getattr(text, "layer_types", None) or ()}
    if states := sorted(kind for kind in kinds if kind.startswith("linear") or not kind.endswith("attention")):
        return f"its layers of the kind {', '.join(states)} have a state and no mask"
    convolutions = (name for name, module in model.named_modules() if isinstance(module, nn.Conv1d))
    return next((f"{name} is a convolution over tokens" for name in convolutions), None)


def _change_reason(model: nn.Module) -> str | None:
    """Step 2; None: chats are kept apart."""
    vocab_size = int(getattr(getattr(model, "config", None), "vocab_size", 2))
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    one = torch.randint(vocab_size, (1, 2 * _LENGTH), generator=generator)
    other = torch.cat((torch.randint(vocab_size, (1, _LENGTH), generator=generator), one[:, _LENGTH:]), dim=1)
    whole = torch.arange(2 * _LENGTH)[None]
    apart = torch.arange(_LENGTH).repeat(2)[None]
    changes = []
    for positions in (apart, whole):
        try:
            logits = [_logits(model, ids.to(device), positions.to(device)) for ids in (one, other)]
        except TypeError as error:
            return f"it takes no position_ids ({error})"
        changes.append(float((logits[0] - logits[1])[:, _LENGTH:].abs().max()))
    return "another first chat changes the second one" if changes[0] > _ROUNDING * changes[1] else None


@torch.no_grad()
def _logits(model: nn.Module, ids: Tensor, positions: Tensor) -> Tensor:
    training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        logits: Tensor = model(input_ids=ids, position_ids=positions, use_cache=False).logits
    finally:
        for module, was_training in training.items():
            module.training = was_training
    return logits.float()


def _masks_reason(model: nn.Module) -> str | None:
    """Step 3; None: chats are kept apart."""
    positions = torch.zeros(1, 2, dtype=torch.int64, device="meta")
    try:
        with _masks_by_position():
            _logits(model, positions, positions)
    except _Reached:
        return None
    except Exception as error:  # a forward may fail on the meta device, but masks are made before
        return f"its masks are not made from position_ids ({type(error).__name__})"
    return "its masks are not made from position_ids"


class _Reached(BaseException):
    """A mask is about to be made from positions. No model catches it."""


@contextmanager
def _masks_by_position() -> Iterator[None]:
    """Raises `_Reached` where transformers looks for packed samples in positions."""
    from transformers import masking_utils

    def reached(position_ids: Any) -> Any:
        raise _Reached

    original = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = reached
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = original
