"""`certify` passes on what is right, and catches each silent bug that is known from other systems."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from moecompile.compose import compose_config
from moecompile.schema import Config
from moecompile.tasks.verify import shrink
from moecompile.verify import Check, certify_config, worst
from moecompile.verify.checks import _rounding, compare
from moecompile.verify.job import Trace
from tests.distributed.harness import run_distributed_test
from tests.tiny import SHORT

SMALL = [
    "recipe=deepseek_ep", "model.config.num_hidden_layers=3", "model.config.hidden_size=32",
    "trainer.checkpointing=keep_exchanges",
    "model.config.intermediate_size=80", "data.vocab_size=300", "data.seq_len=16", "data.micro_batch_size=1",
    "data.global_batch_size=8", "verify.dtype=float64", SHORT,
]  # fmt: skip
AUX = ["balance.losses.micro_batch=0.01", "balance.losses.z=0.001"]

Patch = Callable[[pytest.MonkeyPatch], None]


def _is_expert(tensor: torch.Tensor | None) -> bool:
    return isinstance(tensor, DTensor) and "ep" in (tensor.device_mesh.mesh_dim_names or ())


def expert_gradients_times_ep(patch: pytest.MonkeyPatch) -> None:
    from moecompile.runtime import strategy

    right = strategy.divide

    def wrong(parameters: list[Any], divisor: Any) -> None:
        right(parameters, divisor)
        right([p for p in parameters if _is_expert(p.grad)], 1 / 4)

    patch.setattr(strategy, "divide", wrong)


def router_not_summed(patch: pytest.MonkeyPatch) -> None:
    from moecompile.runtime import strategy

    patch.setattr(strategy, "sum_replicated", lambda parameters, tokens: None)


def divided_by_own_tokens(patch: pytest.MonkeyPatch) -> None:
    from moecompile.runtime import strategy

    patch.setattr(strategy, "divide", lambda parameters, n, right=strategy.divide: right(parameters, n * 2))


def norm_of_one_rank(patch: pytest.MonkeyPatch) -> None:
    from moecompile.runtime import strategy

    def wrong(
        parameters: Any, max_norm: float, every: Any, right: Any = strategy.clip_by_global_norm, **settings: Any
    ) -> torch.Tensor:
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(dist, "get_world_size", lambda group=None: 1)
            return right(parameters, max_norm, every, **settings)

    patch.setattr(strategy, "clip_by_global_norm", wrong)


def loads_counted_twice(patch: pytest.MonkeyPatch) -> None:
    from moecompile.nn import meters_of
    from moecompile.runtime import strategy

    def wrong(model: Any, group: Any = None, right: Any = strategy.update_balance, **options: Any) -> Any:
        for _, meter in meters_of(model):
            meter.load.mul_(2)
        return right(model, group, **options)

    patch.setattr(strategy, "update_balance", wrong)


def loads_counted_again_in_recomputation(patch: pytest.MonkeyPatch) -> None:
    from moecompile.ops import tokens

    patch.setattr(tokens, "in_backward", lambda: False)


def loads_of_one_rank(patch: pytest.MonkeyPatch) -> None:
    from moecompile.runtime import strategy

    right = strategy.update_balance
    patch.setattr(strategy, "update_balance", lambda model, group=None, **options: right(model, **options))


def bias_not_moved(patch: pytest.MonkeyPatch) -> None:
    """Loads are counted, and no correction bias follows them."""
    from moecompile.runtime import strategy

    def wrong(model: Any, group: Any = None, *, right: Any = strategy.update_balance, **options: Any) -> Any:
        return right(model, group, **{**options, "move": False})

    patch.setattr(strategy, "update_balance", wrong)


def same_batch_on_peers(patch: pytest.MonkeyPatch) -> None:
    from moecompile.verify import ranks

    right = ranks.train_loader
    patch.setattr(ranks, "train_loader", lambda *args, rank, **kwargs: right(*args, rank=rank // 2, **kwargs))


def experts_swapped(patch: pytest.MonkeyPatch) -> None:
    _local_experts(patch, lambda local: local.flip(0))


def experts_of_rank_0_everywhere(patch: pytest.MonkeyPatch) -> None:
    def broadcast(local: torch.Tensor) -> torch.Tensor:
        copy = local.detach().clone()
        dist.broadcast(copy, src=0)
        return copy

    _local_experts(patch, broadcast)


def experts_lost_in_checkpoint(patch: pytest.MonkeyPatch) -> None:
    from moecompile.runtime.strategy import ExpertParallelStrategy

    right = ExpertParallelStrategy.save_checkpoint

    def wrong(self: Any, checkpoint: Any, filepath: Any, storage_options: Any = None) -> None:
        if dist.get_rank() == 1:
            with torch.no_grad():
                for parameter in filter(_is_expert, self.model.parameters()):
                    parameter.to_local().zero_()
        right(self, checkpoint, filepath, storage_options)

    patch.setattr(ExpertParallelStrategy, "save_checkpoint", wrong)


def experts_of_rank_0_in_checkpoint(patch: pytest.MonkeyPatch) -> None:
    from moecompile.runtime.strategy import ExpertParallelStrategy

    right = ExpertParallelStrategy.save_checkpoint

    def wrong(self: Any, checkpoint: Any, filepath: Any, storage_options: Any = None) -> None:
        with torch.no_grad():
            for parameter in filter(_is_expert, self.model.parameters()):
                dist.broadcast(parameter.to_local(), src=0)
        right(self, checkpoint, filepath, storage_options)

    patch.setattr(ExpertParallelStrategy, "save_checkpoint", wrong)


def moments_lost_in_checkpoint(patch: pytest.MonkeyPatch) -> None:
    """A rank saves zeros for the optimizer's moments of its experts."""
    from moecompile.runtime.strategy import ExpertParallelStrategy

    right = ExpertParallelStrategy.save_checkpoint

    def wrong(self: Any, checkpoint: Any, filepath: Any, storage_options: Any = None) -> None:
        if dist.get_rank() == 1:
            for state in self.optimizers[0].state.values():
                if _is_expert(state["exp_avg"]):
                    state["exp_avg"].to_local().zero_()
        right(self, checkpoint, filepath, storage_options)

    patch.setattr(ExpertParallelStrategy, "save_checkpoint", wrong)


def moments_of_experts_not_loaded(patch: pytest.MonkeyPatch) -> None:
    from moecompile.runtime import converted

    right = converted.read_tensors

    def wrong(folder: Path, entries: dict[str, torch.Tensor], **options: Any) -> None:
        of_experts = {name for name in entries if name.startswith("optimizer.") and ".experts." in name}
        right(folder, {name: entry for name, entry in entries.items() if name not in of_experts}, **options)

    patch.setattr(converted, "read_tensors", wrong)


def idle_experts_without_gradient(patch: pytest.MonkeyPatch) -> None:
    from moecompile.runtime import strategy

    calls = iter(range(10))

    def wrong(parameters: list[Any], divisor: Any, right: Any = strategy.divide) -> None:
        right(parameters, divisor)
        if next(calls) == 0:
            next(p for p in parameters if _is_expert(p.grad)).grad = None

    patch.setattr(strategy, "divide", wrong)


def aux_loss_not_flowing(patch: pytest.MonkeyPatch) -> None:
    from moecompile.runtime import strategy

    patch.setattr(strategy, "auxiliary_loss", lambda model: None)


def aux_loss_times_ep(patch: pytest.MonkeyPatch) -> None:
    from moecompile.runtime import strategy

    patch.setattr(strategy, "auxiliary_loss", lambda model, right=strategy.auxiliary_loss: 4 * right(model))


def muon_of_a_shard(patch: pytest.MonkeyPatch) -> None:
    """Each rank orthogonalizes what it has of a matrix."""
    from moecompile.runtime import muon

    patch.setattr(muon, "cuts_of", lambda parameter, is_stack: ())


def groups_forgotten(patch: pytest.MonkeyPatch) -> None:
    from moecompile.runtime import module

    def wrong(model: Any, config: Any, right: Any = module.make_optimizer) -> Any:
        return right(model, replace(config, groups=[]))

    patch.setattr(module, "make_optimizer", wrong)


def _local_experts(patch: pytest.MonkeyPatch, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Shards of experts are changed after they were cut."""
    from moecompile.passes import shard

    right, from_local = shard._shard_experts, DTensor.from_local

    def wrong(*args: Any) -> None:
        with pytest.MonkeyPatch.context() as cut:
            cut.setattr(DTensor, "from_local", lambda local, *rest, **named: from_local(change(local), *rest, **named))
            right(*args)

    patch.setattr(shard, "_shard_experts", wrong)


# mutation -> part of the name of a check that has to fail; docs/understand/bugs-of-others.md names them
MUTATIONS: dict[Patch, str] = {
    expert_gradients_times_ep: "gradients of experts",
    router_not_summed: "gradients of router",
    divided_by_own_tokens: "gradients of dense",
    norm_of_one_rank: "gradient norm",
    loads_counted_twice: "loads",
    loads_counted_again_in_recomputation: "loads",
    loads_of_one_rank: "loads",
    bias_not_moved: "correction bias",
    same_batch_on_peers: "micro-batches",
    experts_swapped: "outputs",
    experts_of_rank_0_everywhere: "outputs",
    experts_lost_in_checkpoint: "checkpoint round trip",
    experts_of_rank_0_in_checkpoint: "checkpoint round trip",
    moments_lost_in_checkpoint: "checkpoint round trip",
    moments_of_experts_not_loaded: "checkpoint round trip",
    idle_experts_without_gradient: "gradients on one side only",
    aux_loss_not_flowing: "gradients of router",
    aux_loss_times_ep: "gradients of router",
    muon_of_a_shard: "weights after",
    groups_forgotten: "weights after",
}
_MUON = ["optimizer=muon"]
_WITHIN = [
    "mesh.ep=2",
    "dispatch=dedup",
    "experts.num_routed=6",
    "experts.init=random",
    "routing.top_k=2",
]  # 3 experts over 2 ranks
_GROUPS = ['optimizer.groups=[{match: "*norm*", lr_scale: 0.5}]']
OPTIONS: dict[Patch, list[str]] = {
    muon_of_a_shard: _MUON,
    groups_forgotten: _GROUPS,
}
"""What the config has beside AUX, for some mutations."""


def _config(overrides: list[str]) -> Config:
    return shrink(compose_config([*SMALL, *overrides]), steps=2)[0]


def _all(rank: int, world_size: int, folder: Path) -> dict[str, list[Check]]:
    found = {"right": _certified(folder / "right", _GROUPS)}
    found["right optimizers"] = _certified(folder / "right optimizers", [*_MUON, *_GROUPS, *_WITHIN])
    for mutation in MUTATIONS:
        with pytest.MonkeyPatch.context() as patch:
            mutation(patch)
            found[mutation.__name__] = _certified(folder / mutation.__name__, OPTIONS.get(mutation, []))
    return found


def _certified(folder: Path, options: Sequence[str] = ()) -> list[Check]:
    folder.mkdir(exist_ok=True)
    return certify_config(_config([*AUX, *options]), folder)[0]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Check]]:
    """The checks of rank 0, all mutations in one launch."""
    return run_distributed_test(_all, 4, tmp_path_factory.mktemp("verify"), timeout_s=500)[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["right", "right optimizers"])
def test_right_passes(found: dict[str, list[Check]], name: str) -> None:
    assert [check for check in found[name] if not check.passed] == []
    assert len(found[name]) > 12


@pytest.mark.slow
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_mutation_is_caught(mutation: Patch, found: dict[str, list[Check]]) -> None:
    failed = [check.name for check in found[mutation.__name__] if not check.passed]
    assert any(MUTATIONS[mutation] in name for name in failed), failed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mutation", "text"),
    [
        (expert_gradients_times_ep, "4 x on `ep`: summed twice, or not averaged"),
        (router_not_summed, "each rank has its own on `dp_shard`: not summed"),
        (divided_by_own_tokens, "0.5 x"),
        (experts_of_rank_0_everywhere, "entries of weights that no rank has"),
    ],
)
def test_what_is_wrong_is_explained(mutation: Patch, text: str, found: dict[str, list[Check]]) -> None:
    failed = [f"{check.name} {check.where}" for check in found[mutation.__name__] if not check.passed]
    assert any(text in told for told in failed), failed


# FFNs that lie in the layer itself (OPT) or in two modules of it (BERT): the layer is the region, which FSDP2 wraps.
LAYERS = {
    "opt": {"ffn_dim": 64, "max_position_embeddings": 64, "word_embed_proj_dim": 32, "dropout": 0.0},
    "bert": {
        "intermediate_size": 64, "max_position_embeddings": 64, "is_decoder": True, "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    },
}  # fmt: skip


def _of_layers(rank: int, world_size: int, folder: Path) -> dict[str, list[Check]]:
    found = {}
    for architecture, settings in LAYERS.items():
        overrides = ["mesh=cpu_1x2", "data.vocab_size=300", "data.seq_len=16", "data.global_batch_size=8", SHORT]
        config = compose_config([*overrides, "data.micro_batch_size=1", "verify.dtype=float64"])
        config.model.architecture = architecture
        config.model.config = {
            "vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, **settings
        }  # fmt: skip
        (folder / architecture).mkdir(exist_ok=True)
        found[architecture] = certify_config(shrink(config, steps=2)[0], folder / architecture)[0]
    return found


@pytest.mark.slow
def test_layers_that_are_regions(tmp_path: Path) -> None:
    for checks in run_distributed_test(_of_layers, 2, tmp_path, timeout_s=200)[0].values():
        assert [check for check in checks if not check.passed] == []
        (noise,) = [check for check in checks if check.name == "float64: gradients of rounding alone"]
        assert "bias" in noise.where  # of the keys


def test_only_what_is_rounding_on_both_sides_is_not_compared() -> None:
    def side(**grads: float) -> Any:
        return SimpleNamespace(grads={name: torch.tensor([value]) for name, value in grads.items()})

    wanted = side(large=1.0, noise=1e-16, lost=1e-16, zero=0.0, small=1e-9)
    got = side(large=1.0, noise=-3e-16, lost=0.5, zero=0.0, small=1e-9)
    assert _rounding(got, wanted, torch.float64) == {"noise"}


def test_a_nan_is_an_error_wherever_it_stands() -> None:
    """`max` over (nan, name) keeps what came before; a checkpoint's entries that were not loaded are NaN."""
    zero, lost = torch.zeros(1), torch.tensor([float("nan")])
    assert worst({"a": zero, "b": lost, "c": zero}, {"a": zero, "b": zero, "c": zero}) == (float("inf"), "b")


def one_step(error: float) -> Trace:
    """A step whose numbers are off by `error`, relative."""
    weight = torch.ones(4) * (1 + error)
    return Trace(
        losses=[2.0], norms=[3.0 * (1 + error)], outputs=[weight], grads={"dense": weight}, weights={"dense": weight},
        saved={"dense": weight}, restored={"dense": weight}, held={"dense": weight.double().unsqueeze(0)},
    )  # fmt: skip


def test_experts_without_a_token_are_said() -> None:
    """Expert 2 of the second layer has none in any of two steps."""
    side = replace(one_step(0.0), losses=[2.0, 2.0], norms=[3.0, 3.0])
    side.loads = [torch.tensor(load) for load in ([0, 5, 1], [3, 3, 0], [2, 4, 0], [6, 0, 0])]
    (said,) = [check for check in compare(side, side, torch.float64) if "no token chose" in check.name]
    assert said.passed and said.error == 1 and said.where.startswith("expert 2 of MoE layer 1: its gradients are zero")


@pytest.mark.parametrize(
    ("rounding", "error", "passes"), [(0.0, 1e-4, False), (3e-5, 1e-4, True), (3e-5, 3e-4, False), (0.5, 2e-3, False)]
)
def test_float32_may_differ_by_what_this_processor_rounds(rounding: float, error: float, passes: bool) -> None:
    """A processor that rounds badly is not a bug, and hides none that matters."""
    exact, wanted = one_step(0.0), one_step(rounding)
    got = one_step(rounding + error)
    failed = {check.name for check in compare(got, wanted, torch.float32, exact) if not check.passed}
    about = {"float32: outputs", "float32: gradients of dense", "float32: gradient norm"}
    assert failed == (set() if passes else about)
