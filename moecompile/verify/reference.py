"""The reference: one process that runs the micro-batches of all ranks in order, with gradient accumulation.

It is independent of the code that it checks: plain autograd and torch's own clipping, without exchanges, FSDP, the
strategy or recomputation. Steps are those of torch's AdamW, and of a plain loop for Muon. From moecompile it uses the
rewritten model, the settings of the optimizer for each weight, and the balance rule.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from moecompile.nn import auxiliary_loss, routers_of, set_random_key, update_balance
from moecompile.runtime.data import IGNORED
from moecompile.runtime.module import LanguageModule
from moecompile.schema import Config, Precision
from moecompile.verify.job import Batch, Trace, evaluated, recorded_routes, replayed_routes
from moecompile.verify.plain_muon import plain_optimizer


def run_reference(
    model: nn.Module, config: Config, batches: Sequence[Batch], choices: Mapping[str, Sequence[Tensor]] | None = None
) -> Trace:
    """Runs `trainer.max_steps` optimizer steps over `batches`, an equal number of them per step.

    Args:
        model: lowered for one process.
        batches: every micro-batch of the run, in global order.
        choices: router -> expert ids to replay in step 0, per micro-batch; None: routers choose themselves.
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
    optimizer = plain_optimizer(module.model, config.optimizer)
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
