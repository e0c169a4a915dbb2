"""One training step as `task=train` makes it, with everything that was sent written down."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moecompile.compose import compose_config
from moecompile.nn.placement import by_id, expert_orders
from moecompile.runtime.data import load_data, train_loader
from moecompile.runtime.module import LanguageModule
from moecompile.runtime.observer import StepObserver
from moecompile.runtime.profile import TrafficMeter
from moecompile.runtime.training import make_trainer
from moecompile.verify.job import build, noiseless_plan
from moecompile.verify.ranks import full
from tests.tiny import SHORT, collective

SMALL = [
    "recipe=deepseek_ep", "model.config.num_hidden_layers=2", "model.config.hidden_size=32",
    "model.config.intermediate_size=80", "data.vocab_size=300", "data.seq_len=16", "data.micro_batch_size=4",
    "data.global_batch_size=16", "trainer.max_steps=1", "trainer.progress_bar=false", "trainer.checkpointing=none",
    SHORT,
]  # fmt: skip
SENDS = ("reduce_scatter_single", "all_gather_single", "all_reduce", "all_to_all_single")


@dataclass
class Step:
    """What one step did. sent: (collective, dtype of what is sent) -> calls on this rank."""

    grads: dict[str, Tensor] = field(default_factory=dict)
    loads: list[list[int]] = field(default_factory=list)
    sent: Counter[tuple[str, str]] = field(default_factory=Counter)
    dtypes: dict[str, str] = field(default_factory=dict)
    forward_bytes: tuple[float, float] = (0.0, 0.0)

    def calls(self, name: str) -> int:
        return sum(number for (collective, _), number in self.sent.items() if collective == name)


def one_step(overrides: list[str], folder: Path, dtype: torch.dtype = torch.float64) -> Step:
    """Every rank calls it; experts and routers are independently random."""
    config, step = compose_config([*SMALL, *overrides]), Step()
    plan, rank = noiseless_plan(config), dist.get_rank()
    data = load_data(config.data, folder, rank=rank, barrier=dist.barrier)
    model = build(config, plan, dtype)
    loader = train_loader(
        data.train, config.data, seed=config.seed, rank=rank, world_size=plan.mesh.world_size,
        num_steps=config.trainer.max_steps,
    )  # fmt: skip

    class Keep(StepObserver):
        def started(self, module: LanguageModule) -> None:
            step.sent.clear()

        def gradients_ready(self, module: LanguageModule, number: int) -> None:
            named = [(name, p) for name, p in module.model.named_parameters() if p.grad is not None]
            sent = Counter(step.sent)
            orders = expert_orders(module.model)
            step.grads = {name: by_id(full(p.grad), orders.get(name)) for name, p in named}
            step.sent = sent  # gathering them is not part of the step
            step.dtypes = {name: str(p.dtype) for name, p in named}

        def step_ended(self, module: LanguageModule, strategy: Any) -> None:
            step.loads = [load.load.tolist() for load in strategy.loads]

    meter = TrafficMeter(plan.mesh)
    with counted(step.sent) as found:
        trainer = make_trainer(config, plan, folder, [Keep(), meter])
        trainer.fit(LanguageModule(model, config.optimizer, config.trainer.max_steps), loader)
    assert found
    step.forward_bytes = (meter.per_token_and_layer.intra_node, meter.per_token_and_layer.inter_node)
    return step


@contextmanager
def counted(sent: Counter[tuple[str, str]]) -> Iterator[Counter[tuple[str, str]]]:
    """Counts the collectives that torch.distributed is asked for."""

    def counting(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            tensors = [*args, *kwargs.values()]
            last = [t for t in tensors if isinstance(t, Tensor)][-1]
            sent[name, str(last.dtype).removeprefix("torch.")] += 1
            return call(*args, **kwargs)

        return wrapped

    with pytest.MonkeyPatch.context() as patch:
        for name in SENDS:
            patch.setattr(dist, collective(name), counting(name, getattr(dist, collective(name))))
        yield sent
