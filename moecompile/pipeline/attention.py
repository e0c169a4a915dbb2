"""Whether a model's attention can be split over the positions of `cp`, and the heads that it has.

Algorithm (`attention_of`):
  1. Rules that the model's class and config decide: it uses transformers' attention interface, and has no state.
  2. One forward on the example with a probe in place of attention, which notes the heads of every layer and returns for
     each position its own values alone.
  3. With the probe, no output may depend on another position. A token is changed, first at the start and then at the
     end: where the outputs of other positions change, something else mixes positions (a convolution, a recurrence,
     attention outside of the interface).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from moecompile.capture import Example, call_with, in_mode, is_meta, layers_of
from moecompile.capture.record import caches
from moecompile.errors import MoecompileError
from moecompile.match.sites import record_model
from moecompile.nn.context import Positions, cut_arguments, weights_of_heads
from moecompile.passes.context_parallel import IMPLEMENTATIONS, attention_replaced, configs_of, implementation_of
from moecompile.planner.params import AttentionFact

_TOLERATED_ROUNDING = 64  # times the precision of the dtype: experts may group other tokens
_IDS = "input_ids"
_LAYER_TYPES = ("full_attention", "sliding_attention", "chunked_attention")
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


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
    if dropped := _dropped(model, text):
        return f"has {dropped}, which would be drawn alike for the parts of a sequence"
    return "" if list(layers_of(model)) else "has no list of layers"


def _dropped(model: nn.Module, text: Any) -> str:
    """A rate of dropout that is not 0, with its name: in the config, of a module, or one that a module passes on. Names
    in configs differ (Seed-OSS has `residual_dropout`), and not every key is read.
    """
    for name in ("attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop"):
        if rate := getattr(text, name, None):
            return f"{name}={rate}"
    for path, module in model.named_modules():
        rates = {name: rate for name, rate in vars(module).items() if "drop" in name and name != "layerdrop"}
        if isinstance(module, _DROPOUTS):
            rates["p"] = module.p
        if found := next((name for name, rate in rates.items() if isinstance(rate, float) and rate > 0), None):
            return f"{path}.{found}={rates[found]}".lstrip(".")
    return ""


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
