"""The reference: one process that runs the micro-batches of all ranks in order, with gradient accumulation.

It is independent of the code that it checks: plain autograd and torch's own clipping, without exchanges, FSDP, the
strategy or recomputation. Steps are those of torch's AdamW, and of a plain loop for Muon. From moecompile it uses the
rewritten model, the settings of the optimizer for each weight, and the balance rule.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from moecompile.nn import auxiliary_loss, routers_of, set_random_key, update_balance
from moecompile.nn.matrices import Layout, hidden_matrices
from moecompile.runtime.data import IGNORED
from moecompile.runtime.module import LanguageModule
from moecompile.runtime.weight_groups import weight_groups
from moecompile.schema import Config, MuonConfig, MuonScale, OptimizerConfig, OptimizerKind, Precision
from moecompile.verify.job import Batch, Trace, evaluated, recorded_routes, replayed_routes


def run_reference(
    model: nn.Module, config: Config, batches: Sequence[Batch], choices: Mapping[str, Sequence[Tensor]] | None = None,
    by_rows: Mapping[str, str] = MappingProxyType({}),
) -> Trace:  # fmt: skip
    """Runs `trainer.max_steps` optimizer steps over `batches`, an equal number of them per step.

    Args:
        model: lowered for one process.
        batches: every micro-batch of the run, in global order.
        choices: router -> expert ids to replay in step 0, per micro-batch; None: routers choose themselves.
        by_rows: embedding table -> the rule by which its rows are stepped.
    """
    trace, module = Trace(), LanguageModule(model, config.optimizer, config.trainer.max_steps)
    arithmetic = _Arithmetic(module, config.trainer.precision)
    steps = config.trainer.max_steps
    per_step = len(batches) // steps
    trace.inputs = [batch["input_ids"] for batch in batches]
    with arithmetic.autocast():
        trace.outputs = [
            evaluated(arithmetic.module, batch, config.seed, i) for i, batch in enumerate(batches[:per_step])
        ]
    optimizer = plain_optimizer(module.model, config.optimizer, by_rows)
    scheduler = module.schedule(optimizer)
    arithmetic.module.train()
    for step in range(steps):
        optimizer.zero_grad()
        loss_sum, count = 0.0, 0
        for i, batch in enumerate(batches[step * per_step : (step + 1) * per_step]):
            replayed = {name: ids[i] for name, ids in (choices or {}).items()} if step == 0 else {}
            set_random_key(arithmetic.module, config.seed, step, i)
            num_tokens = int((batch["labels"] != IGNORED).sum())
            with (
                arithmetic.autocast(),
                replayed_routes(arithmetic.module.model, replayed, trace),
                recorded_routes(arithmetic.module.model, trace if step == 0 else Trace()),
            ):
                loss, _ = arithmetic.module.summed_loss(batch)
            aux = auxiliary_loss(arithmetic.module)
            (loss if aux is None else loss + num_tokens * aux).backward()
            arithmetic.add_gradients()
            loss_sum, count = loss_sum + float(loss.detach()), count + num_tokens
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad /= count
        if step == 0:
            trace.grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        clip = config.optimizer.clip_norm
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf") if clip is None else clip)
        optimizer.step()
        arithmetic.copy_weights()
        scheduler.step()
        trace.loads += [layer.load for layer in update_balance(arithmetic.module)]
        trace.losses.append(loss_sum / count)
        trace.norms.append(float(norm))
    trace.weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    return trace


class _Arithmetic:
    """A precision, implemented for one process.

    module: the module to run: `main`, or with `bf16_params` a copy of it with weights cast to bf16, except those of
    routers. Its gradients are accumulated in the precision of `main`.
    """

    def __init__(self, main: LanguageModule, precision: Precision) -> None:
        self.precision, self.main, self.module = precision, main, main
        if precision is Precision.bf16_params:
            self.module = copy.deepcopy(main)
            kept = {parameter for _, router in routers_of(self.module) for parameter in router.parameters()}
            for parameter in self.module.parameters():
                if parameter not in kept:
                    parameter.data = parameter.data.bfloat16()

    def autocast(self) -> torch.autocast:
        """The context in which a forward runs."""
        return torch.autocast("cpu", torch.bfloat16, enabled=self.precision is Precision.bf16_mixed)

    def add_gradients(self) -> None:
        """Moves the gradients of a backward to the main weights."""
        for main, cast in self._pairs():
            if cast.grad is not None:
                grad = cast.grad.to(main.dtype)
                main.grad = grad if main.grad is None else main.grad + grad
                cast.grad = None

    @torch.no_grad()
    def copy_weights(self) -> None:
        """Copies the main weights to the module after an optimizer step."""
        for main, cast in self._pairs():
            cast.copy_(main)

    def _pairs(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        if self.module is self.main:
            return []
        return list(zip(self.main.parameters(), self.module.parameters(), strict=True))


_STACKED = 3  # dims


def plain_optimizer(model: nn.Module, config: OptimizerConfig, by_rows: Mapping[str, str]) -> Optimizer:
    """torch's AdamW with one group per weight, and loops for the matrices of Muon and the tables `by_rows`."""
    settings: list[dict[str, Any]] = []
    rules = {model.get_parameter(name): rule for name, rule in by_rows.items()}
    for group in weight_groups(model, config):
        settings += [
            {"params": [weight], "lr": group.lr, "weight_decay": group.weight_decay,
             "rule": rules.get(weight, group.kind)}
            for weight in group.weights
        ]  # fmt: skip
    betas = (config.betas[0], config.betas[1])
    if config.kind is OptimizerKind.adamw and not rules:
        return AdamW(settings, betas=betas, eps=config.eps)
    by_name = hidden_matrices(model)
    layouts = {weight: by_name[name] for name, weight in model.named_parameters() if name in by_name}
    others = [dict(group) for group in settings if group["rule"] == "adamw"]
    return _Plain(settings, layouts, config, AdamW(others, betas=betas, eps=config.eps))


class _Plain(Optimizer):
    def __init__(
        self, groups: list[dict[str, Any]], layouts: Mapping[nn.Parameter, Layout], config: OptimizerConfig,
        others: Optimizer,
    ) -> None:  # fmt: skip
        super().__init__(groups, {})
        self.layouts, self.muon, self.others = layouts, config.muon, others
        self.momentum: dict[nn.Parameter, Tensor] = {}
        self.betas, self.eps, self.steps = config.betas, config.eps, 0
        self.of_rows: dict[tuple[nn.Parameter, int], list[Tensor]] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; learning rates are those of the groups, which a schedule changes."""
        rest, self.steps = iter(self.others.param_groups), self.steps + 1
        for group in self.param_groups:
            (weight,) = group["params"]
            if group["rule"] == "adamw":
                next(rest)["lr"] = group["lr"]
            elif weight.grad is None:
                continue
            elif group["rule"] == "muon":
                self._matrices(weight, group)
            else:
                for row in weight.grad.any(1).nonzero().flatten().tolist():
                    self._row(weight, row, weight.grad[row], group)
        self.others.step()

    def _row(self, weight: nn.Parameter, row: int, grad: Tensor, group: dict[str, Any]) -> None:
        first, second = self.betas
        if group["rule"] == "rowwise_adagrad":
            (total,) = self.of_rows.setdefault((weight, row), [torch.zeros((), dtype=grad.dtype)])
            total += grad.square().sum() / grad.numel()
            update = grad / (total.sqrt() + self.eps)
        else:
            mean, square = self.of_rows.setdefault((weight, row), [torch.zeros_like(grad), torch.zeros_like(grad)])
            mean.copy_(first * mean + (1 - first) * grad)
            square.copy_(second * square + (1 - second) * grad * grad)
            root = (square / (1 - second**self.steps)).sqrt() + self.eps
            update = mean / (1 - first**self.steps) / root
        weight[row] -= group["lr"] * (group["weight_decay"] * weight[row] + update)

    def _matrices(self, weight: nn.Parameter, group: dict[str, Any]) -> None:
        muon = self.muon
        assert weight.grad is not None
        old = self.momentum.get(weight, torch.zeros_like(weight))
        self.momentum[weight] = moved = muon.momentum * old + (1 - muon.momentum) * weight.grad
        update = muon.momentum * moved + (1 - muon.momentum) * weight.grad if muon.nesterov else moved
        weight.mul_(1 - group["lr"] * group["weight_decay"])
        layout = self.layouts[weight]
        for target, matrix in zip(_each(weight, layout), _each(update, layout), strict=True):
            rows, columns = matrix.shape
            scale = 0.2 * max(rows, columns) ** 0.5 if muon.scale is MuonScale.match_rms_adamw else 1.0
            if muon.scale is MuonScale.original and rows > columns:
                scale = (rows / columns) ** 0.5
            target -= group["lr"] * scale * _iterated(matrix, muon)


def _each(weight: Tensor, layout: Layout) -> Iterator[Tensor]:
    """The matrices of a weight one after another, (d_out, d_in)."""
    experts = weight.chunk(layout.joined) if layout.joined else weight if weight.ndim == _STACKED else [weight]
    for expert in experts:
        matrix = expert.T if layout.transposed else expert
        for part in range(layout.parts):
            width = matrix.shape[0] // layout.parts
            yield matrix[part :: layout.parts] if layout.interleaved else matrix[part * width : (part + 1) * width]


def _iterated(matrix: Tensor, muon: MuonConfig) -> Tensor:
    """Newton-Schulz with the Gram matrix of the columns, whatever the shape."""
    a, b, c = muon.coefficients
    x: Tensor = matrix / max(float(matrix.square().sum()) ** 0.5, 1e-7)
    for _ in range(muon.steps):
        gram = x.T @ x
        x = a * x + x @ (b * gram + c * gram @ gram)
    return x
