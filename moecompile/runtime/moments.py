"""AdamW whose moments are in fp32, bf16 or codes of 8 bits, and whose weights may be bf16, on shards of any mesh.

Algorithm, for a weight whose numbers or moments are narrower than fp32, a piece of its shard after another:
  1. The piece's moments become fp32, and its weights: their fp32 copies (`master`), or the weights cast.
  2. torch's own fused AdamW steps these numbers.
  3. Moments are rounded: to the nearest bf16; or block by block to codes (codes.py). A code of a second moment is never
     that of zero, which would divide by `eps` alone what a first moment still has.
  4. Weights in bf16 are rounded: to the nearest number; or with `stochastic` up with the probability that makes it
     right on average. The random number is a hash of the weight's name, the number's place in the whole weight, and
     the step: the same on every mesh, and on every replica.
Weights that no mesh cuts, such as routers, have few numbers; their moments stay in their own dtype. What is fp32 in all
is stepped in place, in one call. Nothing depends on how a weight is cut, but for rows that tp cuts to other blocks: a
step of a shard is that part of the step of the whole weight, bit for bit.

State of a weight, each entry cut as the weight is: `step`; `exp_avg` and `exp_avg_sq` (with Muon `momentum_buffer`), in
codes with `NAME_scale`; `master`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from math import prod
from typing import Any
from zlib import crc32

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from moecompile.errors import ConfigError
from moecompile.nn.placement import Order, expert_orders, global_rows
from moecompile.nn.stages import tied_names
from moecompile.ops.lookups import row_gradients
from moecompile.passes.shard import kept_whole
from moecompile.runtime.codes import Coded, Tables, tables
from moecompile.runtime.row_steps import step_rows
from moecompile.schema import MOMENTS, Bf16Weights, OptimizerConfig, RowRule, StateKind, block_of, resolved
from moecompile.torch_private import is_fake, local_block, local_part

SCALE, MASTER, STEP = "_scale", "master", "step"
FIRST, SECOND, MOMENTUM = "exp_avg", "exp_avg_sq", "momentum_buffer"
MOMENTS_OF = (FIRST, SECOND, MOMENTUM)
_SIGNED = {FIRST: True, SECOND: False, MOMENTUM: True}
_DTYPES = {StateKind.fp32: torch.float32, StateKind.bf16: torch.bfloat16, StateKind.int8: torch.uint8}
_PIECE = {"cpu": 2**18}
_LONG_PIECE = 2**22
"""Numbers of a piece: some 40 bytes a number are there for a moment. A CPU's fit its caches; a rehearsal has those of
other devices.
"""


# -- one moment of one weight ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _Moment:
    """This rank's part of a moment, flat. scales, tables: of its codes; None: it has none. wide: what it is read as."""

    name: str
    numbers: Tensor
    scales: Tensor | None
    tables: Tables | None
    wide: torch.dtype

    def read(self, piece: slice) -> Tensor:
        """The numbers of a piece; if they are wide, they themselves."""
        if self.scales is None or not self.scales.numel():
            return self.numbers[piece].to(self.wide)
        return self._codes(piece).read().to(self.wide)

    def write(self, piece: slice, values: Tensor) -> None:
        """Rounds the values of a piece (step 3)."""
        if self.scales is not None and self.scales.numel():
            self._codes(piece).write(values.float())
        elif self.numbers.dtype != self.wide:
            self.numbers[piece].copy_(values)

    def read_all(self, shape: torch.Size) -> Tensor:
        """All numbers, in this shape; if they are wide, they themselves."""
        parts = [self.read(piece) for piece in self._all()]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(shape)

    def write_all(self, values: Tensor) -> None:
        """Rounds all numbers."""
        for piece in self._all():
            self.write(piece, values.reshape(-1)[piece])

    def take(self, other: _Moment, shape: torch.Size) -> None:
        """Makes the numbers those of another moment."""
        values = other.read_all(shape)
        self.write_all(values)
        if self.scales is None and self.numbers.dtype == self.wide:
            self.numbers.copy_(values.view(-1))

    def _all(self) -> list[slice]:
        numbers = self.numbers.numel()
        if self.scales is None or not numbers:
            return [slice(0, numbers)]
        return list(_pieces(self.numbers, numbers // self.scales.numel()))

    def _codes(self, piece: slice) -> Coded:
        assert self.scales is not None and self.tables is not None
        block = self.numbers.numel() // self.scales.numel()
        scales = self.scales[piece.start // block : piece.stop // block]
        lowest = 0 if _SIGNED[self.name] else 1
        return Coded(codes=self.numbers[piece], scales=scales, tables=self.tables, lowest=lowest)


def _block(parameter: Tensor) -> int | None:
    return block_of(parameter.shape, local_part(parameter).shape[-1] if parameter.ndim else 1)


def new_moment(state: dict[str, Any], name: str, parameter: Tensor, dtype: torch.dtype, block: int | None) -> None:
    """Adds a moment of zeros. block: numbers that share a scale, of one in codes."""
    state[name] = torch.zeros_like(parameter, dtype=dtype, memory_format=torch.contiguous_format)
    if block is None:
        return
    part = local_part(parameter)
    shape = torch.Size((*parameter.shape[:-1], parameter.shape[-1] // block))
    scales = torch.zeros((*part.shape[:-1], part.shape[-1] // block), dtype=torch.float32, device=part.device)
    if isinstance(parameter, DTensor):
        strides = tuple(prod(shape[dim + 1 :]) for dim in range(len(shape)))
        scales = DTensor.from_local(
            scales, parameter.device_mesh, parameter.placements, run_check=False, shape=shape, stride=strides
        )
    state[name + SCALE] = scales


def _flat(tensor: Tensor) -> Tensor:
    """This rank's part as one row, which is never a copy."""
    return local_part(tensor).detach().view(-1)


def _pieces(numbers: Tensor, multiple: int) -> Iterator[slice]:
    most = _LONG_PIECE if is_fake(numbers) else _PIECE.get(numbers.device.type, _LONG_PIECE)
    size = max(most // multiple, 1) * multiple
    for start in range(0, numbers.numel(), size):
        yield slice(start, min(start + size, numbers.numel()))


# -- how the optimizer of a model keeps them ------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Keeping:
    """How moments and narrow weights are kept.

    Args:
        places: of each weight, what its random numbers are made of: a number for its name, and its order of experts.
        whole: weights that no mesh cuts, which are few; their moments stay in their own dtype.
    """

    state: StateKind = StateKind.auto
    weights: Bf16Weights = Bf16Weights.nearest
    places: Mapping[Any, tuple[int, Order | None]] = field(default_factory=dict)
    whole: Collection[Tensor] = ()
    _tables: dict[tuple[bool, torch.device], Tables] = field(default_factory=dict, repr=False, compare=False)

    @property
    def is_torchs(self) -> bool:
        """Whether torch's own optimizer keeps everything so."""
        return self.state is StateKind.auto and self.weights is Bf16Weights.nearest

    def kind(self, parameter: Tensor) -> StateKind | None:
        """The kind of a weight's moments; None: in its own dtype."""
        has_master = self.weights is Bf16Weights.master and parameter.dtype == torch.bfloat16
        state = StateKind.auto if parameter in self.whole else self.state
        return resolved(state, 32 if has_master else 8 * parameter.element_size())

    def moment_of(self, parameter: Tensor, name: str, state: Mapping[str, Any]) -> _Moment:
        """A weight's moment."""
        scales = state.get(name + SCALE)
        return _Moment(
            name=name, numbers=_flat(state[name]), scales=None if scales is None else _flat(scales),
            tables=None if scales is None else self._tables_of(_SIGNED[name], parameter.device),
            wide=parameter.dtype if self.is_torchs else wide(parameter.dtype),
        )  # fmt: skip

    def _tables_of(self, signed: bool, device: torch.device) -> Tables:
        if (signed, device) not in self._tables:
            self._tables[signed, device] = tables(signed, device)
        return self._tables[signed, device]

    def add(self, state: dict[str, Any], parameter: Tensor, names: Sequence[str]) -> None:
        """Adds the moments of a weight, and its fp32 copy."""
        kind = self.kind(parameter)
        block = _block(parameter) if kind is not None and MOMENTS[kind].in_blocks else None
        dtype = parameter.dtype if kind is None else _DTYPES[kind]
        if kind is not None and MOMENTS[kind].in_blocks and block is None:
            dtype = wide(parameter.dtype)
        for name in names:
            new_moment(state, name, parameter, dtype, block)
        if parameter.dtype != torch.bfloat16:
            return
        if self.weights is Bf16Weights.stochastic and STEP not in state:
            state[STEP] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        if self.weights is Bf16Weights.master:
            state[MASTER] = parameter.detach().to(torch.float32)

    def change(self, parameter: Tensor, state: dict[str, Any], by: Callable[[Tensor], None]) -> None:
        """Calls `by` with the numbers of a weight, which it changes in place, and rounds them."""
        weight = local_part(parameter).detach()
        if self.is_torchs:
            return by(weight)
        all_of = slice(0, weight.numel())
        values = self.numbers(parameter, state, all_of)
        by(values.view(weight.shape))
        if STEP in state:
            state[STEP] += 1
        return self.round(parameter, values, state.get(STEP), all_of)

    def numbers(self, parameter: Tensor, state: Mapping[str, Any], piece: slice) -> Tensor:
        """What is stepped of a weight: fp32 or wider; itself, if it is."""
        return _flat(state.get(MASTER, parameter))[piece].to(wide(parameter.dtype))

    def round(self, parameter: Tensor, values: Tensor, step: Tensor | None, piece: slice) -> None:
        """Writes the numbers of a piece that were stepped (step 4)."""
        if parameter.dtype != torch.bfloat16 or self.weights is not Bf16Weights.stochastic:
            if values.dtype != parameter.dtype:
                _flat(parameter)[piece].copy_(values)
            return
        assert step is not None
        number, order = self.places[parameter]
        draws = _hashed(_positions(parameter, order, piece), number, step)
        bits = values.view(torch.int32) + draws
        rounded = (bits & -0x10000).view(torch.float32)
        _flat(parameter)[piece].copy_(torch.where(values.isfinite(), rounded, values))

    @torch.no_grad()
    def adamw(self, parameters: Sequence[nn.Parameter], states: Sequence[dict[str, Any]], group: Any) -> None:
        """One step of weights with gradients, whose state may be empty."""
        given: list[list[Tensor]] = [[], [], [], [], []]
        for parameter, state in zip(parameters, states, strict=True):
            if not state:
                state[STEP] = torch.zeros((), dtype=torch.float32, device=parameter.device)
                self.add(state, parameter, (FIRST, SECOND))
            assert parameter.grad is not None
            of_all = [local_part(each) for each in (parameter, parameter.grad, state[FIRST], state[SECOND])]
            if self.is_torchs or {each.dtype for each in of_all} == {wide(parameter.dtype)}:
                for value, values in zip((*of_all, local_part(state[STEP])), given, strict=True):
                    values.append(value)
            else:
                self._in_pieces(parameter, of_all[1].reshape(-1), state, group)
        if given[0]:
            _adamw(given, group)

    def _in_pieces(self, parameter: nn.Parameter, grad: Tensor, state: Mapping[str, Any], group: Any) -> None:
        moments = [self.moment_of(parameter, name, state) for name in (FIRST, SECOND)]
        scales, step = moments[0].scales, local_part(state[STEP])
        before = step.clone()
        step += 1
        has_blocks = scales is not None and scales.numel() > 0
        multiple = moments[0].numbers.numel() // scales.numel() if has_blocks and scales is not None else 1
        for piece in _pieces(grad, multiple):
            values = self.numbers(parameter, state, piece)  # Step 1
            made = [moment.read(piece) for moment in moments]
            _adamw(
                [[values], [grad[piece].to(values.dtype)], *([each] for each in made), [before.clone()]], group
            )  # Step 2
            for moment, new in zip(moments, made, strict=True):
                moment.write(piece, new)
            self.round(parameter, values, step, piece)


def _adamw(given: Sequence[list[Tensor]], group: Mapping[str, Any]) -> None:
    """torch's step of weights by their gradients, with first and second moments and numbers of steps."""
    weights, grads, first, second, steps = given
    adamw(
        weights, grads, first, second, [], steps, fused=True, amsgrad=False, beta1=group["betas"][0],
        beta2=group["betas"][1], lr=group["lr"], weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
    )  # fmt: skip


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which numbers are stepped."""
    return torch.promote_types(dtype, torch.float32)


def keeping_of(model: nn.Module, config: OptimizerConfig, trained: Iterable[nn.Parameter]) -> Keeping:
    """How a config keeps the moments of a model's weights.

    Raises:
        ConfigError: `bf16_weights` is of no weight, or a weight is not contiguous.
    """
    given = config.bf16_weights
    if given is not Bf16Weights.nearest and all(each.dtype != torch.bfloat16 for each in trained):
        raise ConfigError(
            "optimizer.bf16_weights", given.value,
            "no trained weight is stored in bf16; trainer.precision=bf16_params casts from shards that are fp32",
            "Leave it out",
        )  # fmt: skip
    if config.state is not StateKind.auto or given is not Bf16Weights.nearest:
        _check_contiguous(model)
    orders, tied = expert_orders(model), tied_names(model)
    names = {parameter: (name, tied.get(name, name)) for name, parameter in model.named_parameters()}
    places = {weight: (crc32(whole.encode()), orders.get(name)) for weight, (name, whole) in names.items()}
    return Keeping(state=config.state, weights=given, places=places, whole=kept_whole(model))


def _check_contiguous(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not local_part(parameter).is_contiguous():
            raise ConfigError(
                "optimizer", name, "is stepped piece by piece, and is not contiguous in memory",
                "Give the model a contiguous copy of it, or leave optimizer.state and optimizer.bf16_weights out",
            )  # fmt: skip


# -- random numbers of places (step 4) ------------------------------------------------------------------------------


def _positions(parameter: Tensor, order: Order | None, piece: slice) -> Tensor:
    """The place of each number of a piece in the whole weight, experts in the order of their ids."""
    part, block = local_part(parameter), local_block(parameter)
    local = torch.arange(piece.start, piece.stop, device=part.device)
    place = torch.zeros_like(local)
    for dim in range(part.ndim):
        index = local // prod(part.shape[dim + 1 :]) % part.shape[dim]
        if dim == 0 and order is not None:
            index = torch.tensor(list(global_rows(parameter, order)), device=part.device)[index]
        else:
            index = index + block[dim].start
        place += index * prod(parameter.shape[dim + 1 :])
    return place


_ODD = (-0x61C8864680B583EB, -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15)  # of splitmix64, as signed numbers


def _hashed(places: Tensor, name: int, step: Tensor) -> Tensor:
    """16 random bits for each place (splitmix64), as int32."""
    x = places * _ODD[0] + (step.long() * 2**32 + name) * _ODD[1]
    for shift, factor in ((30, _ODD[1]), (27, _ODD[2])):
        x = (x ^ ((x >> shift) & (2 ** (64 - shift) - 1))) * factor
    return ((x ^ (x >> 31)) & 0xFFFF).int()


# -- the optimizer --------------------------------------------------------------------------------------------------


BY_ROWS = tuple(rule.value for rule in RowRule if rule is not RowRule.same)
"""Kinds of groups of embedding tables, whose rows are stepped that have a gradient."""


class KeepsItsState(Optimizer):
    """An optimizer whose state is loaded as it was: torch casts it to the dtype of the weights.

    A subclass says how weights with a gradient are stepped (`advance`); here are tables that are stepped by rows.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every weight that has a gradient; the result of the closure, which is called before."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        given = []
        for group in self.param_groups:
            if group.get("kind") in BY_ROWS:
                for table in group["params"]:
                    step_rows(table, row_gradients(table), self.state[table], group)
            else:
                given.append((group, [p for p in group["params"] if p.grad is not None]))
        self.advance(given)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """torch's, and for gradients that are kept by rows."""
        super().zero_grad(set_to_none)
        for parameter in (p for group in self.param_groups for p in group["params"]):
            if (rows := row_gradients(parameter)) is not None:
                rows.clear()

    def advance(self, given: Sequence[tuple[dict[str, Any], list[nn.Parameter]]]) -> None:
        """Steps the weights of each group that have gradients."""
        raise NotImplementedError

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """torch's, but for the dtypes."""
        super().load_state_dict(state_dict)
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            for name, value in state_dict["state"].get(number, {}).items():
                if isinstance(value, Tensor):
                    self.state[parameter][name] = deepcopy(value).to(parameter.device)


class AdamW(KeepsItsState):
    """torch's AdamW, with moments and weights that are kept as `Keeping` says."""

    def __init__(
        self, groups: Iterable[dict[str, Any]], keeping: Keeping, *, lr: float = 1e-3, weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8,
    ) -> None:  # fmt: skip
        super().__init__(list(groups), {"lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps})
        self.keeping = keeping

    def advance(self, given: Sequence[tuple[dict[str, Any], list[nn.Parameter]]]) -> None:
        """By `Keeping.adamw`."""
        for group, parameters in given:
            self.keeping.adamw(parameters, [self.state[parameter] for parameter in parameters], group)
