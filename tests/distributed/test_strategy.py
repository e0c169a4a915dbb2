"""ExpertParallelStrategy with a user's own LightningModule, against one process with plain PyTorch."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import lightning
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BackboneFinetuning, StochasticWeightAveraging
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, TensorDataset

import moecompile
from moecompile.errors import ConfigError, PlanError, UserError
from moecompile.mesh import MeshSpec
from moecompile.runtime.converted import reading_of
from moecompile.runtime.groups import Groups
from moecompile.runtime.trainer_checkpoint import LIGHTNING, _beside_tensors, _set_by_weights, load
from moecompile.verify import worst
from tests.distributed.classifier import Classifier, spread
from tests.distributed.gradient_job import full
from tests.distributed.harness import run_distributed_test

WORLD, BATCH, STEPS, ACCUMULATE, CLIP, RATE = 2, 4, 3, 2, 0.05, 0.01
OVERRIDES = [
    "experts.num_routed=4", "routing.top_k=2", "mesh.ranks_per_node=2", "dispatch.kind=flat", "balance.rule=bias",
    f"balance.rate={RATE}",
]  # fmt: skip
AUX = ("balance.losses.micro_batch=0.5", "balance.losses.global_batch=0.7", "balance.losses.z=0.1")
SEED = 5
CPU = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False,
       "enable_model_summary": False, "barebones": False}  # fmt: skip


def compiled(overrides: Sequence[str]) -> nn.Module:
    torch.manual_seed(0)
    model = moecompile.compile_model(Classifier(), [*OVERRIDES, *overrides], example=torch.zeros(1, 6))
    return spread(model)


def one_process(overrides: Sequence[str]) -> nn.Module:
    """The same weights without exchanges: planned for one rank."""
    torch.manual_seed(0)
    overrides = [o for o in (*OVERRIDES, *overrides) if not o.startswith(("mesh", "dispatch"))]
    return spread(moecompile.compile_model(Classifier(), overrides, example=torch.zeros(1, 6)))


def dataset() -> TensorDataset:
    generator = torch.Generator().manual_seed(2)
    size = WORLD * BATCH * ACCUMULATE * STEPS
    return TensorDataset(torch.randn(size, 6, generator=generator), torch.randint(0, 3, (size,), generator=generator))


class Mean(LightningModule):
    """What any user would write; the strategy needs nothing more. `seen` and what follows are for the tests alone."""

    overrides: tuple[str, ...] = ()

    def __init__(self) -> None:
        super().__init__()
        self.model = compiled(self.overrides)
        self.seen: list[Tensor] = []
        self.grads: list[dict[str, Tensor]] = []
        self.returned: list[float] = []
        self.logged: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        self.seen.append(x)
        loss = F.cross_entropy(self.model(x), y)
        self.returned.append(float(loss))
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.logged.append(float(outputs["loss"]))

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.grads.append({name: full(p.grad) for name, p in self.model.named_parameters()})

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def train_dataloader(self) -> Any:
        return DataLoader(dataset(), batch_size=BATCH)


class Sum(Mean):
    """Returns sums; on rank 1 half of the targets do not count."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        self.seen.append(x)
        y = ignored(y, self.trainer.global_rank)
        loss = F.cross_entropy(self.model(x), y, reduction="sum", ignore_index=-100)
        self.returned.append(float(loss))
        return {"loss": loss, "num_tokens": (y != -100).sum()}


class SumWithoutCount(Mean):
    """Forgets its token count."""


class Takes(Mean):
    """Takes its batch apart, and has a loss that is not finite."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        y, x = batch.pop(), batch.pop()
        return F.cross_entropy(self.model(x), y) * torch.nan


class MeanAux(Mean):
    """With auxiliary losses, of which its code knows nothing."""

    overrides = AUX


class SumAux(Sum):
    """The same for sums."""

    overrides = AUX


class Moments(Mean):
    """With moments, into which a step with zeros would put the weights."""

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=0.01, weight_decay=0.1)


class Manual(Mean):
    """Steps by itself, the head from the third batch on."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        model, head = self.optimizers()
        x, y = batch
        self.manual_backward(F.cross_entropy(self.model(x), y))
        model.step()
        if batch_idx > 1:
            head.step()
        self.zero_grad()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        pass

    def configure_optimizers(self) -> Any:
        head = set(self.model.head.parameters())
        return [torch.optim.Adam(each, lr=0.01) for each in ([*set(self.model.parameters()) - head], [*head])]


class ByMesh(Mean):
    """With groups by device mesh, and rates that follow two schedulers of one group each."""

    def __init__(self, mesh: str) -> None:
        self.overrides = (mesh,)
        super().__init__()

    def configure_optimizers(self) -> Any:
        made = moecompile.make_optimizer(self.model, ["optimizer.lr=0.01"])
        for group in made.param_groups:  # before the scheduler: its base
            group["lr"] *= 2 if group["weight_decay"] else 1
        first = torch.optim.lr_scheduler.LambdaLR(made, partial(pow, 0.5))
        parts = [first, torch.optim.lr_scheduler.CosineAnnealingLR(made, 9)]
        schedule = torch.optim.lr_scheduler.SequentialLR(made, parts, milestones=[4])
        return {"optimizer": made, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Saves(Callback):
    """Saves before the first step, and after the first batch."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.save_checkpoint(self.folder / "0")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if args[-1] == 0:
            trainer.save_checkpoint(self.folder / "1")


MODULES: dict[str, type[Mean]] = {"mean": Mean, "sum": Sum, "mean-aux": MeanAux, "sum-aux": SumAux}
CASES = pytest.mark.parametrize("case", MODULES)


def ignored(y: Tensor, rank: int) -> Tensor:
    return torch.where(torch.arange(len(y)) % 2 == 0, y, -100) if rank == 1 else y


def reference(
    batches: list[list[tuple[Tensor, Tensor]]], *, mean: bool, overrides: Sequence[str]
) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
    """(gradients of all steps, last weights). batches: per step, all ranks' micro-batches."""
    model = one_process(overrides)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    grads: list[dict[str, Tensor]] = []
    for step in batches:
        optimizer.zero_grad()
        count = len(step) if mean else sum(int((y != -100).sum()) for _, y in step)
        for x, y in step:
            reduction = "mean" if mean else "sum"
            loss = F.cross_entropy(model(x), y, reduction=reduction, ignore_index=-100)
            aux = moecompile.auxiliary_loss(model)
            if aux is not None:
                loss = loss + (1 if mean else int((y != -100).sum())) * aux
            (loss / count).backward()
        grads.append({name: p.grad.clone() for name, p in model.named_parameters()})
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        moecompile.update_balance(model)
    return grads, {name: t.detach().clone() for name, t in model.state_dict().items()}


def fit(rank: int, world_size: int, module_class: type[Mean], strategy: str, folder: str) -> dict[str, Any]:
    module, keys = module_class(), []
    chosen = "expert_parallel"
    if strategy != chosen:
        chosen = moecompile.ExpertParallelStrategy(loss=strategy, seed=SEED)
    trainer = Trainer(
        strategy=chosen, devices=world_size, max_epochs=1, accumulate_grad_batches=ACCUMULATE, gradient_clip_val=CLIP,
        default_root_dir=folder, **CPU,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("moecompile.runtime.strategy.set_random_key", lambda model, *key: keys.append(key))
        trainer.fit(module)
    path = Path(folder, "whole")
    trainer.save_checkpoint(path)
    weights = {name: full(t) for name, t in module.model.state_dict().items()}
    resumed = Trainer(
        strategy=moecompile.ExpertParallelStrategy(loss="sum" if issubclass(module_class, Sum) else "mean"),
        devices=world_size, max_epochs=1, default_root_dir=folder, **CPU,
    )  # fmt: skip
    again = module_class()
    resumed.fit(again, ckpt_path=path)  # the epoch is over: loads and stops
    restored = {name: full(t) for name, t in again.model.state_dict().items()}
    kinds = {type(p).__name__ for p in module.model.parameters()}
    return {
        "grads": module.grads, "weights": weights, "seen": module.seen, "restored": restored, "kinds": kinds,
        "returned": module.returned, "logged": module.logged, "keys": keys,
        "aux": {kind: float(aux) for kind, aux in trainer.strategy.aux_losses.items()},
    }  # fmt: skip


def every_case(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    names = {"mean": "expert_parallel", "sum": "sum", "mean-aux": "mean", "sum-aux": "sum"}
    out = {case: fit(rank, world_size, module, names[case], f"{folder}/{case}") for case, module in MODULES.items()}
    out["saves"], out["meshes"] = with_saves(Path(folder)), on_meshes(Path(folder, "meshes"))
    mistakes = {
        "count": _without_count, "world": _wrong_world, "plain": _not_compiled, "table": _table_by_rows,
        "average": _averaged, "scaler": _scaled, "nan": _not_finite, "second": _second_trainer, "unfreeze": _unfreezes,
        "no batch": _no_batch,
    }  # fmt: skip
    for name, call in mistakes.items():
        try:
            call(folder)
        except UserError as error:
            out[name] = str(error)
    out["predicted"], out["alone"] = _predicted(), _weights_alone(Path(folder, "alone"))
    out["uneven"], axes = _uneven(rank), ("ep", "cp", "tp", "pp")
    return {**out, "reduced": {axis: _reduced(rank, MeshSpec(ranks_per_node=WORLD, **{axis: WORLD})) for axis in axes}}


class Predicts(Mean):
    """With what `Trainer.predict` calls."""

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.model(batch[0])


class HasBackbone(Mean):
    """With what `BackboneFinetuning` freezes."""

    @property
    def backbone(self) -> nn.Module:
        return self.model


def _predicted() -> list[Tensor]:
    """Of five samples on two ranks, in batches of two: by the sampler that Lightning has for prediction."""
    trainer = Trainer(strategy="expert_parallel", devices=WORLD, **CPU)
    return trainer.predict(Predicts(), DataLoader(TensorDataset(dataset().tensors[0][:5]), batch_size=2))


class Streamed(IterableDataset[tuple[Tensor, Tensor]]):
    """Samples of no known number."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return zip(*(tensor[: self.size] for tensor in dataset().tensors), strict=True)


class Guessed(BatchSampler):
    """Says five batches, however many there are."""

    def __len__(self) -> int:
        return 5


def _uneven(rank: int) -> dict[str, tuple[int, int, int]]:
    """Batches of training and of validation, and what is said: rank 1 has fewer of the first, rank 0 of the second."""
    found = {}
    for kind in ("of known length", "streamed", "one of each", "by sampler"):
        more, fewer = (rank == 0) * BATCH, (rank == 1) * BATCH
        sizes = 2 * BATCH + more + 1, BATCH + fewer
        streams = kind == "streamed" or (kind == "one of each" and rank == 1)
        made = [Streamed(size) if streams else TensorDataset(*dataset()[:size]) for size in sizes]
        loaders = [DataLoader(each, BATCH) for each in made]
        if kind == "by sampler":
            loaders = [DataLoader(each, batch_sampler=Guessed(range(len(each)), BATCH, False)) for each in made]
        module, said = Validates(), list[str]()
        trainer = Trainer(
            strategy="expert_parallel", devices=WORLD, max_epochs=2, use_distributed_sampler=False,
            num_sanity_val_steps=0, **CPU,
        )  # fmt: skip
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("moecompile.runtime.even_batches.rank_zero_info", said.append)
            trainer.fit(module, *loaders)
        found[kind] = trainer.global_step, module.validated, len(said)
        assert all(type(each) is DataLoader for each in loaders)  # the user's own are as they were
    return found


def _no_batch(folder: str) -> None:
    size = 2 * BATCH * (dist.get_rank() == 0)
    trainer = Trainer(strategy="expert_parallel", devices=WORLD, max_epochs=1, **CPU)
    trainer.fit(Mean(), DataLoader(Streamed(size), BATCH))


def _reduced(rank: int, mesh: MeshSpec) -> dict[str, float]:
    """What is logged of 5 tokens of each rank, as `reduce_fx` says, and of the rank."""
    strategy = moecompile.ExpertParallelStrategy()
    strategy._groups = Groups.of(mesh, "cpu")
    values = {"sum": 5.0, "mean": 5.0, "max": float(rank)}
    return {op: float(strategy.reduce(torch.tensor(value), reduce_op=op)) for op, value in values.items()}


def with_saves(folder: Path) -> dict[str, list[dict[str, Tensor]]]:
    """Weights after an epoch, by module: without a save, with some, from the checkpoint before the first step."""
    found: dict[str, list[dict[str, Tensor]]] = {}
    for kind in (Moments, Manual):
        saves = Saves(folder / kind.__name__)
        for callbacks, path in ([], None), ([saves], None), ([], saves.folder / "0"):
            module = kind()
            trainer = Trainer(strategy="expert_parallel", devices=WORLD, max_epochs=1, callbacks=callbacks, **CPU)
            trainer.fit(module, ckpt_path=path)
            weights = {name: full(tensor) for name, tensor in module.model.state_dict().items()}
            found.setdefault(kind.__name__, []).append(weights)
    return found


def on_meshes(folder: Path) -> list[tuple[int, dict[str, float], dict[str, Tensor]]]:
    """Groups, rates of weights, weights: after three steps, three more on the same mesh, and on another one."""
    found = []
    for mesh, path, steps in (("mesh.ep=2", None, 3), ("mesh.ep=2", folder, 6), ("mesh.ep=1", folder, 6)):
        module = ByMesh(mesh)
        trainer = Trainer(strategy="expert_parallel", devices=WORLD, max_steps=steps, **CPU)
        trainer.fit(module, ckpt_path=path)
        if path is None:
            trainer.save_checkpoint(folder)
        names = {parameter: name for name, parameter in module.model.named_parameters()}
        groups = trainer.optimizers[0].param_groups
        rates = {names[parameter]: group["lr"] for group in groups for parameter in group["params"]}
        found.append((len(groups), rates, {n: full(t) for n, t in module.model.state_dict().items()}))
    return found


def _without_count(folder: str) -> None:
    trainer = Trainer(strategy=moecompile.ExpertParallelStrategy(loss="sum"), devices=WORLD, max_epochs=1, **CPU)
    trainer.fit(SumWithoutCount())


def _wrong_world(folder: str) -> None:
    module = Mean()
    module.model = one_process([])
    Trainer(strategy="expert_parallel", devices=WORLD, max_epochs=1, **CPU).fit(module)


def _not_compiled(folder: str) -> None:
    module = Mean()
    module.model = Classifier()
    Trainer(strategy="expert_parallel", devices=WORLD, max_epochs=1, **CPU).fit(module)


def _table_by_rows(folder: str) -> None:
    module, model = Mean(), nn.Sequential(nn.Embedding(64, 6), Classifier())
    rows = ["embeddings.shard=ep", "embeddings.min_numbers=1", "embeddings.optimizer=lazy_adamw"]
    module.model = moecompile.compile_model(model, [*OVERRIDES, *rows], example=torch.zeros(1, 4, dtype=torch.int64))
    Trainer(strategy="expert_parallel", devices=WORLD, max_epochs=1, **CPU).fit(module)  # SGD of torch's


def _averaged(folder: str) -> None:
    average = StochasticWeightAveraging(swa_lrs=0.01)
    Trainer(strategy="expert_parallel", devices=WORLD, max_epochs=1, callbacks=[average], **CPU).fit(Mean())


def _unfreezes(folder: str) -> None:
    callback = BackboneFinetuning(unfreeze_backbone_at_epoch=1)
    Trainer(strategy="expert_parallel", devices=WORLD, max_epochs=1, callbacks=[callback], **CPU).fit(HasBackbone())


def _second_trainer(folder: str) -> None:
    module = Predicts()
    for _ in range(2):
        Trainer(strategy="expert_parallel", devices=WORLD, **CPU).predict(module, DataLoader(dataset(), BATCH))


class Validates(Mean):
    """With what `Trainer.validate` calls."""

    validated = 0

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.validated += 1
        self.log("val", F.cross_entropy(self.model(batch[0]), batch[1]), sync_dist=True)


def _weights_alone(path: Path) -> tuple[str, list[dict[str, Tensor]]]:
    """What `fit` says of weights that were saved alone; these, as another Trainer validates them, and as it trains them."""
    saved, begun = Mean(), Validates()
    first, refused, second = (Trainer(strategy="expert_parallel", devices=WORLD, max_epochs=1, **CPU) for _ in range(3))
    first.fit(saved)
    first.save_checkpoint(path, weights_only=True)
    with pytest.raises(PlanError) as caught:
        refused.fit(Mean(), ckpt_path=path)
    second.validate(begun, DataLoader(dataset(), BATCH), ckpt_path=path)
    weights = [{name: full(p).clone() for name, p in module.model.named_parameters()} for module in (saved, begun)]
    second.fit(begun)
    return str(caught.value), [*weights, {name: full(p) for name, p in begun.model.named_parameters()}]


def _scaled(folder: str) -> None:
    plugins = [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]
    Trainer(strategy="expert_parallel", devices=WORLD, max_epochs=1, plugins=plugins, **CPU).fit(Mean())


def _not_finite(folder: str) -> None:
    strategy = moecompile.ExpertParallelStrategy(on_nan="stop")
    Trainer(strategy=strategy, devices=WORLD, max_epochs=1, **CPU).fit(Takes())


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_distributed_test(every_case, WORLD, str(tmp_path_factory.mktemp("fit")), timeout_s=120)


@CASES
def test_equals_one_process(results: list[dict[str, Any]], case: str) -> None:
    data, mean = dataset(), case.startswith("mean")
    batches = []
    for step in range(STEPS):
        batches.append([])
        for rank in range(WORLD):
            for micro in range(ACCUMULATE):
                seen = results[rank][case]["seen"][step * ACCUMULATE + micro]
                index = [int((data.tensors[0] == row).all(1).nonzero()) for row in seen]
                y = data.tensors[1][index]
                batches[-1].append((seen, y if mean else ignored(y, rank)))
    grads, weights = reference(batches, mean=mean, overrides=MODULES[case].overrides)
    for got, wanted in zip(results[0][case]["grads"], grads, strict=True):
        assert worst(got, wanted)[0] < 2e-5
    assert worst(results[0][case]["weights"], weights)[0] < 2e-5
    assert weights["blocks.0.router.correction_bias"].abs().max() > 0


def test_auxiliary_losses_change_the_gradients_and_not_the_logged_loss(results: list[dict[str, Any]]) -> None:
    for result in results:
        for case, module in MODULES.items():
            of_case = result[case]
            assert [ACCUMULATE * loss for loss in of_case["logged"]] == pytest.approx(of_case["returned"], rel=1e-6)
            wanted = {"micro_batch", "global_batch", "z"} if module.overrides else set()
            assert set(of_case["aux"]) == wanted and all(aux > 0 for aux in of_case["aux"].values())
        name = "blocks.0.router.weight"
        assert worst({name: result["sum-aux"]["grads"][0][name]}, {name: result["sum"]["grads"][0][name]})[0] > 0.1


def test_random_numbers_are_keyed_by_the_place_in_one_process(results: list[dict[str, Any]]) -> None:
    """(seed, optimizer step, micro-batch), the same on any mesh."""
    for rank in range(WORLD):
        places = [(step, rank * ACCUMULATE + micro) for step in range(STEPS) for micro in range(ACCUMULATE)]
        assert results[rank]["sum"]["keys"] == [(SEED, *place) for place in places]
        assert results[rank]["mean"]["keys"] == [(0, *place) for place in places]


def test_ranks_see_different_data(results: list[dict[str, Any]]) -> None:
    """The sampler splits over all ranks, EP peers included."""
    rows = {tuple(row.tolist()) for result in results for x in result["mean"]["seen"] for row in x}
    assert len(rows) == len(dataset())


def test_weights_are_sharded(results: list[dict[str, Any]]) -> None:
    assert results[0]["mean"]["kinds"] == {"DTensor", "Parameter"}  # FSDP2 and experts; routers are replicated


def test_weights_that_were_saved_alone_are_validated_and_begun_with(results: list[dict[str, Any]]) -> None:
    for result in results:
        said, (saved, begun, trained) = result["alone"]
        assert (
            said.startswith("ckpt_path=") and "alone: holds weights alone (weights_only), and fit goes on with" in said
        )
        assert worst(begun, saved)[0] == 0.0 < worst(trained, saved)[0]


def test_ranks_predict_equally_many_batches(results: list[dict[str, Any]]) -> None:
    """The first sample is predicted twice, because every forward exchanges rows."""
    by_rank = [result["predicted"] for result in results]
    assert [[len(batch) for batch in batches] for batches in by_rank] == [[2, 1]] * WORLD
    got = torch.stack([torch.cat(batches) for batches in by_rank], 1).flatten(0, 1)
    with torch.no_grad():
        wanted = one_process([]).eval()(dataset().tensors[0][:5])
    torch.testing.assert_close(got, torch.cat((wanted, wanted[:1])))


def test_ranks_train_and_validate_equally_many_batches(results: list[dict[str, Any]]) -> None:
    """As many as the rank with the fewest has, three and one an epoch. It is said: once, or whenever a stream ends."""
    for result in results:
        assert result["uneven"] == {
            "of known length": (2 * 3, 2 * 1, 2), "streamed": (2 * 3, 2 * 1, 4), "one of each": (2 * 3, 2 * 1, 4),
            "by sampler": (2 * 3, 0, 2),  # Lightning validates after as many batches as it says
        }  # fmt: skip


def test_a_logged_sum_has_each_token_once(results: list[dict[str, Any]]) -> None:
    """Ranks of a TP group and of a pipeline log the same tokens; what is of a rank, such as its memory, is of every."""
    for result in results:
        sums = {axis: reduced.pop("sum") for axis, reduced in result["reduced"].items()}
        assert sums == {"ep": 10.0, "cp": 10.0, "tp": 5.0, "pp": 5.0}
        assert all(reduced == {"mean": 5.0, "max": 1.0} for reduced in result["reduced"].values())


@CASES
def test_checkpoint_restores_every_weight(results: list[dict[str, Any]], case: str) -> None:
    for result in results:
        assert worst(result[case]["restored"], result[case]["weights"])[0] == 0.0


@pytest.mark.parametrize("kind", [Moments, Manual])
def test_a_save_changes_nothing_before_the_first_step_either(results: list[dict[str, Any]], kind: type[Mean]) -> None:
    """It once made a step with zeros, which counted, and moved correction biases."""
    for result in results:
        without, *others = result["saves"][kind.__name__]
        for weights in others:
            assert worst(weights, without)[0] == 0.0


def test_groups_that_another_mesh_cuts_have_the_settings_of_their_weights(results: list[dict[str, Any]]) -> None:
    """Rates too, of schedulers in schedulers, one with a callable object."""
    for result in results:
        (saved, _, before), (same, rates, weights), (fewer, others, on_another) = result["meshes"]
        assert saved == same > fewer and rates == others and len(set(rates.values())) == 2
        assert worst(on_another, weights)[0] < 1e-5 < worst(before, weights)[0]


def test_groups_of_weights_that_had_several_settings_are_told(tmp_path: Path) -> None:
    weights = {nn.Parameter(torch.zeros(2)): name for name in "abc"}
    a, b, c = weights
    optimizer = torch.optim.SGD([{"params": [a, b]}, {"params": [c], "lr": 0.4}], lr=0.1)
    saved = [{"lr": 0.5, "momentum": 0.0}, {"lr": 0.25, "momentum": 0.0}]
    _set_by_weights(optimizer, saved, [["a", "b"], ["c"]], weights, tmp_path)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.25]
    _set_by_weights(optimizer, [*saved[::-1], saved[1]], [["a"], ["elsewhere"], ["b"]], weights, tmp_path)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]
    with pytest.raises(PlanError) as caught:
        _set_by_weights(optimizer, saved, [["a", "c"], ["b"]], weights, tmp_path)
    assert str(caught.value) == (
        f"ckpt_path={tmp_path}: weights of one parameter group of the optimizer had lr 0.5 and 0.25. "
        "Make groups of weights that had the same settings."
    )


def test_classes_beside_tensors_are_named_and_can_be_allowed(tmp_path: Path) -> None:
    torch.save({"epoch": 3, "hyper_parameters": {"root": PurePosixPath("/a")}}, tmp_path / LIGHTNING)
    with pytest.raises(PlanError) as caught:
        _beside_tensors(tmp_path)
    assert str(caught.value) == (
        f"ckpt_path={tmp_path}: lightning.pt needs pathlib.PurePosixPath (of save_hyperparameters, a callback or a "
        "scheduler), and a file cannot choose code. Allow it by torch.serialization.add_safe_globals([...]) before; or "
        "save numbers, texts, lists and dicts."
    )
    with torch.serialization.safe_globals([PurePosixPath]):
        assert _beside_tensors(tmp_path)["epoch"] == 3


def test_another_model_is_told_by_the_argument() -> None:
    with pytest.raises(PlanError, match=r"^ckpt_path=a: the checkpoint does not fit this run: model\.weight: missing"):
        reading_of(Path("a"), nn.Linear(1, 1), [], {"model.weight": torch.zeros(1)}, {}, key="ckpt_path")


@pytest.mark.parametrize(
    ("made", "more"), [(["a/other.txt"], ""), (["a/state.json"], "; it is of task=train, which reads it by"), ([], "")]
)
def test_what_no_trainer_saved_is_told(made: list[str], more: str, tmp_path: Path) -> None:
    for name in made:
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).touch()
    said = rf"^ckpt_path={tmp_path}/a: is not what a Trainer with ExpertParallelStrategy saved{more}"
    with pytest.raises(PlanError, match=said):
        load(tmp_path / "a", nn.Linear(1, 1), [])


def test_mistakes_are_told(results: list[dict[str, Any]]) -> None:
    assert results[0]["count"] == (
        "loss=sum: training_step must return {'loss': sum over tokens, 'num_tokens': their number}. "
        "Return both, or use loss='mean'."
    )
    assert results[0]["world"].startswith(
        "mesh=1 x 1: the plan is for 1 ranks, the Trainer has 2. Change mesh.num_nodes"
    )
    assert results[0]["plain"].startswith("model=Mean: holds 0 compiled models, one is needed. Call moecompile.compile")
    assert results[1]["table"].startswith(
        "embeddings.optimizer=lazy_adamw: 0.weight is stepped by rows, which SGD would not"
    )
    assert results[0]["average"].startswith("callbacks=StochasticWeightAveraging: averages a copy of the whole weights")
    assert results[0]["unfreeze"].startswith("callbacks=BackboneFinetuning: compares the values of weights when it")
    assert results[1]["second"] == (
        "model=Predicts: is split over ranks already, by another Trainer or by until='shard'. Use one Trainer for a "
        "module, also to validate, test and predict; or build the module again, and give what was saved as ckpt_path."
    )
    assert results[1]["no batch"] == (
        "dataloader=no batch: every forward exchanges rows with all ranks, and these have no data: 1. Give every rank a "
        "part of the data, or use fewer ranks."
    )
    assert results[0]["nan"].startswith("the loss or a gradient of step 1 is not finite. It began in ")
    assert results[1]["scaler"].startswith("precision=16-mixed: lets each rank decide by itself whether a step is")


def test_unknown_loss() -> None:
    with pytest.raises(ConfigError, match="loss=median: must be mean or sum"):
        moecompile.ExpertParallelStrategy(loss="median")


@pytest.mark.slow
def test_importing_after_lightning_registers_the_name() -> None:
    code = (
        "from lightning.pytorch import Trainer; import moecompile; "
        "print(type(Trainer(strategy='expert_parallel', accelerator='cpu', devices=2, logger=False).strategy).__name__)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.stdout.strip().endswith("ExpertParallelStrategy"), run.stderr


def test_registered() -> None:
    assert "expert_parallel" in lightning.pytorch.strategies.StrategyRegistry.available_strategies()
