"""The router: chooses the experts of each token and their routing weights.

    jitter -> logits + bias -> score -> correction bias -> group limit -> top-k -> normalise -> scale -> capacity

Legend: T tokens, D model dim, E experts, K top-k, G groups.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from moecompile import ops  # noqa: F401  (registers the ops)
from moecompile.nn import losses as loss_functions
from moecompile.nn.chosen import replayed_or_live
from moecompile.nn.context import whole_sequences
from moecompile.nn.meter import LoadMeter, at_least
from moecompile.nn.padding import without_padding
from moecompile.routing import NO_BALANCE, BalanceSpec, RouterConfig, check_balance
from moecompile.torch_private import in_backward


class Router(nn.Module):
    """Chooses experts for tokens, or tokens for experts.

    weight (E, D), bias (E,) and all computation are in fp32 or wider with every precision. `correction_bias` (E,)
    affects the choice but not the routing weights (DeepSeek-V3 report, section 2.1.2). `global_load` (E,), only with a
    global_batch loss, is each expert's fraction of the previous optimizer step's load. `meter` counts the load.

    A dropped assignment, and with expert choice an expert that did not take the token, has the id num_experts and the
    weight 0. So has padding, in every slot; it is in no count, loss or capacity.

    Args:
        d_model, num_experts: sizes.
        config: the routing. balance: auxiliary losses, and the rule of `correction_bias` (see `update_balance`).
        num_nodes: nodes over which the experts are spread, for the meter.

    Raises:
        ConfigError: the config does not fit the number of experts, or the balance does not fit the config.
    """

    correction_bias: Tensor
    bias: Tensor | None
    global_load: Tensor | None

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        config: RouterConfig,
        balance: BalanceSpec = NO_BALANCE,
        *,
        num_nodes: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        config.check_experts(num_experts)
        check_balance(config, balance)
        self.num_experts, self.config, self.balance, self.losses = num_experts, config, balance, balance.losses
        wide = torch.promote_types(dtype, torch.float32)
        self.weight = nn.Parameter(torch.empty(num_experts, d_model, device=device, dtype=wide))
        self.register_parameter(
            "bias", nn.Parameter(torch.empty(num_experts, device=device, dtype=wide)) if config.bias else None
        )
        self.register_buffer("correction_bias", torch.zeros(num_experts, device=device, dtype=wide))
        even = torch.full((num_experts,), 1 / num_experts, device=device, dtype=wide)
        self.register_buffer("global_load", even if balance.global_batch else None)
        self.meter = LoadMeter(num_experts, num_nodes, device, has_entropy=True)
        self.aux_losses: dict[str, Tensor] = {}  # coefficient * loss of the last training forward, with its graph
        self.aux_node: Node | None = None  # to test whether a loss depends on that forward
        self.on_choice: Callable[[Tensor], None] | None = None  # `record_routes` is told every choice
        self.replayed: Tensor | None = None  # the choice that `replay_routes` sets, (T, K)
        self.positions: str | None = None  # process group of the ranks with the other positions of a sequence
        self.key = torch.zeros(4, dtype=torch.int64, device="cpu")  # not a buffer: ops read it on the host
        self.is_keyed = False

    @property
    def aux_loss(self) -> Tensor | None:
        """Sum of coefficient * loss of the last training forward, a mean over its tokens; None without losses."""
        return torch.stack(list(self.aux_losses.values())).sum() if self.aux_losses else None

    def forward(self, x: Tensor, real_T: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Routes x (..., D), with the sequence in dim -2; (T, D) is one sequence.

        Args:
            real_T: which tokens are no padding, (T,) bool; None: all.

        Returns:
            weights_TK (fp32 or wider) and ids_TK (int64) of all T tokens; (T, E) with expert choice.
        """
        logits = self.logits(x)
        scores = self._score(logits)
        scores_TE = torch.ops.moecompile.flatten_tokens(scores)
        if self.config.choice == "expert":
            ids, weights = self._expert_choice(scores_TE, real_T)
            kept = ids
        else:
            ids = self.choose(scores_TE)
            if self.replayed is not None:
                ids = replayed_or_live(self.replayed, ids, self.num_experts)
            ids, weights = without_padding(ids, self._weights(scores_TE, ids), real_T, self.num_experts)
            if self.on_choice is not None:
                self.on_choice(ids)
            kept, weights = self._limited(ids, weights, real_T)
        if self.training:
            self._keep(self._train(logits, scores, ids, kept, real_T), logits)
        return weights, kept

    def logits(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., E), fp32 or wider, with jitter in training."""
        if self.training and self.config.jitter:
            x = x.to(torch.promote_types(self.weight.dtype, torch.float32))
            x = x * (1.0 + self.config.jitter * (2.0 * self._uniform(x) - 1.0))
        logits: Tensor = torch.ops.moecompile.router_logits(x, self.weight, self.bias)
        return logits

    def scores(self, x: Tensor) -> Tensor:
        """The scores by which experts are chosen, before the correction bias, (T, E), fp32 or wider."""
        scores_TE: Tensor = torch.ops.moecompile.flatten_tokens(self._score(self.logits(x)))
        return scores_TE

    @torch.no_grad()
    def choose(self, scores_TE: Tensor) -> Tensor:
        """Ids of the chosen experts before drops, (T, K) int64."""
        kernels, config = torch.ops.moecompile, self.config
        if config.workload == "balanced":
            ids_TK: Tensor = kernels.balanced_ids(scores_TE, config.top_k, config.groups, config.top_groups)
            return ids_TK
        if config.workload == "none":
            choice_TE = scores_TE + self.correction_bias
        else:
            how = (config.workload, config.skew, config.hot_experts)
            choice_TE = kernels.workload_scores(self._uniform(scores_TE), self.key, *how)
        if config.top_groups < config.groups:
            # -inf, not 0: a closed group must lose even against negative corrected scores.
            choice_TE = choice_TE.masked_fill(~self._open_experts(choice_TE), float("-inf"))
        return choice_TE.topk(config.top_k, dim=-1, sorted=False).indices

    def _score(self, logits: Tensor) -> Tensor:
        if self.config.score == "softmax_after_topk":
            return logits
        return logits.sigmoid() if self.config.score == "sigmoid" else logits.softmax(-1)

    def _probs(self, logits: Tensor, scores: Tensor) -> Tensor:
        """Scores normalized to sum to 1 over the experts."""
        if self.config.score == "sigmoid":
            return scores / scores.sum(-1, keepdim=True).clamp_min(1e-20)
        return scores if self.config.score == "softmax" else logits.softmax(-1)

    def _weights(self, scores_TE: Tensor, ids_TK: Tensor) -> Tensor:
        weights_TK = scores_TE.gather(1, ids_TK)
        if self.config.score == "softmax_after_topk":
            weights_TK = weights_TK.softmax(-1)
        elif self.config.normalize:
            # The minimum avoids a division by zero if all sigmoid scores underflow (DeepSeek-V3 uses 1e-20).
            weights_TK = weights_TK / weights_TK.sum(1, keepdim=True).clamp_min(1e-20)
        return weights_TK * self.config.scale

    def _limited(self, ids_TK: Tensor, weights_TK: Tensor, real_T: Tensor | None) -> tuple[Tensor, Tensor]:
        """Drops assignments beyond the capacity; weights of kept assignments are unchanged."""
        if self.config.capacity_factor is None:
            return ids_TK, weights_TK
        kept_TK = torch.ops.moecompile.within_capacity(
            ids_TK, weights_TK.detach(), self.num_experts, self.config.capacity_factor, self.config.drop, real_T
        )
        return ids_TK.masked_fill(~kept_TK, self.num_experts), weights_TK.masked_fill(~kept_TK, 0.0)

    def _expert_choice(self, scores_TE: Tensor, real_T: Tensor | None) -> tuple[Tensor, Tensor]:
        factor = 1.0 if self.config.capacity_factor is None else self.config.capacity_factor
        ids_TE = torch.ops.moecompile.expert_choice(scores_TE.detach(), self.config.top_k, factor, real_T)
        return ids_TE, scores_TE.masked_fill(ids_TE == self.num_experts, 0.0) * self.config.scale

    def _train(
        self, logits: Tensor, scores: Tensor, ids: Tensor, kept: Tensor, real: Tensor | None
    ) -> dict[str, Tensor]:
        """Counts the load of this forward, and returns its losses times their coefficients."""
        probs = self._probs(logits, scores)
        self.meter(ids, kept, torch.ops.moecompile.flatten_tokens(probs).detach(), real)
        if self.losses and logits.numel() == 0:  # the mean over no tokens is undefined
            return {name: logits.sum() for name in self.losses}
        if self.losses and self.positions is not None:
            logits, ids, real = whole_sequences(logits, ids, real, self.positions)
            scores = self._score(logits)
            probs = self._probs(logits, scores)
        return {
            name: coefficient * self._loss(name, logits, scores, probs, ids, real)
            for name, coefficient in self.losses.items()
        }

    def _keep(self, losses: dict[str, Tensor], logits: Tensor) -> None:
        """Replaces the losses of the previous forward by those of this one.

        A forward without gradients does not replace losses with gradients, which the objective still needs for its
        backward.
        """
        if torch.compiler.is_compiling():
            self.aux_losses = losses  # compiled code cannot query whether autograd is in backward
        elif in_backward():
            return  # a recomputed forward must not keep its graph alive
        elif torch.is_grad_enabled() or not any(loss.requires_grad for loss in self.aux_losses.values()):
            self.aux_losses, self.aux_node = losses, logits.grad_fn

    def _loss(
        self, name: str, logits: Tensor, scores: Tensor, probs: Tensor, ids: Tensor, real: Tensor | None
    ) -> Tensor:
        if name == "micro_batch":
            return loss_functions.micro_batch_loss(probs, ids, real)
        if name == "sequence":
            sequences = torch.atleast_2d(scores), torch.atleast_2d(probs)
            return loss_functions.sequence_loss(*sequences, self.config.top_k, real)
        if name == "global_batch":
            assert self.global_load is not None
            return loss_functions.global_batch_loss(probs, self.global_load, real)
        return loss_functions.z_loss(logits, real)

    def _open_experts(self, choice_TE: Tensor) -> Tensor:
        config = self.config
        per_group = self.num_experts // config.groups
        by_group_TGe = choice_TE.view(-1, config.groups, per_group)
        num_best = {"max": 1, "top2": 2, "topk_over_m": max(1, config.top_k // config.top_groups)}[config.group_score]
        group_scores_TG = by_group_TGe.topk(min(num_best, per_group), dim=-1).values.sum(-1)
        best = group_scores_TG.topk(config.top_groups, dim=-1, sorted=False).indices
        open_TG = torch.zeros_like(group_scores_TG, dtype=torch.bool).scatter_(1, best, True)
        return open_TG.repeat_interleave(per_group, dim=1)

    def _uniform(self, like: Tensor) -> Tensor:
        """Uniform numbers in [0, 1): from the key if one was set, else from the global random state."""
        if self.is_keyed:
            noise: Tensor = torch.ops.moecompile.keyed_uniform(like.detach(), self.key)
            return noise
        return torch.rand_like(like)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        # A cast of the model to bf16 leaves the router in fp32, a move to another device moves it.
        super()._apply(at_least(torch.float32, fn), recurse)  # type: ignore[no-untyped-call]
        return self

    def __getstate__(self) -> dict[str, Any]:
        # The losses of the last forward have a graph, which can be neither copied nor pickled.
        return {**self.__dict__, "aux_losses": {}, "aux_node": None}

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        config = self.config
        limit = f", {config.top_groups} of {config.groups} groups by {config.group_score}" if config.groups > 1 else ""
        words = [f"{self.num_experts} experts, {config.score} top-{config.top_k}{limit}, scale={config.scale}"]
        if config.choice == "expert":
            words.append("experts choose")
        if config.capacity_factor is not None:
            words.append(f"capacity {config.capacity_factor} by {config.drop}")
        if config.workload != "none":
            words.append(f"workload {config.workload}")
        return ", ".join(words)


def routers_of(model: nn.Module) -> list[tuple[str, Router]]:
    """All routers with their module paths, in model order."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, Router)]


def set_random_key(model: nn.Module, seed: int, step: int, micro_batch: int) -> None:
    """Sets the random key of every router: random numbers of its next forwards depend only on the key and the layer.

    So they are the same on every mesh, and a forward that is recomputed before the next key draws the same numbers.

    Args:
        step: optimizer step. micro_batch: index of the micro-batch in the step, in the order of one process.
    """
    for layer, (_, router) in enumerate(routers_of(model)):
        router.key.copy_(torch.tensor((seed, step, micro_batch, layer)))
        router.is_keyed = True
