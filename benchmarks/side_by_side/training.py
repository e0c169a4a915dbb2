"""Training steps of whole models: is it the same model, and how long does a step take?"""

from __future__ import annotations

import json
import os
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from layer import print_profile
from torch import Tensor, nn

from moecompile.runtime.gradients import sum_replicated
from side_by_side import models
from side_by_side.common import Place
from side_by_side.launch import NAMESPACE
from side_by_side.registry import LIMIT
from side_by_side.wire import Counter

WARM_UP = 2
LEARNING_RATE = 1e-3
TOLERANCE = 1e-3  # of the largest logit, float32
STEP_TOLERANCE = 2e-2  # of what a step changes in the weights, float32
SLOW = {"transformers eager": 2}  # rounds of what takes too long


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    """AdamW, one fused kernel for each kind of tensor."""
    return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor, divisor: int = 1) -> tuple[float, ...]:
    """(CPU, wall, CPU of the optimizer) seconds of forward, backward and update."""
    wall, cpu = time.perf_counter(), time.process_time()
    loss = model(input_ids=ids, labels=ids).loss / divisor
    loss.backward()
    if getattr(model, "keeps_some_whole", False):
        sum_replicated(model.parameters(), dist.group.WORLD)
    before_update = time.process_time()
    optimizer.step()
    optimizer.zero_grad()
    end = time.process_time()
    return end - cpu, time.perf_counter() - wall, end - before_update


# -- the same model? -------------------------------------------------------------------------------------------------


class Reference:
    """transformers' plain model in float32, in one process on the sequences of all ranks: logits, and one step."""

    def __init__(self, family: str, place: Place, hidden: int) -> None:
        ids = models.draw(place.ranks, seed=7)[:, :64]
        self.ids = ids[place.rank : place.rank + 1]
        model = models.plain(family, "eager", torch.float32, hidden=hidden).eval()
        self.logits = _logits(model, ids)[place.rank : place.rank + 1]
        self.before = _weights(model)
        train_step(model, optimizer_of(model), ids)
        self.after = _weights(model)

    def errors(self, model: nn.Module, divisor: int) -> dict[str, float]:
        """logits: largest error, relative to the largest logit. step: error of what a step changes in all weights, as
        a norm relative to the norm of the change.

        The step is AdamW's, which does not see a common factor of all gradients: whether they are summed or averaged
        over ranks does not matter.
        """
        model.eval()
        optimizer = optimizer_of(model)  # before a forward without gradients, which leaves FSDP2's root gathered
        logits = _logits(model, self.ids)
        train_step(model, optimizer, self.ids, divisor)
        wrong = changed = 0.0
        for name, weight in _weights(model).items():
            wrong += float((weight - self.after[name]).square().sum())
            changed += float((self.after[name] - self.before[name]).square().sum())
        return {
            "logits": float((logits - self.logits).abs().max() / self.logits.abs().max()),
            "step": (wrong / changed) ** 0.5,
        }


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=ids).logits
    return models.full(found)


def _weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: models.full(parameter).clone() for name, parameter in model.named_parameters()}


def require(name: str, errors: dict[str, float]) -> None:
    """Ends the program if a model is not the same."""
    if not (errors["logits"] <= TOLERANCE and errors["step"] <= STEP_TOLERANCE):  # also if one is not a number
        raise SystemExit(f"{name} is not the model that transformers runs: {errors}")


# -- time ------------------------------------------------------------------------------------------------------------


def measure(
    family: str, names: list[str], rounds: int, sequences: int, place: Place, counter: Counter | None = None,
    hidden: int = 512, profiled: bool = False,
) -> list[dict[str, Any]]:  # fmt: skip
    """One row a model. All take turns on the same new sequences; each rank has its own. All but the limit are compared.

    Raises:
        SystemExit: one of them is not the model that transformers runs.
    """
    builders = {name: models.builders(place.ranks, hidden=hidden)[name] for name in names}
    reference = Reference(family, place, hidden)
    errors = {}
    for name, build in builders.items():
        if name == LIMIT:
            continue
        errors[name] = reference.errors(build(family, torch.float32), place.ranks)
        require(name, errors[name])
    training = {name: build(family, torch.bfloat16).train() for name, build in builders.items()}
    optimizers = {name: optimizer_of(model) for name, model in training.items()}
    taken: dict[str, list[tuple[float, ...]]] = {name: [] for name in names}
    for i in range(WARM_UP + rounds):
        ids = models.draw(sequences, seed=1000 * i + place.rank)
        turn = i % len(names)
        for name in names[turn:] + names[:turn]:
            most = SLOW.get(name, rounds)
            if most < rounds and not WARM_UP - 1 <= i < WARM_UP + most:
                continue
            found = _step(training[name], optimizers[name], ids, place.ranks, counter)
            if i >= WARM_UP:
                taken[name].append(found)
    if profiled:
        ids = models.draw(sequences, seed=1)
        for name in names:
            print_profile(name, [partial(train_step, training[name], optimizers[name], ids) for _ in range(2)])
    return _rows(family, taken, errors, sequences * models.SEQUENCE, place)


def _step(
    model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor, ranks: int, counter: Counter | None
) -> tuple[float, ...]:
    """(CPU, wall, CPU of the optimizer, bytes a rank sent)."""
    if counter is None:
        return *train_step(model, optimizer, ids), 0.0
    found, sent = counter.sent_by(lambda: train_step(model, optimizer, ids, ranks))
    return *found, sent / ranks


def _rows(
    family: str,
    taken: dict[str, list[tuple[float, ...]]],
    errors: dict[str, dict[str, float]],
    tokens: int,
    place: Place,
) -> list[dict[str, Any]]:
    """Means of CPU time over the ranks, the slowest rank's wall time; medians over the rounds."""
    everywhere: list[Any] = [(taken, errors)]
    if place.ranks > 1:
        everywhere = [None] * place.ranks
        dist.all_gather_object(everywhere, (taken, errors))
    rows = []
    for name in taken:
        rounds = list(zip(*(theirs[name] for theirs, _ in everywhere), strict=True))
        cpu = statistics.median(statistics.mean(rank[0] for rank in ranks) for ranks in rounds)
        wall = statistics.median(max(rank[1] for rank in ranks) for ranks in rounds)
        update = statistics.median(statistics.mean(rank[2] for rank in ranks) for ranks in rounds)
        row = {"family": family, "model": name, "rounds": len(rounds), "cpu_ms": 1e3 * cpu, "wall_ms": 1e3 * wall}
        row |= {"optimizer_ms": 1e3 * update, "tokens_per_cpu_second": tokens / cpu, "tokens_per_second": tokens / wall}
        if place.ranks > 1:
            row["sent_mib"] = statistics.median(statistics.mean(rank[3] for rank in ranks) for ranks in rounds) / 2**20
        kinds = errors.get(name, ())
        row["errors"] = {key: max(theirs[name][key] for _, theirs in everywhere) for key in kinds}
        rows.append(row)
    return rows


def run_rank(job: dict[str, Any], folder: Path) -> None:
    """One of several ranks; rank 0 writes `found.json`. Does not return."""
    dist.init_process_group("gloo")
    place, counter = Place(dist.get_rank(), dist.get_world_size()), Counter()
    rows = []
    for family in job["families"]:
        rows += measure(family, job["names"], job["rounds"], job["sequences"], place, counter, job["hidden"])
    if place.rank == 0:
        found = {"namespace": os.environ.get(NAMESPACE), "rows": rows}
        (folder / "found.json").write_text(json.dumps(found))
    dist.barrier()
    os._exit(0)  # a gloo thread may abort the interpreter's own shutdown
