"""The router: chooses the experts of each token and their routing weights.

    jitter -> norm -> logits + bias -> score -> correction bias -> group limit -> top-k, or that of each group
    -> normalise -> scale -> scale of the expert -> capacity

Legend: T tokens, D model dim, E experts, K top-k, G groups.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from moecompile import ops  # noqa: F401  (registers the ops)
from moecompile.errors import MoecompileError
from moecompile.nn.chosen import best_of_each_group, in_words, kept_within, open_experts, replayed_or_live
from moecompile.nn.losses import KeepsLosses
from moecompile.nn.meter import LoadMeter
from moecompile.nn.padding import without_padding
from moecompile.nn.scores import FUNCTIONS, normed
from moecompile.routing import BINS, NO_BALANCE, BalanceSpec, RouterConfig, check_balance
from moecompile.routing.scores import SCORES


class Router(KeepsLosses):
    """Chooses experts for tokens, or tokens for experts.

    weight (E, D), bias (E,), norm_scale (D,), expert_scale (E,), shared_weight (S, D) and all computation are in fp32
    or wider with every precision; without these options, the last four are None. `correction_bias` (E,) affects the
    choice but not the routing weights (DeepSeek-V3 report, section 2.1.2). `meter` counts the load.

    A dropped assignment, and with expert choice an expert that did not take the token, has the id num_experts and the
    weight 0. So has padding, in every slot; it is in no count, loss or capacity.

    Args:
        d_model, num_experts: sizes.
        config: the routing. balance: auxiliary losses, and the rule of `correction_bias` (see `update_balance`).
        num_nodes, num_identity: nodes over which the experts are spread, and how many of these, the last ones, have no
            weights; for the meter.
        num_shared: slices of a shared expert that the router weighs beside a token's chosen experts (Inkling).
        layer: number of the layer; with choice=hash, layers with different numbers choose independently.

    Raises:
        ConfigError: the config does not fit the number of experts, or the balance does not fit the config.
    """

    correction_bias: Tensor
    bias: Tensor | None
    norm_scale: Tensor | None
    expert_scale: Tensor | None
    shared_weight: Tensor | None

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        config: RouterConfig,
        balance: BalanceSpec = NO_BALANCE,
        *,
        num_nodes: int = 1,
        num_identity: int = 0,
        num_shared: int = 0,
        layer: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        config.check_experts(num_experts)
        check_balance(config, balance)
        even_groups = config.groups if config.even_groups else 1
        super().__init__(num_experts, config.top_k, config.score, balance, device, dtype, even_groups)
        self.num_experts, self.config, self.balance = num_experts, config, balance
        wide = torch.promote_types(dtype, torch.float32)
        self.weight = nn.Parameter(torch.empty(num_experts, d_model, device=device, dtype=wide))
        for name, size, exists in (
            ("bias", num_experts, config.bias),
            ("norm_scale", d_model, config.norm),
            ("expert_scale", num_experts, config.expert_scale),
        ):
            made = nn.Parameter(torch.empty(size, device=device, dtype=wide)) if exists else None
            self.register_parameter(name, made)
        rows = nn.Parameter(torch.empty(num_shared, d_model, device=device, dtype=wide)) if num_shared else None
        self.register_parameter("shared_weight", rows)
        self.register_buffer("correction_bias", torch.zeros(num_experts, device=device, dtype=wide))
        bins = BINS if balance.rule == "quantile" else 0
        self.meter = LoadMeter(num_experts, num_nodes, device, has_entropy=True, num_identity=num_identity, bins=bins)
        self.layer = layer
        self.number: int | None = None  # among all routers, of a model that is cut into stages
        self.on_choice: Callable[[Tensor], None] | None = None  # `record_routes` is told every choice
        self.replayed: Tensor | None = None  # the choice that `replay_routes` sets, (T, K)
        self.key = torch.zeros(4, dtype=torch.int64, device="cpu")  # not a buffer: ops read it on the host
        self.is_keyed = False

    def forward(self, x: Tensor, real_T: Tensor | None = None, tokens_T: Tensor | None = None) -> tuple[Tensor, ...]:
        """Routes x (..., D), with the sequence in dim -2; (T, D) is one sequence.

        Args:
            real_T: which tokens are no padding, (T,) bool; None: all.
            tokens_T: token ids, for choice=hash.

        Returns:
            weights_TK (fp32 or wider) and ids_TK (int64) of all T tokens; (T, E) with expert choice. With num_shared S
            also the weights of the slices of the shared expert, (T, S).
        """
        inputs = self._inputs(x)
        logits: Tensor = torch.ops.moecompile.router_logits(inputs, self.weight, self.bias)
        of_shared: list[Tensor] = []
        scores = FUNCTIONS[self.config.score].score(logits)
        scores_TE = torch.ops.moecompile.flatten_tokens(scores)
        if self.config.choice == "expert":
            ids, weights = self._expert_choice(scores_TE, real_T)
            kept = ids
        else:
            ids = self.choose(scores_TE, tokens_T)
            if self.replayed is not None:
                ids = replayed_or_live(self.replayed, ids, self.num_experts)
            weights, *of_shared = self._weights(scores_TE, ids, inputs)
            ids, weights = without_padding(ids, weights, real_T, self.num_experts)
            if self.on_choice is not None:
                self.on_choice(ids)
            kept, weights = self._limited(ids, weights, real_T)
        if self.training:
            probs = FUNCTIONS[self.config.score].distribute(logits, scores)
            self._count(scores, probs, ids, kept, real_T)
            self.keep(self.losses_of(logits, (scores, probs), ids, real_T), logits)
        return weights, kept, *of_shared

    def logits(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., E), fp32 or wider, with jitter in training."""
        logits: Tensor = torch.ops.moecompile.router_logits(self._inputs(x), self.weight, self.bias)
        return logits

    def _inputs(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        if self.training and self.config.jitter:
            x = x.to(wide)
            x = x * (1.0 + self.config.jitter * (2.0 * self._uniform(x) - 1.0))
        if self.norm_scale is not None:
            x = normed(x.to(wide), self.norm_scale)
        return x

    def scores(self, x: Tensor) -> Tensor:
        """The scores by which experts are chosen, before the correction bias, (T, E), fp32 or wider."""
        scores_TE: Tensor = torch.ops.moecompile.flatten_tokens(FUNCTIONS[self.config.score].score(self.logits(x)))
        return scores_TE

    @torch.no_grad()
    def choose(self, scores_TE: Tensor, tokens_T: Tensor | None = None) -> Tensor:
        """Ids of the chosen experts before drops, (T, K) int64.

        Raises:
            MoecompileError: choice=hash without token ids.
        """
        kernels, config = torch.ops.moecompile, self.config
        if config.choice == "hash":
            if tokens_T is None:
                raise MoecompileError("routing.choice=hash needs token ids: call the model with input_ids")
            hashed_TK: Tensor = kernels.hashed_ids(tokens_T, self.num_experts, config.top_k, self.layer)
            return hashed_TK
        if config.workload == "balanced":
            groups = (config.groups, config.top_groups) if config.has_groups else (1, 1)
            ids_TK: Tensor = kernels.balanced_ids(scores_TE, config.top_k, *groups)
            return ids_TK
        if config.workload == "none":
            choice_TE = scores_TE + self.correction_bias
        else:
            how = (config.workload, config.skew, config.hot_experts)
            choice_TE = kernels.workload_scores(self._uniform(scores_TE), self.key, *how)
        if config.even_groups:
            return best_of_each_group(choice_TE, config)
        if config.top_groups < config.groups:
            # -inf, not 0: a closed group must lose even against negative corrected scores.
            choice_TE = choice_TE.masked_fill(~open_experts(choice_TE, config, self.num_experts), float("-inf"))
        return choice_TE.topk(config.top_k, dim=-1, sorted=False).indices

    def _weights(self, scores_TE: Tensor, ids_TK: Tensor, inputs: Tensor) -> tuple[Tensor, ...]:
        weights_TK = FUNCTIONS[self.config.score].weigh(scores_TE.gather(1, ids_TK))
        num_chosen = weights_TK.shape[1]
        if self.shared_weight is not None:  # they share one sum with the chosen experts
            logits = torch.ops.moecompile.router_logits(inputs, self.shared_weight, None)
            weights_TK = torch.cat((weights_TK, torch.ops.moecompile.flatten_tokens(logits).sigmoid()), 1)
        if self.config.normalize and not SCORES[self.config.score].sums_to_one:
            # The minimum avoids a division by zero if all sigmoid scores underflow (DeepSeek-V3 uses 1e-20).
            weights_TK = weights_TK / weights_TK.sum(1, keepdim=True).clamp_min(1e-20)
        weights_TK = weights_TK * self.config.scale
        shared = () if self.shared_weight is None else (weights_TK[:, num_chosen:],)
        weights_TK = weights_TK[:, :num_chosen] if shared else weights_TK
        return weights_TK if self.expert_scale is None else weights_TK * self.expert_scale[ids_TK], *shared

    def _limited(self, ids_TK: Tensor, weights_TK: Tensor, real_T: Tensor | None) -> tuple[Tensor, Tensor]:
        """Drops assignments beyond the capacity; weights of kept assignments are unchanged."""
        factor, drop = self.config.capacity_factor, self.config.drop
        if factor is None:
            return ids_TK, weights_TK
        return kept_within(ids_TK, weights_TK, self.num_experts, factor, drop, real_T)

    def _expert_choice(self, scores_TE: Tensor, real_T: Tensor | None) -> tuple[Tensor, Tensor]:
        factor = 1.0 if self.config.capacity_factor is None else self.config.capacity_factor
        ids_TE = torch.ops.moecompile.expert_choice(scores_TE.detach(), self.config.top_k, factor, real_T)
        weights_TE = scores_TE.masked_fill(ids_TE == self.num_experts, 0.0) * self.config.scale
        return ids_TE, weights_TE if self.expert_scale is None else weights_TE * self.expert_scale

    def _count(self, scores: Tensor, probs: Tensor, ids: Tensor, kept: Tensor, real: Tensor | None) -> None:
        flat = torch.ops.moecompile.flatten_tokens
        self.meter(ids, kept, flat(probs).detach(), real)
        self.meter.count_required(flat(scores).detach(), self.correction_bias, self.config.top_k, real)

    def _uniform(self, like: Tensor) -> Tensor:
        """Uniform numbers in [0, 1): from the key if one was set, else from the global random state."""
        if self.is_keyed:
            noise: Tensor = torch.ops.moecompile.keyed_uniform(like.detach(), self.key)
            return noise
        return torch.rand_like(like)

    @property
    def is_trained(self) -> bool:
        """Whether its weight gets gradients."""
        return self.weight.requires_grad

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        return in_words(self.config, self.num_experts)


def routers_of(model: nn.Module) -> list[tuple[str, Router]]:
    """All routers with their module paths, in model order."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, Router)]


def set_random_key(model: nn.Module, seed: int, step: int, micro_batch: int) -> None:
    """Sets the random key of every router: random numbers of its next forwards depend only on the key and the layer.

    So they are the same on every mesh, and a forward that is recomputed before the next key draws the same numbers.

    Args:
        step: optimizer step. micro_batch: index of the micro-batch in the step, in the order of one process.
    """
    routers = [router for _, router in routers_of(model)]
    numbers = [i if router.number is None else router.number for i, router in enumerate(routers)]
    keys = torch.tensor([(seed, step, micro_batch, number) for number in numbers])
    if routers and routers[0].key.is_cuda:  # one copy, for which the host does not wait
        keys = keys.pin_memory().to(routers[0].key.device, non_blocking=True)
    for router, key in zip(routers, keys, strict=True):
        router.key.copy_(key)
        router.is_keyed = True


def number_routers(model: nn.Module) -> None:
    """Notes the place of each router in the whole model, before parts of it are taken away."""
    for number, (_, router) in enumerate(routers_of(model)):
        router.number = number
