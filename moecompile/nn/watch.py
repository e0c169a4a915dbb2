"""Reads padding masks and token ids from the arguments of a model's call, for its MoE layers (padding.py)."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from moecompile.nn.meter import LoadMeter
from moecompile.nn.padding import DECODER, ENCODER, IDS, Padding, ReadsCall, TokenIds, TokenMask

_INVERTED = "src_key_padding_mask"  # of torch's own layers: true where padding is
_PACKED = ("cu_seq_lens_q", "cu_seqlens")  # ends of the sequences of a pack; what comes after the last is padding
_WHOLE = (torch.int64, torch.int32)
CACHES = ("past_key_values", "cache_params", "cache", "state")  # names of cache arguments in model forwards
_OF_TOKENS = (IDS, "decoder_input_ids", "inputs_embeds")  # `main_input_name` of models of transformers that read tokens


class _Finder:
    """The hook before a forward: reads masks, ids, or both from the arguments."""

    def __init__(self, padding: Padding, *, masks: bool, ids: bool) -> None:
        self.padding, self.masks, self.ids = padding, masks, ids

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found = masks_of(model, args, kwargs) if self.masks else {}
        given = named_arguments(model, args, kwargs)
        self.padding.start(
            found | (ids_of(model, args, kwargs) if self.ids else {}),
            is_cached=any(given.get(name) is not None for name in CACHES),
        )


class _Warner:
    """The hook of a model that routes padding like tokens: warns at its first training forward that has some."""

    def __init__(self) -> None:
        self.left = 20  # forwards that are looked at: each look waits for the device

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling() or not self.left or not any(meter.training for meter in _meters(model)):
            return
        padded = [name for name, mask in masks_of(model, args, kwargs).items() if mask.dim() == 2 and not mask.all()]
        self.left = 0 if padded else self.left - 1
        if padded:
            warnings.warn(
                f"{padded[0]} has padding, which is routed, sent and counted like tokens: compile with an example that "
                "has this argument, or with data.mask_padding=always",
                stacklevel=2,
            )


def _meters(model: nn.Module) -> Iterator[LoadMeter]:
    """They are in training mode whenever the model is trained; it may be in evaluation mode itself."""
    return (module for module in model.modules() if isinstance(module, LoadMeter))


class _Forgetter:
    """The hook after a forward."""

    def __init__(self, padding: Padding) -> None:
        self.padding = padding

    def __call__(self, *_: Any) -> None:
        self.padding.end()


def masks_of(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The padding masks among the arguments of a call of `model`, by argument."""
    given = named_arguments(model, args, kwargs)
    masks: dict[str, Tensor] = {}
    for name in (ENCODER, DECODER):
        mask = given.get(name)
        if isinstance(mask, Tensor) and mask.dim() == 2:  # masks of more dims say who sees whom, not what is padding
            masks[name] = mask != 0
    mask = given.get(_INVERTED)
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.dtype == torch.bool:
        masks[ENCODER] = ~mask
    for name in _PACKED:
        if isinstance(given.get(name), Tensor):
            masks.setdefault(ENCODER, given[name])
    return masks


def ids_of(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
    """The token ids among the arguments of a call of `model`: input_ids, or its only tensor of integers."""
    given = named_arguments(model, args, kwargs)
    whole = [value for value in given.values() if isinstance(value, Tensor) and value.dtype in _WHOLE]
    ids = given.get(IDS, whole[0] if len(whole) == 1 else None)
    return {IDS: ids} if isinstance(ids, Tensor) else {}


def named_arguments(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call of `model` by name."""
    given = dict(kwargs)
    if args:
        names = [p.name for p in inspect.signature(model.forward).parameters.values() if p.kind is not p.VAR_KEYWORD]
        given.update(zip(names, args, strict=False))
    return given


def watch_padding(model: nn.Module) -> None:
    """Connects `TokenMask` and `TokenIds` of a compiled model to the calls of `model`, and of models inside it.

    A model without any mask warns once if it is trained with padding.
    """
    if not any(isinstance(module, TokenMask) for module in model.modules()):
        model.register_forward_pre_hook(_Warner(), with_kwargs=True)
    connect(model, TokenMask, TokenIds)


def connect(model: nn.Module, *wanted: type[ReadsCall], outside: Collection[nn.Module] = ()) -> list[RemovableHandle]:
    """Connects the parts of these kinds to the calls of `model`; the handles of its hooks.

    Args:
        outside: what holds more such parts, and is not in `model` but runs during its calls.
    """
    readers = [
        (path, module)
        for root in (model, *outside)
        for path, module in root.named_modules()
        if isinstance(module, wanted)
    ]
    padding, handles = Padding(), []
    both = _is_encoder_decoder(model)
    for path, reader in readers:
        if isinstance(reader, TokenMask) and reads_no_tokens(model, path):
            continue
        reader.padding = padding
        if isinstance(reader, TokenMask):
            reader.argument = argument_of(model, path)
    padding.recomputes = _Recomputes(model)
    kinds = {type(reader) for _, reader in readers}
    for module in model.modules() if readers else ():
        held = kinds if module is model or outside else {type(part) for part in module.modules()} & kinds
        masks = TokenMask in held and (module is model or _takes(module, DECODER if both else ENCODER))
        ids = TokenIds in held and (module is model or _takes(module))
        if masks or ids:
            finder = _Finder(padding, masks=masks, ids=ids)
            handles.append(module.register_forward_pre_hook(finder, with_kwargs=True))
            handles.append(module.register_forward_hook(_Forgetter(padding), always_call=True))
    return handles


def argument_of(model: nn.Module, path: str) -> str:
    """The argument that has the mask of what is at a path."""
    return DECODER if _is_encoder_decoder(model) and "decoder" in path.split(".") else ENCODER


def _is_encoder_decoder(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def reads_no_tokens(model: nn.Module, path: str) -> bool:
    """Whether a path is in a model within `model` that reads something else, such as images: masks are not of it."""
    owner = model
    for name in path.split("."):
        owner = getattr(owner, name, None)  # type: ignore[assignment]
        if getattr(owner, "main_input_name", IDS) not in _OF_TOKENS:
            return True
    return False


def _takes(module: nn.Module, *arguments: str) -> bool:
    """Whether it is a model itself that takes ids and masks (the base model of a language model)."""
    return hasattr(module, "config") and {IDS, *arguments} <= inspect.signature(module.forward).parameters.keys()


class _Recomputes:
    """Whether layers of a model of transformers compute again in backward."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self) -> bool:
        return any(getattr(module, "gradient_checkpointing", False) for module in self.model.modules())
