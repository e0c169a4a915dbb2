"""Lightning over stages of a pipeline: a user's own module stays as it is, and its checkpoints go to any number of stages."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import moecompile
from moecompile.checkpoint.tensors import tensors_of
from moecompile.compose import compose_config
from moecompile.errors import MoecompileError
from moecompile.models.build import example_inputs
from moecompile.models.source import source_model
from moecompile.nn import routers_of
from moecompile.pipeline import compile_model, make_plan, planning_facts
from moecompile.planner.build_plan import run_facts
from moecompile.planner.memory import memory_of_fullest_rank
from moecompile.planner.pipeline import ranks_of
from moecompile.runtime.module import LanguageModule
from moecompile.runtime.rehearsal import BATCH as INPUTS
from moecompile.runtime.rehearsal import STEP, Moments, Watch
from moecompile.runtime.strategy import groups_of
from moecompile.runtime.training import make_trainer
from moecompile.schema import accumulation_steps
from moecompile.verify import worst
from moecompile.verify.ranks import merged
from tests.distributed.gradient_job import full
from tests.distributed.harness import run_distributed_test
from tests.distributed.manual_job import CPU
from tests.tiny import SHORT

pytestmark = pytest.mark.slow

WORLD, STEPS, MICRO, BATCH, WIDTH = 4, 2, 4, 3, 8
EXPERTS = [
    "experts.num_routed=4",
    "routing.top_k=2",
    "balance.losses.micro_batch=0.1",
    "balance.rule=bias",
    "balance.rate=0.05",
]
RUN = [f"data.micro_batch_size={BATCH}", "data.seq_len=2"]
MESHES = {  # ranks along pp -> settings; the others share experts
    1: ["mesh.ranks_per_node=4", "mesh.ep=2"],
    2: ["mesh.ranks_per_node=4", "mesh.pp=2", "mesh.ep=2"],
    4: ["mesh.ranks_per_node=4", "mesh.pp=4", "mesh.ep=1"],
}
INTERLEAVED = [*MESHES[2], "pipeline.stages_per_rank=2"]
THERE_AND_BACK = [*MESHES[2], "pipeline.schedule=dualpipev"]
FROZEN = ("into.", "layers.0.")  # all of the first stage there and back, whose rank has the head too


class Layer(nn.Module):
    """A residual FFN."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(F.gelu(self.up(self.norm(x))))
        return out


class Model(nn.Module):
    """No language model: numbers in, classes out."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.layers = nn.Linear(6, WIDTH), nn.ModuleList(Layer() for _ in range(4))
        self.out = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.into(x)
        for layer in self.layers:
            h = layer(h)
        classes: Tensor = self.out(h)
        return classes


class WritingLayer(Layer):
    """It writes to what it is given."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mul_(1.5))


class WritingModel(Model):
    """Layers that write to what they are given."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(WritingLayer() for _ in range(4))


def built(mesh: list[str], frozen: tuple[str, ...] = (), kind: type[Model] = Model) -> nn.Module:
    torch.manual_seed(0)
    overrides = [*EXPERTS, *RUN, *mesh]
    model = moecompile.compile_model(kind().double(), overrides, example=torch.zeros(BATCH, 6).double())
    for _, router in routers_of(model):  # copies of an expert would have the same gradients
        nn.init.normal_(router.weight)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith(frozen or ("none",)))
    return model


def data(place: int, steps: int = STEPS) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(place)
    inputs = torch.randn(steps * MICRO * BATCH, 6, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(0, 3, (len(inputs),), generator=generator)


@dataclass
class Found:
    """Of a rank."""

    grads: list[dict[str, Tensor]] = field(default_factory=list)
    weights: dict[str, Tensor] = field(default_factory=dict)
    logged: dict[str, float] = field(default_factory=dict)
    returned: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    stops: int = 0


class Module(LightningModule):
    """As a user writes it: nothing in it knows of stages."""

    def __init__(self, model: nn.Module, found: Found) -> None:
        super().__init__()
        self.model, self.found = model, found

    def loss(self, batch: Any) -> Tensor:
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        self.log("loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch), sync_dist=True)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.found.returned.append(float(outputs["loss"]))

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        whole = {name: full(p.grad) for name, p in self.model.named_parameters() if p.grad is not None}
        self.found.grads.append(merged(whole, groups_of(self.trainer).stages))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-2, eps=1e-5)


def loader(place: int) -> Any:
    return DataLoader(TensorDataset(*data(place)), batch_size=BATCH)


def fit(
    mesh: list[str], frozen: tuple[str, ...] = (), kind: type[Model] = Model, **settings: Any
) -> tuple[Trainer, Module]:
    strategy = moecompile.ExpertParallelStrategy(**settings)
    stop = EarlyStopping("val_loss", min_delta=100.0, patience=5)  # every rank must know the value
    trainer = Trainer(
        strategy=strategy, devices=WORLD, max_epochs=1, accumulate_grad_batches=MICRO, gradient_clip_val=1e-2,
        callbacks=[stop], num_sanity_val_steps=0, **CPU,
    )  # fmt: skip
    module = Module(built(mesh, frozen, kind), Found())
    plan = moecompile.plan_of(module.model)
    place = plan.mesh.batch_index(dist.get_rank() if dist.is_initialized() else int(os.environ["RANK"]))
    trainer.fit(module, loader(place), loader(100 + place))
    module.found.weights = merged({n: full(t) for n, t in module.model.state_dict().items()}, groups_of(trainer).stages)
    module.found.logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return trainer, module


def chain(folder: Path) -> list[dict[str, Tensor]]:
    """Weights, moments and biases of a run, saved and loaded on 1, 2, 4, there and back on 2, and 1 ranks along pp."""
    trainer, module = fit(MESHES[1])
    entries, found = tensors_of(module.model, trainer.optimizers), []
    found.append({name: full(tensor) for name, tensor in entries.items()})
    trainer.save_checkpoint(folder / "0")
    for i, mesh in enumerate((MESHES[2], MESHES[4], THERE_AND_BACK, MESHES[1])):
        strategy = moecompile.ExpertParallelStrategy()
        again = Trainer(strategy=strategy, devices=WORLD, max_steps=STEPS, accumulate_grad_batches=MICRO, **CPU)
        module = Module(built(mesh), Found())
        again.fit(module, loader(0), ckpt_path=folder / str(i))
        whole = {name: full(tensor) for name, tensor in tensors_of(module.model, again.optimizers).items()}
        found.append(merged(whole, groups_of(again).stages))
        again.save_checkpoint(folder / str(i + 1))
    return found


def error(module: LightningModule) -> str:
    trainer = Trainer(strategy="expert_parallel", devices=WORLD, max_epochs=1, num_sanity_val_steps=0, **CPU)
    try:
        trainer.fit(module, loader(0))
    except MoecompileError as found:
        return str(found)
    return ""


def refusals() -> dict[str, str]:
    """What a module does that a pipeline cannot, and the error."""

    class Manual(Module):
        def __init__(self) -> None:
            super().__init__(built(MESHES[2]), Found())
            self.automatic_optimization = False

    class Beside(Module):
        def __init__(self) -> None:
            super().__init__(built(MESHES[2]), Found())
            self.beside = nn.Linear(2, 2)

    class Elsewhere(Module):
        def __init__(self) -> None:
            super().__init__(built(MESHES[2]), Found())

        def on_train_start(self) -> None:
            self.model(torch.zeros(1, 6).double())

    class Twice(Module):
        def __init__(self) -> None:
            super().__init__(built(MESHES[2]), Found())

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            one = self.loss(batch)
            try:  # the last stage raises, and earlier ones would wait for it
                return one + self.loss(batch)
            except MoecompileError as found:
                self.said = str(found)
                return one

        def on_train_end(self) -> None:
            said: list[Any] = [None] * WORLD
            dist.all_gather_object(said, getattr(self, "said", ""))
            raise MoecompileError(max(said, key=len))

    return {each.__name__: error(each()) for each in (Manual, Beside, Elsewhere, Twice)}


def draws() -> list[list[float]]:
    """Of each rank, what two layers of different stages draw in training, and what a step draws before the model."""

    class Dropping(Module):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            self.drawn = [float(torch.rand(()))]
            return super().training_step(batch, batch_idx)

    module = Dropping(built(MESHES[2]), Found())
    for name in ("layers.0.norm", "layers.2.norm"):
        hook = partial(lambda module, *_: module.drawn.append(float(torch.rand(()))), module)
        module.model.get_submodule(name).register_forward_pre_hook(lambda *_, hook=hook: hook())
    strategy = moecompile.ExpertParallelStrategy()
    Trainer(strategy=strategy, devices=WORLD, max_steps=1, **CPU).fit(module, loader(0))
    every: list[Any] = [None] * WORLD
    dist.all_gather_object(every, module.drawn)
    return every


def kept_best(folder: Path) -> float:
    """The best value of a ModelCheckpoint that keeps one, over epochs in which the value falls."""

    class Falling(Module):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.loss(batch)
            self.log("falls", -float(self.current_epoch))

    best = ModelCheckpoint(folder, monitor="falls", save_top_k=1)
    settings = {**CPU, "enable_checkpointing": True}
    trainer = Trainer(
        strategy="expert_parallel", devices=WORLD, max_epochs=3, callbacks=[best], num_sanity_val_steps=0, **settings
    )
    trainer.fit(Falling(built(MESHES[2]), Found()), loader(0), loader(1))
    return float(best.best_model_score)


PLANNED = {
    "1f1b": [], "kept": ["trainer.checkpointing=keep_exchanges"], "full": ["trainer.checkpointing=full"],
    "interleaved": ["pipeline.stages_per_rank=2"], "there and back": ["pipeline.schedule=dualpipev"],
}  # fmt: skip
"""Name -> settings of a run whose memory and messages are counted."""


@dataclass
class Sizes:
    """Bytes of a rank in its first optimizer step, before there are moments: the plan's for its stages, and counted."""

    memory: int
    peak: int
    sent: int
    most_sent: int
    messages: int


def sizes(overrides: list[str], folder: Path) -> Sizes:
    config = compose_config([
        "recipe=deepseek_ep", "mesh=cpu_1x4", "mesh.pp=2", "routing.workload=balanced", "data.global_batch_size=32",
        "trainer.progress_bar=false", "trainer.max_steps=1", SHORT, *overrides,
    ])  # fmt: skip
    model = source_model(config)
    example = example_inputs(model, config.data.seq_len)
    facts = planning_facts(model, config, example)[1]
    plan = make_plan(model, config, example=example)
    compile_model(model, config, example=example, plan=plan)
    index = plan.mesh.index(dist.get_rank(), "pp")
    of, estimate = ranks_of(plan, facts)[index], plan.estimate
    del facts  # it has the activations of the recorded forward
    assert estimate is not None and plan.pipeline is not None
    run = replace(
        run_facts(config, plan.mesh, of.facts), reduce=plan.reduce, gather=plan.gather,
        checkpointing=estimate.checkpointing,
    )  # fmt: skip
    memory, watch = memory_of_fullest_rank(of.layers, of.mesh, of.facts, of.run(run, plan.pipeline)), Watch()
    del of
    number = accumulation_steps(config, plan.mesh)
    tokens = torch.randint(0, 256, (number, config.data.micro_batch_size, config.data.seq_len))
    batches = DataLoader([dict.fromkeys(INPUTS, each) for each in tokens], batch_size=None)
    module = LanguageModule(model, config.optimizer, 1)
    trainer = make_trainer(config, plan, folder, [Moments(watch)], loggers=[])
    with watch:
        trainer.fit(module, batches)
    peak = max(moment.peak for moment in watch.seen.moments if moment.name != STEP)
    wires = trainer.strategy._stages.stages.wires
    cuts = {cut for cut in range(1, len(plan.pipeline.stages)) if not plan.pipeline.is_local(cut)}
    sends_back = sum(stage in cuts for stage in plan.pipeline.stages_of(index))
    sends_on = sum(stage + 1 in cuts for stage in plan.pipeline.stages_of(index))
    words = 8 * (number * sends_back + (3 + 8) * sends_on)  # weights of auxiliary losses, and shapes once
    return Sizes(memory.total - memory.optimizer, peak, wires.sent_bytes - words, estimate.stage_bytes_per_step, words)


def every(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    counted = {name: sizes(overrides, folder / name) for name, overrides in PLANNED.items()}
    cases: dict[str, Any] = {f"pp {ranks}": fit(mesh)[1].found for ranks, mesh in MESHES.items()}
    cases["interleaved"] = fit(INTERLEAVED)[1].found
    cases["there and back"] = fit(THERE_AND_BACK)[1].found
    cases["computed again"] = fit(INTERLEAVED, checkpointing="full")[1].found
    cases["frozen"] = fit(THERE_AND_BACK, FROZEN)[1].found
    cases["frozen, reduced each"] = fit([*THERE_AND_BACK, "trainer.reduce=each"], FROZEN)[1].found
    cases["written to"] = fit(MESHES[4], kind=WritingModel)[1].found
    best = kept_best(folder / "best")
    return {**cases, "sizes": counted, "chain": chain(folder), "draws": draws(), "best": best, "refusals": refusals()}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run_distributed_test(every, WORLD, tmp_path_factory.mktemp("stages"), timeout_s=400)


@cache
def alone(places: int, frozen: tuple[str, ...] = (), kind: type[Model] = Model) -> Found:
    """One process over the batches of all places: gradients before clipping, weights, losses."""
    model, found = built(["mesh.ranks_per_node=1"], frozen, kind), Found()
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-5)
    losses: list[float] = []
    for step in range(STEPS):
        optimizer.zero_grad()
        for place in range(places):
            inputs, labels = data(place)
            for i in range(step * MICRO, (step + 1) * MICRO):
                rows = slice(i * BATCH, (i + 1) * BATCH)
                loss = F.cross_entropy(model(inputs[rows]), labels[rows])
                losses.append(float(loss.detach()))
                ((loss + moecompile.nn.auxiliary_loss(model)) / (MICRO * places)).backward()
        found.grads.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-2)
        optimizer.step()
        moecompile.nn.update_balance(model)
    found.weights = {name: tensor.clone() for name, tensor in model.state_dict().items() if "meter" not in name}
    model.eval()
    with torch.no_grad():
        checked = [F.cross_entropy(model(x), y) for x, y in map(data, range(100, 100 + places))]
    found.logged = {"loss": sum(losses) / len(losses), "val_loss": float(sum(checked)) / places}
    return found


CASES = {
    "pp 1": 4, "pp 2": 2, "pp 4": 1, "interleaved": 2, "there and back": 2, "computed again": 2, "frozen": 2,
    "frozen, reduced each": 2, "written to": 1,
}  # fmt: skip
"""Name -> different micro-batches at a time."""


def of_one_process(name: str) -> Found:
    kind = WritingModel if name == "written to" else Model
    return alone(CASES[name], FROZEN if name.startswith("frozen") else (), kind)


@pytest.mark.parametrize("name", CASES)
def test_a_module_that_knows_nothing_of_stages_trains_as_in_one_process(ranks: Any, name: str) -> None:
    wanted, got = of_one_process(name), ranks[0][name]
    assert len(got.grads) == len(wanted.grads) == STEPS
    for step in range(STEPS):
        assert got.grads[step].keys() == wanted.grads[step].keys()
        assert worst(got.grads[step], wanted.grads[step]) < (1e-10, "")
    assert worst({key: got.weights[key] for key in wanted.weights}, wanted.weights) < (1e-10, "")


@pytest.mark.parametrize("name", CASES)
def test_what_it_logs_is_known_on_every_rank(ranks: Any, name: str) -> None:
    wanted = of_one_process(name).logged
    for rank in ranks:
        assert rank[name].logged == pytest.approx(wanted, rel=1e-6), rank[name].logged


def test_a_checkpoint_goes_through_any_number_of_stages(ranks: Any) -> None:
    first, *others = ranks[0]["chain"]
    assert any(name.startswith("optimizer.") for name in first) and len(first) > 50
    for each in others:
        assert each.keys() == first.keys()
        assert all(torch.equal(each[name], first[name]) for name in first)


def test_stages_draw_different_numbers_and_their_inputs_the_same(ranks: Any) -> None:
    drawn = ranks[0]["draws"]
    assert len({each[0] for each in drawn[:2]}) == 2  # ranks of a stage have different micro-batches
    assert [each[0] for each in drawn[:2]] == [each[0] for each in drawn[2:]]
    assert all(len(each) == 2 for each in drawn)
    assert not {each[1] for each in drawn[:2]} & {each[1] for each in drawn[2:]}


@pytest.mark.parametrize("name", PLANNED)
def test_memory_and_messages_are_as_planned(ranks: Any, name: str) -> None:
    """Of the fullest rank, as a plan says: messages exactly, memory within the 10% of benchmarks/memory.py."""
    found: list[Sizes] = [rank["sizes"][name] for rank in ranks]
    assert max(each.sent for each in found) == found[0].most_sent
    assert max(each.memory for each in found) == pytest.approx(max(each.peak for each in found), rel=0.10), found


def test_a_callback_keeps_the_best_checkpoint(ranks: Any) -> None:
    assert [rank["best"] for rank in ranks] == [-2.0] * WORLD


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Manual", "mesh.pp=2: a pipeline orders the backwards of a step, and this module calls them itself"),
        ("Beside", "mesh.pp=beside.weight: is a weight outside of the compiled model, and belongs to no stage"),
        ("Twice", "the model is called twice in a step, and earlier stages of a pipeline end theirs at the first call"),
        ("Elsewhere", "this rank has some stages of the model alone, so the model can be called in training_step"),
    ],
)
def test_what_a_module_must_not_do(ranks: Any, name: str, message: str) -> None:
    assert message in ranks[0]["refusals"][name]
