"""Does a device compute what the CPU computes in float64? Logits and every gradient of the shipped recipes' models.

Algorithm:
  1. Build the recipe's model, lowered for one process, with independently random experts and routers, and one batch of
     random tokens.
  2. One forward and backward on the CPU in float64 is the reference. It also records the experts of every token.
  3. The same on the device, with weights in fp32 and with the reference's experts replayed, since a near tie may be
     decided otherwise; in bf16 under autocast.
  4. An error is the norm of the difference over the norm of the reference: of the logits, of all gradients together,
     and of the worst gradient (over a thousandth of the largest one, if it is nearly zero). The CPU is measured in the
     same precision: devices round differently, but hardly more. So a device passes with at most `TIMES` the error of
     the CPU, or `LEAST`, and never with more than `MOST`.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from moecompile.compose import compose_config, conf_dir
from moecompile.nn import Experts, Router, auxiliary_loss, set_random_key
from moecompile.plan import on_one_process
from moecompile.runtime.data import IGNORED
from moecompile.runtime.module import LanguageModule
from moecompile.schema import Config
from moecompile.tasks.verify import shrink
from moecompile.verify.job import Batch, Trace, build, noiseless_plan, recorded_routes, replayed_routes

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
TIMES, MOST = 3.0, 0.2
LEAST = {"fp32": 1e-5, "bf16": 2e-3}
_CPU = torch.device("cpu")
_DAMPED = 0.25  # of experts and routers, so that rounding does not grow from layer to layer
_SMALL = 1e-3  # of the largest gradient


def recipes() -> list[str]:
    """Those that need no pretrained weights."""
    return sorted(path.stem for path in (conf_dir() / "recipe").glob("*.yaml") if not _needs_weights(path))


def _needs_weights(recipe: Path) -> bool:
    chosen = yaml.safe_load(recipe.read_text(encoding="utf-8"))["defaults"]
    (model,) = (value for entry in chosen for key, value in entry.items() if key == "override /model")
    return "package" in yaml.safe_load((conf_dir() / "model" / f"{model}.yaml").read_text(encoding="utf-8"))


def check_recipe(recipe: str, device: torch.device, precision: str) -> dict[str, Any]:
    """The errors of one recipe, and whether they are small enough (`ok`)."""
    config, _ = shrink(compose_config([f"recipe={recipe}"]), 1)
    batch = _batch(config)
    record = Trace()
    wanted = _step(config, batch, _CPU, torch.float64, {}, record)  # Step 2
    routes = {name: ids for name, (ids,) in record.choices.items()}
    found = {}
    for place in {_CPU, device}:  # Step 3
        trace = Trace()
        got = _step(config, batch, place, PRECISIONS[precision], routes, trace)
        found[place] = _errors(got, wanted) | {"flips": trace.flips}
    mine, own = found[device], found[_CPU]
    limits = {name: min(MOST, max(TIMES * own[name], LEAST[precision])) for name in ("output", "gradients", "worst")}
    ok = all(mine[name] <= limits[name] for name in limits)  # not if one is not a number
    return {"ok": ok, **mine, "cpu": own, "limits": limits}


def _batch(config: Config) -> Batch:
    generator = torch.Generator().manual_seed(config.seed)
    shape, vocabulary = (config.data.micro_batch_size, config.data.seq_len), config.data.vocab_size or 256
    ids, labels = (torch.randint(vocabulary, shape, generator=generator) for _ in range(2))
    labels[:, -3:] = IGNORED
    return {"input_ids": ids, "labels": labels}


def _step(
    config: Config, batch: Batch, device: torch.device, dtype: torch.dtype, routes: Mapping[str, Tensor], trace: Trace
) -> dict[str, Tensor]:
    """Logits and gradients in float64 on the CPU; bf16: under autocast."""
    stored = torch.float32 if dtype is torch.bfloat16 else dtype
    model = build(copy.deepcopy(config), on_one_process(noiseless_plan(config)), stored)
    with torch.no_grad():
        for part in model.modules():
            if isinstance(part, Experts | Router):
                for parameter in part.parameters(recurse=False):
                    parameter.mul_(_DAMPED)
    module = LanguageModule(model, config.optimizer, 1).to(device).train()
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    set_random_key(module, config.seed, 0, 0)
    with (
        torch.autocast(device.type, torch.bfloat16, enabled=dtype is torch.bfloat16),
        replayed_routes(model, {name: ids.to(device) for name, ids in routes.items()}, trace),
        recorded_routes(model, trace),
    ):
        logits = module.logits(batch)
    wide = torch.promote_types(logits.dtype, torch.float32)
    loss = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1).to(wide), batch["labels"].flatten(), ignore_index=IGNORED
    )
    aux = auxiliary_loss(module)
    (loss if aux is None else loss + aux).backward()
    found = {"output": logits.detach()} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: tensor.double().cpu() for name, tensor in found.items()}


def _errors(got: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Any]:
    """The three errors, and the name of the worst gradient. A missing gradient is an error.

    Raises:
        AssertionError: one side has a gradient that the other has not.
    """
    if missing := set(wanted) ^ set(got):
        raise AssertionError(f"only one side has gradients of {sorted(missing)}")
    norms = {name: float(tensor.norm()) for name, tensor in wanted.items()}
    off = {name: float((got[name] - tensor).norm()) for name, tensor in wanted.items()}
    output = off.pop("output") / norms.pop("output")
    floor = _SMALL * max(norms.values())
    errors = {name: off[name] / max(norms[name], floor) for name in off}
    worst = max(errors, key=lambda name: float("inf") if math.isnan(errors[name]) else errors[name])
    together = math.hypot(*off.values()) / math.hypot(*norms.values())
    return {"output": output, "gradients": together, "worst": errors[worst], "worst_name": worst}
