"""What the layers of a model keep for backward, and make for a while: counted by running their own code.

Algorithm (`KeptLayers`):
  1. One forward of a copy without values on the meta device, on a micro-batch of sequences as long as those of the run,
     at most `LONG`; short ones, if code that loops over positions would take too long. Of layers that are alike one
     runs, and the arguments of its call are noted.
  2. That one is called alone, forward and backward. What is alive between both, but its output, is kept; of each of its
     parts what is alive after its call, but its output. The most at a time, above this, is made.
  3. Where attention makes matrices of scores (`eager`), and for longer sequences, also with half as long ones: some
     bytes grow with tokens, others with pairs of positions.

Autocast does not know the meta device; under it tensors are fake ones of a CPU. Attention without matrices of scores is
taken as a GPU computes it. Experts do not run (planner/memory.py has a formula of a planned MoE layer). Masks of a
model are not counted.
"""

from __future__ import annotations

import weakref
from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from copy import deepcopy
from dataclasses import dataclass, field, fields
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from moecompile.capture import Example, call_with, in_mode
from moecompile.capture.record import caches, one_sequence_in_a_row
from moecompile.match.sites import may_be_experts
from moecompile.passes.context_parallel import attention_of_a_gpu, implementation_of
from moecompile.plan import ATTENTION, FFN, NORMS
from moecompile.planner.params import LayerFact, LayerKept, SplitFact
from moecompile.torch_private import TorchDispatchMode, fake_values, tree_leaves, tree_map, without_values

LONG = 8192
"""Positions, with more of which bytes grow as they did before."""
_SHORT, _MOST_OPS = 128, 10_000
"""Positions that are run first, and how many operations all may take; if they would take more, these are taken. Not
seconds: all ranks must count the same.
"""
_VALUES = ("attention_mask", "decoder_attention_mask", "position_ids", "labels")
"""Arguments that a model does without: only their values say something."""
_MAKES_SCORES = "eager"
_INSTEAD = {"sdpa": "_supports_sdpa", "flex_attention": "_supports_flex_attn"}
"""Implementation that makes no matrices of scores on a GPU -> whether a model has it."""
_INDICES = ("layer_idx", "layer_id", "layer_index", "layer_number", "training")
_LONGEST_REASON = 200
_LEAST_SHARE = 0.01  # of the bytes that grow with pairs, in all; less is rounding
_DTYPES = {dtype.itemsize: dtype for dtype in (torch.bfloat16, torch.float32, torch.float64)}


def dtype_of_most(parameters: Iterable[nn.Parameter]) -> torch.dtype:
    """The dtype of most numbers."""
    sizes = Counter[torch.dtype]()
    for parameter in parameters:
        sizes[parameter.dtype] += parameter.numel()
    return max(sizes, key=sizes.__getitem__, default=torch.float32)


def kinds_of(layers: Sequence[nn.Module]) -> list[int]:
    """A number for each layer, equal for those that are alike: modules, shapes and dtypes of weights, which are
    trained, and settings.

    Layers whose code asks for their place among the others, and nothing else, are taken as alike.
    """
    known: dict[Hashable, int] = {}
    return [known.setdefault(_signature(layer), len(known)) for layer in layers]


def _signature(layer: nn.Module) -> Hashable:
    found: list[Hashable] = []
    for name, module in layer.named_modules():
        own = (
            (key, value) for key, value in vars(module).items()
            if key not in _INDICES and (isinstance(value, (bool, int, float, str)) or _is_plain(value))
        )  # fmt: skip
        tensors = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
        shapes = ((key, tensor.shape, tensor.dtype, tensor.requires_grad) for key, tensor in tensors)
        found.append((name, type(module), *((key, repr(value)) for key, value in sorted(own)), *shapes))
    return tuple(found)


def _is_plain(value: object) -> bool:
    """Whether it is a list or tuple of plain settings."""
    return isinstance(value, (list, tuple)) and all(isinstance(each, (bool, int, float, str)) for each in value)


class KeptLayers:
    """`ModelFacts.kept`: bytes that each layer keeps, by its path; empty if that is unknown.

    Attributes:
        makes_scores: whether attention makes matrices of scores. instead: implementations that the model has and that
            make none. is_split: whether the model's tp_plan splits its heads. reason: why the last answer was empty;
            empty: it was not.

    Args:
        facts: of the model's layers.
    """

    def __init__(
        self, model: nn.Module, example: Example | None, facts: Sequence[LayerFact], splits: Sequence[SplitFact] = ()
    ) -> None:  # fmt: skip
        self.makes_scores = implementation_of(model) == _MAKES_SCORES
        self.instead = tuple(name for name, has in _INSTEAD.items() if getattr(model, has, False))
        mixers = tuple(f"{fact.path}.{name}." for fact in facts for name in dict(fact.parts).get(ATTENTION, ()))
        self.is_split = any(split.style == "colwise" and f"{split.path}.".startswith(mixers) for split in splits)
        self.reason = self._where = ""
        self._facts, self._known = facts, dict[tuple[int, int, int, bool], tuple[Mapping[str, LayerKept], str]]()
        most = dtype_of_most(model.parameters())
        self._wide = {name: x.dtype for name, x in model.named_parameters() if x.dtype is not most}
        self._trained = {name for name, x in model.named_parameters() if x.requires_grad}
        self._model, self._example = None, example
        if facts:
            try:
                self._model, self._example = _copy(model), _without_values_that_say(model, example)
            except Exception as error:  # an estimate must not end a compilation
                self.reason = _in_words(error, "a copy without values")

    def __call__(
        self, compute_bytes: int, seq_len: int, micro_batch_size: int, is_mixed: bool
    ) -> Mapping[str, LayerKept]:  # fmt: skip
        """Of a run whose numbers have so many bytes (is_mixed: with autocast to bf16), on so many sequences."""
        key = compute_bytes, seq_len, micro_batch_size, is_mixed
        if key not in self._known:
            found = self._counted(*key)
            self._known[key] = found, self.reason
        found, self.reason = self._known[key]
        return found

    def _counted(self, compute_bytes: int, seq_len: int, batch: int, is_mixed: bool) -> Mapping[str, LayerKept]:
        if self._model is None:
            return {}
        length, self.reason, self._where = min(seq_len, LONG), "", "the forward"
        try:
            with ExitStack() as stack:
                stack.enter_context(torch.inference_mode(mode=False))  # with gradients, whatever the caller has
                device = stack.enter_context(_mixed() if is_mixed else nullcontext("meta"))
                model = self._on(device, _DTYPES[compute_bytes])
                whole = self._of_batch(model, batch, min(length, _SHORT))
                if length > _SHORT:
                    few = self._of_batch(model, batch, _SHORT // 2)
                    more = sum(of.ops - few[kind].ops for kind, of in whole.items() if kind in few)
                    if more * 2 * length / _SHORT > _MOST_OPS:  # its code has loops over positions
                        length = _SHORT
                    else:
                        whole = self._of_batch(model, batch, length)
                has_pairs = (self.makes_scores or seq_len > length) and length > 1
                half = self._of_batch(model, batch, length // 2) if has_pairs else {}
            by_kind = {kind: _fact(of, half.get(kind), batch, length) for kind, of in whole.items()}
        except Exception as error:  # code of the model that cannot do this
            self.reason = _in_words(error, self._where)
            return {}
        return {fact.path: by_kind[fact.kind] for fact in self._facts if fact.kind in by_kind}

    def _on(self, device: str, dtype: torch.dtype) -> nn.Module:
        """The model with new weights of this dtype; those of another one than most keep theirs."""
        assert self._model is not None
        model = _copy(self._model)
        for path, module in model.named_modules():
            for name, old in [*module.named_buffers(recurse=False)]:
                setattr(module, name, torch.empty(old.shape, dtype=old.dtype, device=device))
            for name, old in [*module.named_parameters(recurse=False)]:
                whole = f"{path}.{name}" if path else name
                own = self._wide.get(whole, dtype) if old.is_floating_point() else old.dtype
                new = torch.empty(old.shape, dtype=own, device=device)
                setattr(module, name, nn.Parameter(new, requires_grad=whole in self._trained))
            if hasattr(module, "layerdrop"):
                module.layerdrop = 0.0  # layers would be left out by chance
        return model

    def _of_batch(self, model: nn.Module, batch: int, length: int) -> dict[int, _Bytes]:
        device = next(model.parameters()).device
        example = _long(self._example, batch, length, device)
        layers = [model.get_submodule(fact.path) for fact in self._facts]
        with ExitStack() as stack:
            stack.enter_context(attention_of_a_gpu(model))
            stack.enter_context(in_mode(model, training=True))
            stack.enter_context(caches(model, on=False))
            stack.enter_context(one_sequence_in_a_row())
            for module in filter(may_be_experts, model.modules()):
                stack.enter_context(_replaced_by(module, _no_experts))
            stack.enter_context(torch.random.fork_rng(devices=[]))
            calls = _calls_of(model, layers, [fact.kind for fact in self._facts], example, self._at)  # Step 1
            found = dict[int, _Bytes]()
            for kind, call in calls.items():  # Step 2
                self._at(layers.index(call.layer))
                found[kind] = _alone(call, self._parts(kind))
            return found

    def _at(self, index: int | None) -> None:
        """Notes which layer runs, for the reason; None: what is between layers."""
        self._where = "the forward" if index is None else self._facts[index].path

    def _parts(self, kind: int) -> dict[str, str]:
        """Path in a layer of this kind -> the part that it belongs to."""
        parts = next(fact.parts for fact in self._facts if fact.kind == kind)
        return {path: part for part, paths in parts for path in paths}


def _in_words(error: Exception, where: str) -> str:
    """Where code of the model could not be run, and why, on one line."""
    message = " ".join(str(error).split())[:_LONGEST_REASON].rstrip(".")
    return f"{where}: {type(error).__name__}{f': {message}' if message else ''}"


@contextmanager
def _mixed() -> Iterator[str]:
    """Inside, tensors are fake ones under autocast; on which device."""
    with fake_values(), torch.autocast("cpu", torch.bfloat16):
        yield "cpu"


def _copy(model: nn.Module) -> nn.Module:
    """Without values, and with its own containers and configs: what a forward leaves there does not reach the model."""
    new, memo = without_values(model), dict[int, Any]()
    pairs = list(zip(_all_modules(model), _all_modules(new), strict=True))
    for old, made in pairs:
        memo.setdefault(id(old), made)
        for mine, theirs in ((old.named_parameters, made), (old.named_buffers, made)):
            memo |= {id(tensor): getattr(theirs, name) for name, tensor in mine(recurse=False)}
    plain = vars(nn.Module()).keys()
    for _, made in pairs:
        for name, value in vars(made).items():
            if name not in plain and (isinstance(value, (dict, list, set, tuple, deque)) or hasattr(value, "to_dict")):
                with suppress(Exception):  # what cannot be copied is shared
                    vars(made)[name] = deepcopy(value, memo)
    return new


def _all_modules(model: nn.Module) -> list[nn.Module]:
    return [module for _, module in model.named_modules(remove_duplicate=False)]


def _without_values_that_say(model: nn.Module, example: Example | None) -> Example | None:
    """The example without arguments of which only the values say something, where the model can do without."""
    if not isinstance(example, Mapping):
        return example
    known = signature(model.forward).parameters
    needed = {name for name, each in known.items() if each.default is each.empty}
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False) and "decoder_input_ids" not in example:
        needed.add("labels")  # they are shifted
    return {name: x for name, x in example.items() if name not in _VALUES or name in needed}


def _long(example: Any, batch: int, length: int, device: torch.device) -> Any:
    """On so many sequences of this length; its first tensor has those of the example: numbers of tokens, or vectors.

    Raises:
        ValueError: it has none.
    """
    tensors = [x for x in tree_leaves(example) if isinstance(x, Tensor)]
    if not tensors or tensors[0].dim() < 2 + tensors[0].is_floating_point():
        raise ValueError("the example has no sequences")
    sequences, positions = tensors[0].shape[:2]

    def longer(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        shape = list(x.shape)
        if shape[:1] == [sequences]:
            shape[0] = batch
        if shape[1:2] == [positions]:
            shape[1] = length
        return torch.empty(shape, dtype=x.dtype, device=device)

    return tree_map(longer, example)


# -- Step 1 -----------------------------------------------------------------------------------------------------------


@dataclass
class _Call:
    """The call of a layer in a forward. times: how often one layer of its kind is called."""

    layer: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any = None
    times: int = 0


def _calls_of(
    model: nn.Module, layers: Sequence[nn.Module], kinds: Sequence[int], example: Any, at: Callable[[int | None], None]
) -> dict[int, _Call]:
    calls: dict[int, _Call] = {}

    def note(kind: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        at(layers.index(layer))
        calls.setdefault(kind, _Call(layer, args, kwargs))
        calls[kind].times += calls[kind].layer is layer

    def left(kind: int, output: Any) -> None:
        calls[kind].output = output
        at(None)

    def instead(kind: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The output of the first one of its kind, with the hidden states of this call."""
        note(kind, layer, args, kwargs)
        at(None)
        output = calls[kind].output
        return _replaced(output, _hidden(output), _hidden((args, kwargs)))

    with ExitStack() as stack:
        for layer, kind in zip(layers, kinds, strict=True):
            if kinds.index(kind) == layers.index(layer):
                stack.callback(layer.register_forward_pre_hook(
                    lambda layer, args, kwargs, kind=kind: note(kind, layer, args, kwargs), with_kwargs=True
                ).remove)  # fmt: skip
                stack.callback(layer.register_forward_hook(
                    lambda layer, args, output, kind=kind: left(kind, output)
                ).remove)  # fmt: skip
            else:
                function = partial(instead, kind, layer)
                stack.enter_context(_replaced_by(layer, lambda *args, f=function, **kwargs: f(args, kwargs)))
        with torch.no_grad():
            call_with(model, example)
    return calls


@contextmanager
def _replaced_by(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    module.forward = forward
    try:
        yield
    finally:
        del module.forward


def _no_experts(*args: Any, **kwargs: Any) -> Tensor:
    out: Tensor = _KeepsInput.apply(_hidden((args, kwargs)))  # type: ignore[no-untyped-call]
    return out


class _KeepsInput(torch.autograd.Function):
    """In place of experts."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """torch's."""
        ctx.save_for_backward(x)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        """torch's."""
        return torch.empty_like(*ctx.saved_tensors)


def _hidden(values: Any) -> Tensor:
    """The hidden states among arguments, or in an output."""
    return next(x for x in tree_leaves(values) if isinstance(x, Tensor) and x.is_floating_point())


def _replaced(values: Any, old: Tensor, new: Tensor) -> Any:
    return tree_map(lambda x: new if x is old else x, values)


# -- Step 2 -----------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class _Bytes:
    """Of a layer: as in `LayerKept`, of all tokens; and how many operations it ran."""

    width: float = 0.0
    rest: float = 0.0
    norms: float = 0.0
    attention: float = 0.0
    ffn: float = 0.0
    made: float = 0.0
    ops: int = 0


@dataclass
class _Part:
    """What a part of a layer has kept in its calls, with what it returned beside hidden states. before: bytes when it
    was called. inputs, outputs: what it was given, and returned beside hidden states, and the bytes of these.
    """

    kept: int = 0
    before: int = 0
    inputs: list[tuple[weakref.ref[torch.UntypedStorage], int]] = field(default_factory=list)
    outputs: list[tuple[weakref.ref[torch.UntypedStorage], int]] = field(default_factory=list)


def _alone(call: _Call, parts: Mapping[str, str]) -> _Bytes:
    given = _hidden((call.args, call.kwargs))
    leaf = torch.empty_like(given).requires_grad_()
    there = [x for x in tree_leaves((call.args, call.kwargs)) if isinstance(x, Tensor)]
    there += [leaf, *call.layer.parameters(), *call.layer.buffers()]
    found: dict[str, _Part] = {}
    with _LiveBytes(there) as live, ExitStack() as stack:
        for path in parts:
            stack.enter_context(_watched(call.layer.get_submodule(path), found.setdefault(path, _Part()), live))
        output = _output_of(call, given, leaf)
        own = live.bytes_of(output)
        kept, most = live.now - own, live.most
        inside: Counter[str] = Counter()
        for path, part in found.items():
            inside[parts[path]] += part.kept - _gone(part.outputs)
            if parts[path] == NORMS:  # to compute one again, what it was given must be there
                inside[NORMS] -= _gone(part.inputs)
        live.most = live.now
        output.backward(torch.empty_like(output), inputs=[leaf])  # gradients of weights are planned otherwise
        made = max(most - kept, live.most - kept - own)
    return _Bytes(
        width=given.numel() * given.element_size(), rest=call.times * (kept - inside.total()),
        norms=call.times * inside[NORMS], attention=call.times * inside[ATTENTION], ffn=call.times * inside[FFN],
        made=made, ops=live.ops,
    )  # fmt: skip


def _gone(storages: Iterable[tuple[weakref.ref[torch.UntypedStorage], int]]) -> int:
    """Bytes of those that nobody holds any more."""
    return sum(size for storage, size in storages if storage() is None)


def _output_of(call: _Call, given: Tensor, leaf: Tensor) -> Tensor:
    """Of a call with hidden states that nobody else holds."""
    args, kwargs = _replaced((call.args, call.kwargs), given, leaf.clone())
    return _hidden(call.layer(*args, **kwargs))


@contextmanager
def _watched(module: nn.Module, part: _Part, live: _LiveBytes) -> Iterator[None]:
    def called(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        part.inputs += [(weakref.ref(x), live.bytes_of(x)) for x in _storages((args, kwargs)) if live.bytes_of(x)]
        part.before = live.now

    def left(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        hidden, given = _hidden(output).untyped_storage(), _storages((args, kwargs))
        made = [x for x in _storages(output) if not any(x is other for other in given)]
        part.kept += live.now - part.before - sum(live.bytes_of(x) for x in made if x is hidden)
        part.outputs += [(weakref.ref(x), live.bytes_of(x)) for x in made if x is not hidden]

    hooks = (
        module.register_forward_pre_hook(called, with_kwargs=True),
        module.register_forward_hook(left, with_kwargs=True),
    )
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _storages(values: Any) -> list[torch.UntypedStorage]:
    found = (x.untyped_storage() for x in tree_leaves(values) if isinstance(x, Tensor))
    return list({id(storage): storage for storage in found}.values())


def _fact(whole: _Bytes, half: _Bytes | None, batch: int, length: int) -> LayerKept:
    """Per token and per pair of positions (step 3); together exact for sequences of this length."""
    of_token, of_pair = dict[str, float](), dict[str, float]()
    for each in (each for each in fields(whole) if each.name != "ops"):
        all_of_it, twice = (times * getattr(of, each.name) / batch for times, of in ((1, whole), (2, half or whole)))
        squared = max(0.0, 2 * (all_of_it - twice)) if half is not None else 0.0  # b x^2, of a x + b x^2
        squared = min(squared, all_of_it) if squared > _LEAST_SHARE * all_of_it else 0.0
        of_token[each.name], of_pair[each.name] = (all_of_it - squared) / length, squared / length**2
    made = of_pair.pop("made")
    return LayerKept(**of_token, scores=sum(of_pair.values()), scores_made=made)


class _LiveBytes(TorchDispatchMode):
    """Counts the memory of what ops make while it is active: now, and the most at a time. there: tensors that are not
    counted, nor views of them.
    """

    def __init__(self, there: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.most = self.ops = 0
        self._there = {id(storage): storage for storage in (x.untyped_storage() for x in there)}
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def bytes_of(self, of: Tensor | torch.UntypedStorage) -> int:
        """Of a tensor or storage; 0: it is not counted."""
        storage = of.untyped_storage() if isinstance(of, Tensor) else of
        return storage.nbytes() if id(storage) in self._known else 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """torch's."""
        result = func(*args, **(kwargs or {}))
        self.ops += 1
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._known or key in self._there:
            return

        def freed(_: Any) -> None:
            self.now -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, freed)
        self.now += size
        self.most = max(self.most, self.now)
