"""What is read from the router that a model has already: its logits, for losses and for its entropy.

A hook on the module that returns the logits hands them to an `OwnRouter` beside the experts, which run later in the
same block. The router itself is not changed.

Legend: T tokens, E experts that a token may choose, K top-k, B sequences, S tokens of a sequence.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from moecompile.errors import ConfigError, MoecompileError
from moecompile.nn.chosen import kept_within
from moecompile.nn.losses import KeepsLosses
from moecompile.nn.watch import named_arguments
from moecompile.routing import NO_BALANCE, OWN_LOSSES, BalanceSpec
from moecompile.torch_private import tree_leaves


def own_losses(model: nn.Module) -> dict[str, float]:
    """The coefficients of `OWN_LOSSES` that a model's config sets, by their names; those of 0 are left out."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    found = {}
    for name in OWN_LOSSES:
        value: Any = config
        for part in name.split("."):
            value = getattr(value, part, None)
        if value:
            found[name] = float(value)
    return found


class OwnRouter(KeepsLosses):
    """The model's own router as its experts see it.

    Args:
        num_choices: E. top_k: experts per token. score: `softmax` or `sigmoid`, of the logits; `other`: only their
            z-loss is known.
        source: path in the block of the module that returns the logits, and which of its tensors they are.
        balance: its losses are those of this router. has_sequences: whether the block is called with (B, S, D).
    """

    router: nn.Module | None

    def __init__(
        self,
        num_choices: int,
        top_k: int,
        score: str,
        source: tuple[str, int],
        balance: BalanceSpec = NO_BALANCE,
        *,
        has_sequences: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__(num_choices, top_k, score, balance, device, dtype)
        self.num_choices, self.source, self.has_sequences = num_choices, source, has_sequences
        self.given: Tensor | None = None  # the logits of this forward, (..., E); (B, S, E) if sequences are known
        vars(self)["router"] = None  # the module that is read, which stays where it is; None: nothing is read

    @property
    def is_trained(self) -> bool:
        """Whether the router has weights that get gradients."""
        return self.router is not None and any(weight.requires_grad for weight in self.router.parameters())

    def forward(self, ids_TK: Tensor, weights_TK: Tensor, real_T: Tensor | None = None) -> Tensor | None:
        """Keeps the losses of this forward.

        Args:
            ids_TK: chosen experts before drops. weights_TK: their routing weights, which the loss depends on.
            real_T: which tokens are no padding, (T,) bool; None: all.

        Returns:
            Each token's distribution over the choices, (T, E), without a graph; None in evaluation mode, or if it is
            not known.

        Raises:
            MoecompileError: the router did not run before the experts.
        """
        logits, self.given = self.given, None
        if not self.training or self.router is None:
            return None
        if logits is None:
            raise MoecompileError(f"the module {self.source[0]}, whose logits are read, did not run before the experts")
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if real_T is not None:
            ids_TK = ids_TK.masked_fill(~real_T.unsqueeze(1), self.num_choices)
        self.keep(self.losses_of(logits, None, ids_TK, real_T), weights_TK)
        if self.score == "other":
            return None
        return self.scored(logits.detach())[1].reshape(-1, self.num_choices)

    def scored(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """As for any router; the logits if the score is not known: the z-loss reads neither."""
        return (logits, logits) if self.score == "other" else super().scored(logits)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "given": None}

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        losses = "".join(f", {name} {value:g}" for name, value in self.losses.items())
        return f"reads {self.source[0]}, {self.num_choices} choices, {self.score}{losses}"


class OwnCapacity(nn.Module):
    """Drops assignments of the model's own router beyond the capacity; weights of kept assignments are unchanged.

    Args:
        num_experts: with weights. factor, drop: `routing.capacity_factor` and `routing.drop`.
    """

    def __init__(self, num_experts: int, factor: float, drop: str) -> None:
        super().__init__()
        self.num_experts, self.factor, self.drop = num_experts, factor, drop

    def forward(self, ids_TK: Tensor, weights_TK: Tensor, real_T: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns ids, with `num_experts` for a dropped assignment, and weights, 0 for one."""
        return kept_within(ids_TK, weights_TK, self.num_experts, self.factor, self.drop, real_T)

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return f"{self.num_experts} experts, capacity {self.factor} by {self.drop}"


def own_routers(model: nn.Module) -> list[tuple[str, OwnRouter]]:
    """All of them with their module paths, in model order."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, OwnRouter)]


def watch_routers(model: nn.Module) -> None:
    """Makes the models' own routers of a compiled model hand their logits over.

    Raises:
        MoecompileError: a router is gone.
    """
    found = own_routers(model)
    for path, reader in found:
        block = path.rpartition(".")[0].rpartition(".")[0]
        where, index = reader.source
        try:
            router = model.get_submodule(f"{block}.{where}".removeprefix("."))
        except AttributeError as error:
            raise MoecompileError(f"{block}: its router {where} is gone") from error
        vars(reader)["router"] = router
        logits = _Logits(reader, index)
        router.register_forward_hook(logits)
        if reader.has_sequences:
            model.get_submodule(block).register_forward_pre_hook(_Sequences(logits), with_kwargs=True)
    if any(reader.losses for _, reader in found) and hasattr(model, "config"):
        model.register_forward_pre_hook(_check_counted_once, with_kwargs=True)


class _Logits:
    """The hook after the router's module.

    It gives the logits their sequences: the experts may be compiled, and a size that they read would be a guard.
    """

    def __init__(self, reader: OwnRouter, index: int) -> None:
        self.reader, self.index = reader, index
        self.dims: tuple[int, ...] | None = None  # (B, S) of this forward

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if self.reader.training:
            tensors = [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
            logits = tensors[self.index]
            self.reader.given = logits if self.dims is None else logits.reshape(*self.dims, -1)


class _Sequences:
    """The hook before the block: which of its tokens are one sequence."""

    def __init__(self, logits: _Logits) -> None:
        self.logits = logits

    def __call__(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        first = next(leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor))
        self.logits.dims = tuple(first.shape[:-1])


def _check_counted_once(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuses a training forward in which transformers adds its own losses of the same routers."""
    config: Any = model.config
    given = named_arguments(model, args, kwargs)
    asked = given.get("output_router_logits")
    asked = getattr(config, "output_router_logits", False) if asked is None else asked
    if not asked or given.get("labels") is None or _reads_no_coefficient(model):
        return
    if not any(reader.training for _, reader in own_routers(model)):  # the model itself may be in evaluation mode
        return
    for name, value in own_losses(model).items():
        raise ConfigError(
            f"model.config.{name}", value,
            "the model adds this loss of its routers itself, because output_router_logits is true, so with "
            "balance.losses their load would count twice",
            "Set output_router_logits=False, or use balance=none",
        )  # fmt: skip


def _reads_no_coefficient(model: nn.Module) -> bool:
    """Whether it is a model of transformers whose code has no loss of routers, only its config (Llama 4)."""
    module = type(model).__module__
    return module.startswith("transformers.models.") and not hasattr(sys.modules[module], "load_balancing_loss_func")
