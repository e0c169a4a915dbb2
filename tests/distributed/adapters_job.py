"""Two optimizer steps with low-rank adapters: transformers and peft in one process, ours on N ranks.

The reference side uses nothing of moecompile: peft's own `LoraConfig`, its wrappers of linears and of stacked weights,
plain autograd, torch's own clipping, one AdamW. Values of adapters are drawn for peft's names and shapes; our side gets
the same values by rules that are written out here, expert by expert and rank by rank.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moecompile.nn.adapters import side_of
from moecompile.passes.shard import device_mesh_of, shard
from moecompile.pipeline import compile_model, plan_of
from moecompile.runtime.gradients import clip_by_global_norm, divide, sum_replicated
from tests.distributed.existing_job import CLIP, SEQ, STEPS, Trace, _forward, micro_batches
from tests.distributed.gradient_job import full
from tests.existing_models import moe_inputs, moe_model

RANK, ALPHA = 3, 5
OVERRIDES = ["adapters=lora", f"adapters.rank={RANK}", f"adapters.alpha={ALPHA}", "adapters.train_router=true"]
# In a list of modules, peft takes these names for experts; as parameters it adapts the linears.
AS_PARAMETERS = ("gate_proj", "up_proj", "down_proj")


def peft_model(architecture: str, dtype: torch.dtype) -> Any:
    """The tiny model with peft's adapters on all linears and stacked weights, all with random values."""
    from peft import LoraConfig, get_peft_model

    base = moe_model(architecture, dtype=dtype)
    linears = [n for n, m in base.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"]
    stacks = [n for n, p in base.named_parameters() if p.ndim == 3]
    taken = [f"{n}.weight" for n in linears if n.endswith(AS_PARAMETERS)]
    config = LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=[n for n in linears if not n.endswith(AS_PARAMETERS)],
        target_parameters=stacks + taken,
        modules_to_save=[n for n, _ in base.named_modules() if n.endswith((".mlp.gate", ".mlp.router"))],
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = get_peft_model(base, config)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.2)
    return model


def ours(model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by our names and shapes, from those of peft's model by peft's names."""
    return {name: value for key, tensor in tensors.items() for name, value in _ours(model, key, tensor)}


def _ours(model: Any, key: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    name = key.removeprefix("base_model.model.")
    if ".modules_to_save.default." in name:
        yield name.replace(".modules_to_save.default", ""), tensor
        return
    side = side_of(name)
    if side is None:
        return
    wrapper = model.get_submodule(key.partition(".lora_")[0])
    weight = getattr(wrapper, "parameter_name", "weight")
    if weight == "weight":
        yield name.replace(".base_layer", ""), tensor
        return
    num_experts = tensor.shape[0 if side == "A" else 1] // RANK
    stacked = []
    for e in range(num_experts):
        lines = [e * RANK + k if side == "A" else k * num_experts + e for k in range(RANK)]
        stacked.append(tensor[lines] if side == "A" else tensor[:, lines])
    owner = name.partition(".lora_")[0].replace(".base_layer", "")
    yield f"{owner}.lora_{side}.{weight}", torch.stack(stacked)


def reference(architecture: str, dtype: torch.dtype) -> Trace:
    """One process runs all micro-batches in order, as accumulation."""
    model, trace = peft_model(architecture, dtype).train(), Trace()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, eps=1e-5)
    for step in range(STEPS):
        optimizer.zero_grad()
        total, count = 0.0, 0
        for ids, labels in micro_batches(step):
            logits, loss = _forward(model, architecture, ids, labels)
            loss.backward()
            total, count = total + loss.item(), count + int((labels != -100).sum())
            trace.logits = logits.detach().clone() if trace.logits is None else trace.logits
        for parameter in trained:
            assert parameter.grad is not None
            parameter.grad /= count
        if step == 0:
            grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
            trace.grads = ours(model, grads)
        trace.norms.append(float(torch.nn.utils.clip_grad_norm_(trained, CLIP)))
        optimizer.step()
        trace.losses.append(total)
    trace.weights = ours(model, {name: p.detach().clone() for name, p in model.named_parameters()})
    return trace


def sharded(
    rank: int, world_size: int, architecture: str, dtype: torch.dtype, overrides: list[str], *, mutate: str = ""
) -> Trace:
    """This rank's part of the same steps. `mutate` breaks one thing on purpose."""
    model, trace = moe_model(architecture, dtype=dtype), Trace()
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    example = moe_inputs(architecture, torch.ones(1, SEQ, dtype=torch.int64))
    compile_model(model, [*overrides, *OVERRIDES], example=example)
    _fill(model, architecture, dtype, mutate)
    plan = plan_of(model)
    shard(model.train(), plan, device_mesh_of(plan.mesh, "cpu"))
    if mutate == "frozen_experts":
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad and ".experts.lora_" not in name)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, eps=1e-5)
    mine = 4 // world_size
    for step in range(STEPS):
        optimizer.zero_grad()
        sums = torch.zeros(2, dtype=torch.float64)
        for ids, labels in micro_batches(step)[rank * mine : (rank + 1) * mine]:
            logits, loss = _forward(model, architecture, ids, labels)
            loss.backward()
            sums += torch.tensor([loss.item(), int((labels != -100).sum())], dtype=torch.float64)
            trace.logits = logits.detach().clone() if trace.logits is None else trace.logits
        dist.all_reduce(sums)
        sum_replicated(parameters, dist.group.WORLD)
        divide(parameters, float(sums[1]))
        if step == 0:
            trace.grads = {name: full(p.grad) for name, p in model.named_parameters() if p.grad is not None}
        trace.norms.append(float(clip_by_global_norm(parameters, CLIP, dist.group.WORLD)))
        optimizer.step()
        trace.losses.append(float(sums[0]))
    after = {name: full(tensor) for name, tensor in model.named_parameters()}
    trained = dict(_trained(model))
    trace.weights = {name: value for name, value in after.items() if name in trained}
    for name, value in after.items():  # what is frozen has not moved by a bit
        if name not in trace.weights:
            assert torch.equal(value, before[name.replace(".base_layer.", ".")]), name
    return trace if rank == 0 else Trace(losses=trace.losses, norms=trace.norms)


def _trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or side_of(name):
            yield name, parameter


@torch.no_grad()
def _fill(model: nn.Module, architecture: str, dtype: torch.dtype, mutate: str) -> None:
    source = peft_model(architecture, dtype)
    values = ours(source, {name: p.detach() for name, p in source.named_parameters()})
    for name, value in values.items():
        if mutate == "swapped_columns" and name.endswith("lora_B.gate_up_proj"):
            num_experts, d_out, rank = value.shape  # as if the columns of B were ordered as the rows of A are
            value = value.permute(1, 2, 0).reshape(d_out, num_experts, rank).permute(1, 0, 2)
        model.get_parameter(name).copy_(value)
