"""What the planner must know of a model's attention: how positions are split over `cp`, and what its scores need.

Positions (`attention_of`):
  1. Rules that the model's class and config decide: it uses transformers' attention interface, and has no state.
  2. One forward on the example with a probe in place of attention, which notes the heads of every layer and returns for
     each position its own values alone.
  3. With the probe, no output may depend on another position. A token is changed, first at the start and then at the
     end: where the outputs of other positions change, something else mixes positions (a convolution, a recurrence,
     attention outside of the interface).
Scores (`scores_of`), of an implementation that makes a matrix of them for each head (`eager`):
  1. One forward on the example notes how the attention of each layer is called.
  2. Each kind of call is made on the meta device with long sequences, forward and backward: the bytes that autograd
     keeps, and the most at a time, for each pair of positions.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moecompile.capture import Example, call_with, in_mode, is_meta, layers_of
from moecompile.capture.record import caches
from moecompile.errors import MoecompileError
from moecompile.match.sites import record_model
from moecompile.nn.context import Positions, cut_arguments, weights_of_heads
from moecompile.passes.context_parallel import IMPLEMENTATIONS, attention_replaced, configs_of, implementation_of
from moecompile.planner.params import AttentionFact, ScoresFact, SplitFact
from moecompile.torch_private import TorchDispatchMode, tree_leaves, without_values

_TOLERATED_ROUNDING = 64  # times the precision of the dtype: experts may group other tokens
_IDS = "input_ids"
_MAKES_SCORES = "eager"
_INSTEAD = {"sdpa": "_supports_sdpa", "flex_attention": "_supports_flex_attn"}
"""Implementation that makes no matrices of scores on a GPU -> whether a model has it."""
_LAYER_TYPES = ("full_attention", "sliding_attention", "chunked_attention")


def attention_of(model: nn.Module, example: Example | None) -> tuple[tuple[AttentionFact, ...], str]:
    """`ModelFacts.attention`, and `ModelFacts.no_context`."""
    reason = _static_reason(model, example)  # Step 1
    if reason:
        return (), f"{type(model).__name__} {reason}"
    assert isinstance(example, Mapping)
    probe = _Probe(model)
    try:
        outputs = probe.run(example)  # Step 2
    except MoecompileError as error:
        return (), f"{type(model).__name__} cannot compute parts of its positions: {error}"
    reason = probe.reason() or ("" if is_meta(model) else _mixing(probe, example, outputs))  # Step 3
    return tuple(probe.facts.values()), f"{type(model).__name__} {reason}" if reason else ""


def _static_reason(model: nn.Module, example: Example | None) -> str:
    config: Any = getattr(model, "config", None)
    if not isinstance(example, Mapping) or _IDS not in example or not list(configs_of(model)):
        return "is no language model of transformers that takes input_ids, so its attention cannot be exchanged"
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    if getattr(config, "is_encoder_decoder", False):
        return "has an encoder and a decoder, of which only one sequence could be split"
    stateful = [kind for kind in getattr(text, "layer_types", None) or () if kind not in _LAYER_TYPES]
    if getattr(model, "_is_stateful", False) or stateful:
        return f"has layers with a state across positions ({stateful[0] if stateful else 'as its class says'})"
    if (name := implementation_of(model)) not in IMPLEMENTATIONS:
        return f"uses attn_implementation={name}, and only {' and '.join(IMPLEMENTATIONS)} take whole masks here"
    for rate in ("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop"):
        if dropped := getattr(text, rate, None):
            return f"has {rate}={dropped}, which would be drawn alike for the parts of a sequence"
    return "" if list(layers_of(model)) else "has no list of layers"


class _Probe:
    """Runs the model with a probe in place of attention. facts: of each attention, by its path."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.facts: dict[str, AttentionFact] = {}
        self.paths = {module: path for path, module in model.named_modules()}
        self.layers = list(layers_of(model))
        self.whole = Positions("", 0, 1)
        self.ran: list[nn.Module] = []
        self.attended: set[nn.Module] = set()

    def run(self, example: Mapping[str, Any]) -> Any:
        """One forward in evaluation mode; what the model returns, nothing on the meta device."""
        self.ran = []
        with ExitStack() as stack:
            for layer in self.layers:
                hook = layer.register_forward_pre_hook(self._enter, with_kwargs=True)
                stack.callback(hook.remove)
            return _run(self.model, example, self._attention)

    def reason(self) -> str:
        """Why positions cannot be split; empty if they can."""
        if self.ran != self.layers:
            return f"does not run its {len(self.layers)} layers one after another, each once"
        if missing := [self.paths[layer] for layer in self.layers if layer not in self.attended]:
            return f"has attention in {missing[0]} that does not go through transformers' attention interface"
        return ""

    def _enter(self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.ran.append(layer)
        given = dict(zip(inspect.signature(layer.forward).parameters, args, strict=False)) | kwargs
        cut_arguments(given, self.whole, is_first=True, where=self.paths[layer])

    def _attention(
        self, inner: Callable[..., Any], module: nn.Module, query: Tensor, key: Tensor, value: Tensor,
        attention_mask: Tensor | None, **kwargs: Any,
    ) -> tuple[Tensor, None]:  # fmt: skip
        path = self.paths[module]
        of_heads = weights_of_heads(module, query.shape[1]).values()
        others = [
            name for name, each in kwargs.items()
            if isinstance(each, Tensor) and name != "position_ids" and not any(each is known for known in of_heads)
        ]  # fmt: skip
        if others:
            raise MoecompileError(f"{path} gives its attention {others[0]}, which heads would have to share")
        self.attended.add(self.ran[-1])
        self.facts[path] = AttentionFact(
            path=path, query_heads=query.shape[1], key_heads=key.shape[1], d_key=query.shape[3], d_value=value.shape[3]
        )
        return value.repeat_interleave(query.shape[1] // value.shape[1], dim=1).transpose(1, 2).contiguous(), None


def _run(model: nn.Module, example: Example, attention: Callable[..., Any]) -> Any:
    """One forward in evaluation mode with another attention; what the model returns, nothing on the meta device."""
    with ExitStack() as stack:
        stack.enter_context(attention_replaced(model, attention))
        if is_meta(model):
            return record_model(model, example)
        stack.enter_context(in_mode(model, training=False))
        stack.enter_context(caches(model, on=False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(torch.random.fork_rng(devices=[]))
        return call_with(model, example)


def _mixing(probe: _Probe, example: Mapping[str, Any], outputs: Any) -> str:
    """What mixes positions with the probe in place of attention; empty if nothing does."""
    ids, before = example[_IDS], _logits(outputs)
    if before is None or before.shape[:2] != ids.shape:
        return "returns no logits for each of its positions"
    vocab = probe.model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    tolerated = _TOLERATED_ROUNDING * torch.finfo(before.dtype).eps * float(before.abs().max())
    for changed in (0, ids.shape[1] - 1):
        others = ids.clone()
        others[:, changed] = (ids[:, changed] + 1 + vocab // 2) % vocab
        after = _logits(probe.run({**example, _IDS: others}))
        assert after is not None
        apart = (after - before).abs().amax(-1)
        apart[:, changed] = 0
        if float(apart.max()) > tolerated:
            return "mixes positions outside of the attention that transformers' interface knows"
    return ""


def _logits(outputs: Any) -> Tensor | None:
    found = getattr(outputs, "logits", None)
    found = getattr(outputs, "last_hidden_state", None) if found is None else found
    return found if isinstance(found, Tensor) and found.dim() == 3 else None


# -- matrices of scores -----------------------------------------------------------------------------------------------

_LONG = 16384  # positions, with which all but the matrices is next to nothing


@dataclass
class _Call:
    """How an attention is called. of_module: arguments that are weights of the module -> their names there."""

    inner: Callable[..., Any]
    module: nn.Module
    query: torch.Size
    key: torch.Size
    value: torch.Size
    mask: torch.dtype | None
    others: dict[str, Any]
    of_module: dict[str, str]

    @property
    def kind(self) -> Hashable:
        """Equal for calls that need the same."""
        shapes = (self.query[1:], self.key[1:], self.value[1:], self.mask)
        return type(self.module), shapes, *sorted(self.of_module.items())


def scores_of(
    model: nn.Module, example: Example | None, splits: Sequence[SplitFact] = ()
) -> tuple[dict[int, ScoresFact], str]:
    """`ModelFacts.scores` and `no_scores`."""
    if example is None or implementation_of(model) != _MAKES_SCORES:
        return {}, ""
    try:
        return _scores_of(model, example, splits)
    except Exception as error:  # code of the model that cannot do this: an estimate must not end a compilation
        return {}, f"what eager attention needs for its scores ({type(error).__name__})"


def _scores_of(model: nn.Module, example: Example, splits: Sequence[SplitFact]) -> tuple[dict[int, ScoresFact], str]:
    calls, paths = list[_Call](), {module: path for path, module in model.named_modules()}

    def noted(
        inner: Callable[..., Any], module: nn.Module, query: Tensor, key: Tensor, value: Tensor,
        attention_mask: Tensor | None = None, **others: Any,
    ) -> Any:  # fmt: skip
        weights = dict(module.named_parameters(recurse=False))
        of_module = {name: own for name, x in others.items() for own, weight in weights.items() if weight is x}
        plain = {name: x for name, x in others.items() if name not in of_module}
        if "dropout" in plain:
            plain["dropout"] = _dropout_of(module)  # here the model is in evaluation mode
        kind = None if attention_mask is None else attention_mask.dtype
        calls.append(_Call(inner, module, query.shape, key.shape, value.shape, kind, plain, of_module))
        return inner(module, query, key, value, attention_mask, **others)

    _run(model, example, noted)
    if not calls:
        has_heads = getattr(getattr(model, "config", None), "num_attention_heads", None) is not None
        return {}, "the scores of eager attention, which transformers' interface does not see" * has_heads
    owners = {f"{paths[call.module]}." for call in calls}
    is_split = any(split.style == "colwise" and split.path.startswith(tuple(owners)) for split in splits)
    instead = tuple(name for name, has in _INSTEAD.items() if getattr(model, has, False))
    kinds = {call.kind: call for call in calls}
    found: dict[int, ScoresFact] = {}
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        of_kind = {kind: _bytes_of_pairs(call, dtype) for kind, call in kinds.items()}
        kept = sum(of_kind[call.kind][0] for call in calls) / max(1, len(list(layers_of(model))))
        made = max(most for _, most in of_kind.values()) - kept
        found[dtype.itemsize] = ScoresFact(kept=kept, made=max(0.0, made), is_split=is_split, instead=instead)
    return found, ""


def _dropout_of(module: nn.Module) -> float:
    """The rate of an attention in training."""
    for name in ("attention_dropout", "dropout", "dropout_prob"):
        rate = getattr(module, name, None)
        if isinstance(rate := getattr(rate, "p", rate), (int, float)):
            return float(rate)
    return 0.0


def _bytes_of_pairs(call: _Call, dtype: torch.dtype) -> tuple[float, float]:
    """What is kept, and the most at a time, for each pair of positions; there may be more keys than positions."""

    def made(shape: torch.Size) -> Tensor:
        length = _LONG * shape[2] // call.query[2]
        return torch.empty(1, shape[1], length, shape[3], dtype=dtype, device="meta", requires_grad=True)

    query, key, value = map(made, (call.query, call.key, call.value))
    mask = None
    if call.mask is not None:
        of_mask = dtype if call.mask.is_floating_point else call.mask
        mask = torch.empty(1, 1, query.shape[2], key.shape[2], dtype=of_mask, device="meta")
    module = without_values(call.module).to(dtype).train()
    for parameter in module.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    others = {name: _long_bias(x, call, dtype) if isinstance(x, Tensor) else x for name, x in call.others.items()}
    others |= {name: module.get_parameter(own) for name, own in call.of_module.items()}
    with _LiveBytes() as live:
        output = call.inner(module, query, key, value, mask, **others)[0]
        kept = live.now
        output.backward(torch.empty_like(output))
    return kept / query.shape[2] ** 2, live.most / query.shape[2] ** 2


def _long_bias(x: Tensor, call: _Call, dtype: torch.dtype) -> Tensor:
    """A tensor on the meta device, with long sequences in the place of the example's (a bias by distance)."""
    lengths = (call.query[2], call.key[2])
    shape = [_LONG * size // call.query[2] if size in lengths else size for size in x.shape]
    return torch.empty(shape, dtype=dtype if x.is_floating_point() else x.dtype, device="meta")


class _LiveBytes(TorchDispatchMode):
    """Counts the memory of what ops make while it is active: now, and the most at a time."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = 0
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """torch's."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._known:
            return

        def freed(_: Any) -> None:
            self.now -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, freed)
        self.now += size
        self.most = max(self.most, self.now)
