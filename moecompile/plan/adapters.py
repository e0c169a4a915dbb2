"""The adapters of a plan: which weights get them, and their sizes."""

from __future__ import annotations

from dataclasses import dataclass

from moecompile.errors import PlanError
from moecompile.plan.checks import at_least, plan_errors
from moecompile.ranges import Real

_TAKEN_FOR_EXPERTS = ("gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3")  # peft 0.21
_ALPHA = Real("(0, inf)", "Use twice the rank")


@dataclass(frozen=True, kw_only=True)
class ExpertAdapters:
    """Adapters of one site's stacked weights: expert e of weight W becomes W_e + alpha / rank * B_e A_e.

    weights: names of the weights, as the model's experts module has them.

    Raises:
        PlanError: a number is out of range, or there is no weight.
    """

    rank: int
    alpha: float
    weights: tuple[str, ...]

    def __post_init__(self) -> None:
        with plan_errors():
            at_least(1, "adapters", rank=self.rank)
            _ALPHA.check("adapters.alpha", self.alpha)
        if not self.weights:
            raise PlanError("adapters.weights", [], "is empty", "Use null for experts without adapters")

    @property
    def scale(self) -> float:
        """The factor of the product."""
        return self.alpha / self.rank


@dataclass(frozen=True, kw_only=True)
class AdaptersPlan:
    """Adapters of a model; everything else is frozen.

    linears: module paths of the linears with adapters. dropout: of their inputs. train_router: whether the model's own
    routers are trained in full. Adapters of experts are in the layers.

    Raises:
        PlanError: a number is out of range.
    """

    rank: int
    alpha: float
    dropout: float
    linears: tuple[str, ...]
    train_router: bool

    @property
    def as_parameters(self) -> tuple[str, ...]:
        """The linears that peft must be told to adapt by their parameter.

        In a list of modules, peft takes these names for experts of Mixtral's or Qwen2-MoE's older form.
        """
        return tuple(path for path in self.linears if path.rpartition(".")[2] in _TAKEN_FOR_EXPERTS)

    def __post_init__(self) -> None:
        with plan_errors():
            at_least(1, "adapters", rank=self.rank)
            _ALPHA.check("adapters.alpha", self.alpha)
            Real("[0, 1)", "Use 0").check("adapters.dropout", self.dropout)
