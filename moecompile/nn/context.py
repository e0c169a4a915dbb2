"""Context parallelism of a model: every rank computes its own positions, and attention its own heads.

The model is called with whole sequences on every rank of a CP group, so it makes masks and rotary embeddings of whole
sequences itself. The first layer's input is cut to this rank's positions, and so are the positions that layers are
given; attention masks stay whole. What follows the layers (norm, head) sees this rank's positions only.

Legend: B sequences, S positions of a sequence, s of them on this rank, H heads, h heads of keys and values, d head dim,
n ranks of the group.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from moecompile import ops  # noqa: F401  (registers the ops)
from moecompile.errors import ConfigError, MoecompileError

exchange_dims = torch.ops.moecompile.exchange_dims
_CACHES = ("cache", "past_key_values", "past_key_value")
_HIDDEN = "hidden_states"
_OWN = "_moecompile_positions"


class Positions:
    """This rank's part of every sequence.

    Args:
        axis: name of the process group. index, size: this rank among the ranks of the group.
    """

    def __init__(self, axis: str, index: int, size: int) -> None:
        self.axis, self.index, self.size = axis, index, size
        self._parts = WeakTensorKeyDictionary()

    def cut(self, x: Tensor, dim: int) -> Tensor:
        """The part of `x` at this rank's positions, which are along `dim`.

        Raises:
            ConfigError: the ranks cannot have equally many positions.
        """
        length = x.shape[dim]
        if length % self.size:
            rule = f"must be a multiple of mesh.cp={self.size}, so that ranks have equally many positions"
            raise ConfigError(
                "tokens of a sequence", length, rule, f"Pad sequences to {-(-length // self.size) * self.size} tokens"
            )
        return x.narrow(dim, length // self.size * self.index, length // self.size)

    def part(self, x: Tensor, dim: int) -> Tensor:
        """A copy of `cut`, the same one for every layer that is given `x`: a view would keep all of it."""
        if x not in self._parts:
            self._parts[x] = self.cut(x, dim).clone()
        found: Tensor = self._parts[x]
        return found

    def __deepcopy__(self, memo: dict[int, Any]) -> Positions:
        return self


def own_positions(model: nn.Module, x: Tensor, dim: int = 1) -> Tensor:
    """The part of `x` (labels, a mask) at the positions that `model` computes on this rank.

    Under context parallelism a sharded model is called with whole sequences and returns logits of this rank's
    positions. Shift labels first, then cut them: the target of a rank's last position is the next rank's first token.

    Args:
        x: of whole sequences, with positions along `dim`. Without context parallelism it is returned as it is.
    """
    positions = positions_of(model)
    return x if positions is None else positions.cut(x, dim)


def positions_of(model: nn.Module) -> Positions | None:
    """What `keep_positions` has kept in the model, or in a module inside it; None: it computes all positions."""
    return next((vars(module)[_OWN] for module in model.modules() if _OWN in vars(module)), None)


def keep_positions(module: nn.Module, positions: Positions) -> None:
    """Keeps `positions` in a module: the model, or its attention."""
    vars(module)[_OWN] = positions


class CutLayer:
    """The hooks around a layer: its arguments are cut to this rank's positions, and its attention must be exchanged.

    Args:
        path: of the layer. is_first: whether its input still has all positions.
    """

    def __init__(self, path: str, layer: nn.Module, positions: Positions, *, is_first: bool) -> None:
        self.path, self.positions, self.is_first = path, positions, is_first
        self.names = list(inspect.signature(layer.forward).parameters)
        self.calls = 0  # of attention in this forward
        layer.register_forward_pre_hook(self.before, with_kwargs=True)
        layer.register_forward_hook(self.after)
        for module in layer.modules():
            keep_positions(module, positions)
            vars(module)["_moecompile_layer"] = self

    def before(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments at this rank's positions."""
        self.calls = 0
        given = dict(zip(self.names, args, strict=False)) | kwargs
        cut = cut_arguments(given, self.positions, is_first=self.is_first, where=self.path)
        return tuple(cut[name] for name in self.names[: len(args)]), {name: cut[name] for name in kwargs}

    def after(self, layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Raises MoecompileError unless attention was exchanged: its positions would see only those of their rank."""
        if not self.calls:
            raise MoecompileError(
                f"{self.path} ran without the attention that mesh.cp exchanges, so its positions would not see those "
                "of other ranks. Use mesh.cp=1"
            )

    def __deepcopy__(self, memo: dict[int, Any]) -> CutLayer:
        return self


def cut_arguments(given: Mapping[str, Any], positions: Positions, *, is_first: bool, where: str) -> dict[str, Any]:
    """The arguments of a layer, by name, at this rank's positions. Masks of attention stay whole.

    Raises:
        MoecompileError: a cache, or a tensor of which it is not known where its positions are.
    """
    name = next((name for name in (_HIDDEN, "hidden_state", "x") if name in given), next(iter(given)))
    hidden = given[name]
    if is_first:
        hidden = positions.cut(hidden, 1).clone()
    length = hidden.shape[1] * positions.size
    cut = {**given, name: hidden}
    for key, value in given.items():
        if key == name or "attention_mask" in key:
            continue
        if key in _CACHES and value is not None:
            raise MoecompileError(
                f"{where} is given a cache of keys and values, which mesh.cp cannot fill. Call the model with "
                "use_cache=False"
            )
        if key == "position_ids":
            cut[key] = _cut_whole(value, length, -1, positions)
        elif key.startswith("position_embeddings"):
            cut[key] = _cut_each(value, length, positions)
        elif any(isinstance(leaf, Tensor) for leaf in (value if isinstance(value, (tuple, list)) else (value,))):
            raise MoecompileError(
                f"{where} is given the tensor {key}, and it is not known where its positions are. Use mesh.cp=1"
            )
    return cut


def _cut_each(value: Any, length: int, positions: Positions) -> Any:
    if isinstance(value, (tuple, list)):
        return type(value)(_cut_whole(part, length, -2, positions) for part in value)
    return _cut_whole(value, length, -2, positions)


def _cut_whole(value: Any, length: int, dim: int, positions: Positions) -> Any:
    """Tensors of length 1 broadcast, so they are not cut."""
    if not isinstance(value, Tensor) or value.shape[dim] == 1 != length:
        return value
    if value.shape[dim] != length:
        raise MoecompileError(f"positions {tuple(value.shape)} are not those of {length} tokens")
    return positions.part(value, dim)


class _OfRank:
    """An attention module as its implementation sees it on this rank: the number of query heads per key head, and its
    own heads' part of a weight with a number for each.
    """

    def __init__(self, module: nn.Module, groups: int, parts: Mapping[str, Tensor]) -> None:
        self._module, self.num_key_value_groups = module, groups
        vars(self).update(parts)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def weights_of_heads(module: nn.Module, heads: int) -> dict[str, Tensor]:
    """The weights of an attention module with one number for each head (sinks), by name."""
    return {name: x for name, x in module.named_parameters(recurse=False) if x.shape == (heads,)}


def exchanged_attention(
    inner: Callable[..., tuple[Tensor, Any]], module: nn.Module, query: Tensor, key: Tensor, value: Tensor,
    attention_mask: Tensor | None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention of this rank's heads over all positions.

    Args:
        inner: the implementation that the model had: (module, query, key, value, mask, ...) -> (B, S, H / n, d) and
            weights. query (B, H, s, d), key and value (B, h, s, d): of this rank's positions. attention_mask: of all
            positions, the same for every head.

    Returns:
        (B, s, H, d), and no weights.
    """
    positions: Positions = vars(module)[_OWN]
    vars(module)["_moecompile_layer"].calls += 1
    if attention_mask is not None and attention_mask.dim() == 4 and attention_mask.shape[1] != 1:
        raise MoecompileError("the attention mask differs between heads, which mesh.cp splits. Use mesh.cp=1")
    copies = key_copies(key.shape[1], positions.size)
    if copies > 1:
        key, value = (x.repeat_interleave(copies, dim=1) for x in (key, value))
    whole = weights_of_heads(module, query.shape[1])
    parts = {name: x.chunk(positions.size)[positions.index] for name, x in whole.items()}
    for key_word, x in kwargs.items():
        kwargs[key_word] = next((parts[name] for name, each in whole.items() if each is x), x)
    query, key, value = (exchange_dims(x, 1, 2, positions.axis) for x in (query, key, value))
    seen = _OfRank(module, query.shape[1] // key.shape[1], parts)
    output, _ = inner(seen, query, key, value, attention_mask, **kwargs)
    back: Tensor = exchange_dims(output, 1, 2, positions.axis)
    return back, None


def whole_sequences(
    logits: Tensor, ids_TK: Tensor, real_T: Tensor | None, axis: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """A router's logits (..., s, E), choices and padding mask of all positions, on every rank of a CP group.

    A loss of them is whole on every rank, and its gradient at the logits of a rank too.
    """
    join, dims = torch.ops.moecompile.join_positions, logits.shape[:-1]
    ids = join(ids_TK.reshape(*dims, -1), axis).flatten(0, -2)
    if real_T is not None:
        real_T = join(real_T.reshape(*dims, 1).to(torch.uint8), axis).flatten() != 0
    return join(logits, axis), ids, real_T


def key_copies(key_heads: int, size: int) -> int:
    """How often each head of keys and values is sent, so that every one of `size` ranks has equally many."""
    return next(copies for copies in range(1, size + 1) if key_heads * copies % size == 0)
