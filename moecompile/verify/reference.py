"""The reference: one process that runs the micro-batches of all ranks in order, as accumulation.

Independent of what it judges: plain autograd, torch's own clipping and no exchange, no FSDP, no strategy. Of moecompile
it uses the rewritten model, the optimizer's settings and the balance rule.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from moecompile.nn import auxiliary_loss, set_random_key, update_balance
from moecompile.runtime.data import IGNORED
from moecompile.runtime.module import LanguageModule
from moecompile.schema import Config
from moecompile.verify.job import Batch, Trace, evaluated, recorded_routes


def run_reference(model: nn.Module, config: Config, batches: Sequence[Batch]) -> Trace:
    """Runs `trainer.max_steps` optimizer steps over `batches`, an equal number of them per step.

    Args:
        model: lowered for one process.
        batches: every micro-batch of the run, in global order.
    """
    trace, module = Trace(), LanguageModule(model, config.optimizer, config.trainer.max_steps)
    steps = config.trainer.max_steps
    per_step = len(batches) // steps
    trace.inputs = [batch["input_ids"] for batch in batches]
    trace.outputs = [evaluated(module, batch) for batch in batches[:per_step]]
    configured = module.configure_optimizers()
    optimizer, scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    module.train()
    for step in range(steps):
        optimizer.zero_grad()
        loss_sum, count = 0.0, 0
        for i, batch in enumerate(batches[step * per_step : (step + 1) * per_step]):
            set_random_key(model, config.seed, step, i)
            num_tokens = int((batch["labels"] != IGNORED).sum())
            with recorded_routes(model, trace if step == 0 else Trace()):
                loss, _ = module.summed_loss(batch)
            aux = auxiliary_loss(model)
            (loss if aux is None else loss + num_tokens * aux).backward()
            loss_sum, count = loss_sum + float(loss.detach()), count + num_tokens
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad /= count
        if step == 0:
            trace.grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        clip = config.optimizer.clip_norm
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), float("inf") if clip is None else clip)
        optimizer.step()
        scheduler.step()
        trace.loads += [layer.load for layer in update_balance(model)]
        trace.losses.append(loss_sum / count)
        trace.norms.append(float(norm))
    trace.weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    return trace
