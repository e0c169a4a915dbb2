"""Manual optimization on N ranks and the same steps on one process with plain autograd, for comparison.

A `Recipe` says once what a training step does, in terms of a `Side`: the LightningModule on ranks, or one process. The
one process goes through all ranks' batches, adds auxiliary losses and divides by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import moecompile
from tests.distributed.classifier import Classifier, spread
from tests.distributed.gradient_job import full

BATCH, STEPS = 4, 4
AUX = ["balance.losses.micro_batch=0.5", "balance.losses.z=0.1"]
OVERRIDES = [
    "experts.num_routed=4", "routing.top_k=2", "dispatch.kind=flat", "balance.rule=bias", "balance.rate=0.02", *AUX,
]  # fmt: skip
CPU = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
       "enable_model_summary": False, "use_distributed_sampler": False}  # fmt: skip


Loss = Callable[["Pair", Tensor, Tensor], Tensor]


class Model(Classifier):
    """With a part that nothing uses."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Linear(3, 3)


class Pair(LightningModule):
    """A compiled model and a plain one beside it (a discriminator, say)."""

    def __init__(self, mesh: Sequence[str], recipe: Recipe) -> None:
        super().__init__()
        torch.manual_seed(0)
        overrides = [*OVERRIDES, *mesh] if mesh else [o for o in OVERRIDES if not o.startswith("dispatch")]
        model = moecompile.compile_model(Model().double(), overrides, example=torch.zeros(1, 6).double())
        self.model = spread(model)
        self.other = nn.Linear(3, 2).double()
        self.also_unused = nn.Linear(2, 2).double()
        self.automatic_optimization = False
        self.recipe = recipe
        self.grads: list[dict[str, Tensor | None]] = []

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.recipe.step(OnRank(self, batch), batch_idx)

    def configure_optimizers(self) -> Any:
        return self.recipe.optimizers(self)

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(*data(self.trainer.global_rank)), batch_size=BATCH)

    def keep_grads(self) -> None:
        self.grads.append({name: None if p.grad is None else full(p.grad) for name, p in self.named_parameters()})


def data(rank: int) -> tuple[Tensor, Tensor]:
    """Token counts differ between ranks and batches; rank 1's second batch has none."""
    generator = torch.Generator().manual_seed(100 + rank)
    size = BATCH * STEPS
    y = torch.randint(0, 3, (size,), generator=generator)
    y[torch.rand(size, generator=generator) < 0.3] = -100
    if rank == 1:
        y[BATCH : 2 * BATCH] = -100
    return torch.randn(size, 6, generator=generator).double(), y


@dataclass
class OnRank:
    """A step of one rank."""

    module: Pair
    batch: Any
    between: Callable[[], Any] = lambda: None  # called between forward and backward

    def backward(self, loss: Loss, *, mean: bool) -> None:
        x, y = self.batch
        if not mean:
            self.module.trainer.strategy.count_tokens((y != -100).sum())
        value = loss(self.module, x, y)
        self.between()
        self.module.manual_backward(value)

    def backward_each(self, losses: Sequence[Loss], *, mean: bool) -> None:
        x, y = self.batch
        if not mean:
            self.module.trainer.strategy.count_tokens((y != -100).sum())
        for loss in losses:
            self.module.manual_backward(loss(self.module, x, y))

    def optimizers(self) -> list[Any]:
        found = self.module.optimizers()
        return found if isinstance(found, list) else [found]

    def step(self, i: int) -> None:
        self.optimizers()[i].step()

    def step_by(self, i: int, closure: Callable[[], None], *, is_raw: bool) -> None:
        self.module.optimizers(use_pl_optimizer=not is_raw)[i].step(lambda: closure() or torch.zeros(()))

    def toggled(self, i: int, *, sync_grad: bool) -> Any:
        return self.optimizers()[i].toggle_model(sync_grad=sync_grad)

    def toggle(self, i: int) -> None:
        self.module.toggle_optimizer(self.optimizers()[i])

    def untoggle(self, i: int) -> None:
        self.module.untoggle_optimizer(self.optimizers()[i])

    def clip(self, i: int, norm: float) -> None:
        self.module.clip_gradients(self.optimizers()[i], gradient_clip_val=norm, gradient_clip_algorithm="norm")


@dataclass
class OnOne:
    """A step of one process: every backward goes through all ranks' batches.

    means: of each weight, the tokens that its gradient is the mean over, and the numbers of their counts.
    """

    module: Pair
    batches: list[Any]
    made: list[torch.optim.Optimizer]
    means: dict[nn.Parameter, tuple[float, int]]
    state: dict[str, int]
    frozen: dict[nn.Parameter, bool] = field(default_factory=dict)
    between: Callable[[], Any] = lambda: None

    def backward(self, loss: Loss, *, mean: bool) -> None:
        self.backward_each([loss], mean=mean)

    def backward_each(self, losses: Sequence[Loss], *, mean: bool) -> None:
        self.state["count"] = self.state.get("count", 0) + 1
        for loss in losses:
            self._backward(loss, mean=mean)

    def _backward(self, loss: Loss, *, mean: bool) -> None:
        total: Any = 0
        for x, y in self.batches:
            value = loss(self.module, x, y)
            aux = moecompile.auxiliary_loss(self.module)
            if aux is not None and getattr(loss, "through_model", True):
                value = value + (1 if mean else int((y != -100).sum())) * aux
            total = total + (value / len(self.batches) if mean else value)
        self.between()
        params = list(self.module.parameters())
        old = [p.grad for p in params]
        for p in params:
            p.grad = None
        total.backward()
        tokens = float(sum(int((y != -100).sum()) for _, y in self.batches))
        for p, before in zip(params, old, strict=True):
            if p.grad is None:
                p.grad = before
            elif mean:
                p.grad = p.grad if before is None else before + p.grad
            else:
                had, number = self.means.get(p, (0.0, 0)) if before is not None and before.any() else (0.0, 0)
                total = had + (0 if number == self.state["count"] else tokens)
                p.grad = ((0 if before is None else before * had) + p.grad) / max(1.0, total)
                self.means[p] = total, self.state["count"]

    def optimizers(self) -> list[Any]:
        return self.made

    def step(self, i: int) -> None:
        self.made[i].step()
        mine = {p for group in self.made[i].param_groups for p in group["params"]}
        if mine & set(self.module.model.parameters()):
            moecompile.update_balance(self.module)

    def step_by(self, i: int, closure: Callable[[], None], *, is_raw: bool) -> None:
        closure()
        self.step(i)

    @contextmanager
    def toggled(self, i: int, *, sync_grad: bool) -> Iterator[None]:
        self.toggle(i)
        yield
        self.untoggle(i)

    def toggle(self, i: int) -> None:
        mine = {p for group in self.made[i].param_groups for p in group["params"]}
        for optimizer in self.made:
            for group in optimizer.param_groups:
                for p in group["params"]:
                    self.frozen.setdefault(p, p.requires_grad)
                    p.requires_grad = self.frozen[p] if p in mine else False

    def untoggle(self, i: int) -> None:
        for p, needs in self.frozen.items():
            p.requires_grad = needs
        self.frozen = {}

    def clip(self, i: int, norm: float) -> None:
        nn.utils.clip_grad_norm_([p for group in self.made[i].param_groups for p in group["params"]], norm)


@dataclass(frozen=True)
class Recipe:
    """step(side, batch_idx); optimizers(module)."""

    step: Callable[[Any, int], None]
    optimizers: Callable[[Pair], Any]
    loss: str = "mean"


def on_ranks(recipe: Recipe, world_size: int, mesh: Sequence[str], epochs: int = 1) -> dict[str, Any]:
    module = Pair(mesh, recipe)
    strategy = moecompile.ExpertParallelStrategy(loss=recipe.loss)
    trainer = Trainer(strategy=strategy, devices=world_size, max_epochs=epochs, **CPU)
    trainer.fit(module)
    weights = {name: full(t) for name, t in module.state_dict().items()}
    return {"grads": module.grads, "weights": weights, "loads": [load.load.tolist() for load in strategy.loads]}


def on_one(recipe: Recipe, world_size: int, epochs: int = 1) -> dict[str, Any]:
    module = Pair([], recipe)
    made = recipe.optimizers(module)
    made = list(made) if isinstance(made, (list, tuple)) else [made]
    every = [data(rank) for rank in range(world_size)]
    means: dict[nn.Parameter, tuple[float, int]] = {}
    state: dict[str, int] = {}
    for _ in range(epochs):
        for i in range(STEPS):
            piece = slice(i * BATCH, (i + 1) * BATCH)
            side = OnOne(module, [(x[piece], y[piece]) for x, y in every], made, means, state)
            recipe.step(side, i)
    return {"grads": module.grads, "weights": {name: t.detach().clone() for name, t in module.state_dict().items()}}


# -- losses and optimizers --------------------------------------------------------------------------------------------


def cross_entropy(module: Pair, x: Tensor, y: Tensor, *, mean: bool) -> Tensor:
    loss = F.cross_entropy(module.model(x), y, ignore_index=-100, reduction="sum")
    return loss / BATCH if mean else loss


def adversary(module: Pair, x: Tensor, y: Tensor, *, mean: bool, detach: bool) -> Tensor:
    """The other model's loss on the compiled model's output; a sum over the tokens with a target."""
    out = module.model(x)
    loss = (module.other(out.detach() if detach else out).square().sum(-1) * (y != -100)).sum()
    return loss / BATCH if mean else loss


def one_optimizer(module: Pair) -> Any:
    return torch.optim.AdamW(module.parameters(), lr=0.02, eps=1e-3, weight_decay=0.1)


def disjoint(module: Pair) -> Any:
    """The compiled model's experts and routers, and the rest of it."""
    names = ("experts", "router")
    moe = [p for name, p in module.model.named_parameters() if any(part in name for part in names)]
    rest = [p for name, p in module.model.named_parameters() if not any(part in name for part in names)]
    return [torch.optim.AdamW(rest, lr=0.02, eps=1e-3), torch.optim.SGD(moe, lr=0.1)]


def two_models(module: Pair) -> Any:
    model, other = module.model.parameters(), [*module.other.parameters(), *module.also_unused.parameters()]
    return [torch.optim.SGD(model, lr=0.01), torch.optim.AdamW(other, lr=0.02, eps=1e-3)]
