"""A rehearsed rank sends and holds what its plan says, and what a rank that trains does."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from moecompile.compose import compose_config
from moecompile.errors import ConfigError
from moecompile.models.build import build_model, example_inputs
from moecompile.passes import shard as sharding
from moecompile.pipeline import compile_model
from moecompile.pipeline.captured import planning_facts
from moecompile.plan import Plan
from moecompile.planner import ModelFacts
from moecompile.planner.build_plan import run_facts
from moecompile.planner.params import RunFacts, checkpointing_of
from moecompile.planner.pipeline import ranks_of
from moecompile.planner.step import ROWS, planned_step, rehearsed_run
from moecompile.report.rehearsal import Row, conclusion
from moecompile.runtime.module import LanguageModule
from moecompile.runtime.rehearsal import BATCH, Moments, Rehearsal, Watch, seen_of
from moecompile.runtime.training import make_trainer
from moecompile.schema import Config, accumulation_steps
from moecompile.tasks import rehearse as task
from moecompile.tasks.plan import planned
from moecompile.tasks.ranks.rehearse import micro_batches, rehearsed, shortened, structure_of
from tests import forked
from tests.distributed.harness import run_distributed_test

TINY = [
    "recipe=deepseek_ep", "model.config.num_hidden_layers=3", "data.seq_len=64", "data.micro_batch_size=2",
    "data.global_batch_size=16", "trainer.progress_bar=false",
]  # fmt: skip


SIZES = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 64, "moe_intermediate_size": 32, "num_hidden_layers": 2,
    "first_k_dense_replace": 1, "num_attention_heads": 4, "num_key_value_heads": 4, "n_routed_experts": 512,
    "n_group": 4, "topk_group": 2, "q_lora_rank": 32, "kv_lora_rank": 16,
}  # fmt: skip
NARROW = [  # bf16
    "model=deepseek_v3", *(f"model.config.{name}={size}" for name, size in SIZES.items()), "hardware=laptop",
    "data.seq_len=64", "data.micro_batch_size=2", "data.global_batch_size=16", "mesh=cpu_1x4",
]  # fmt: skip


@contextmanager
def no_group() -> Iterator[None]:
    """What a rehearsal does to its process is undone."""
    with mock.patch.object(dist, "broadcast_object_list"):
        try:
            yield
        finally:
            dist.destroy_process_group()


def described(overrides: list[str], base: list[str] = TINY) -> tuple[Config, Plan, ModelFacts, RunFacts]:
    config = compose_config([*base, *overrides])
    model = structure_of(config)
    plan = planned(model, config, None).plan
    _, facts = planning_facts(model, config, example_inputs(model, config.data.seq_len), plan)
    return (
        config,
        plan,
        facts,
        rehearsed_run(
            run_facts(config, plan.mesh, facts), plan, checkpointing_of(config, plan), micro_batches(config, plan), 1.0
        ),
    )


def rows_of(seen: Rehearsal, plan: Plan, facts: ModelFacts, run: RunFacts) -> list[Row]:
    found = dataclasses.asdict(seen)
    collectives = task.collective_rows(found["seen"]["sent"], planned_step(plan, facts, run), plan.mesh)
    (of,) = ranks_of(plan, facts)
    return [*task.memory_rows(found, of, run), *collectives]


@pytest.mark.slow
def test_large_layers_reduced_one_by_one_and_freed_after_the_step(tmp_path: Path) -> None:
    """Experts of six layers without copies on other ranks: 14% too high, where all shards were counted beside each layer."""
    words = [
        "model=deepseek_v3", "model.config.num_hidden_layers=6", "mesh=h100_8", "data.micro_batch_size=2",
        "data.global_batch_size=16", "trainer.precision=bf16_params", "dispatch=dedup", "trainer.progress_bar=false",
    ]  # fmt: skip
    config, plan, facts, run = described(words, base=[])
    with no_group():
        seen = rehearsed(config, plan, 0, 1.0, tmp_path)
    (peak,) = (row for row in rows_of(seen, plan, facts, run) if row.name == "peak")
    assert 0.9 < peak.seen / peak.planned < 1.02
    end = seen.seen.moments[-1].end  # of the step: no gradients
    assert end == pytest.approx(seen.weights - seen.gathered + seen.optimizer, rel=0.01)


def test_a_rank_sends_and_holds_what_the_plan_says(tmp_path: Path) -> None:
    config, plan, facts, run = described(["dispatch=dedup"])
    with no_group():
        first = rehearsed(config, plan, 0, 1.0, tmp_path)
    with no_group():
        last = rehearsed(config, plan, 3, 1.0, tmp_path)
    rows = rows_of(first, plan, facts, run)
    assert [row.text for row in rows if row.differs] == []
    exact = {row.name: row.seen / row.planned for row in rows if row.planned and row.axis and row.axis != "all"}
    assert exact.pop("gradients summed") == pytest.approx(1, abs=0.15)
    assert exact == {name: pytest.approx(1, abs=0.002) for name in exact} and len(exact) == 4
    assert [each.name for each in first.seen.moments] == [
        "forward 1", "backward 1", "forward 2", "backward 2", "optimizer step",
    ]  # fmt: skip
    pair = [dataclasses.asdict(each) for each in (first, last)]
    assert [*task.first_differences(pair, plan)] == []
    pair[1]["seen"]["sent"][3]["bytes"] += 1
    (text,) = task.first_differences(pair, plan)
    assert text.startswith("collective 3 is exchange_counts over ") and text.endswith(", 65 B on rank 3")


def test_routers_that_are_wider_than_the_model_are_whole_on_every_rank(tmp_path: Path) -> None:
    """As those of DeepSeek-V3 in bf16, which transformers keeps in fp32."""
    config, plan, facts, run = described([], base=NARROW)
    assert facts.apart == 512 * 64
    with no_group():
        rows = rows_of(rehearsed(config, plan, 0, 1.0, tmp_path), plan, facts, run)
    (summed,) = (row for row in rows if row.name == "gradients summed")
    assert summed.seen == pytest.approx(512 * 64 * 4 + 512 * 8, rel=0.01)
    assert [row.text for row in rows if row.differs and row.axis] == []
    memory = {row.name: row.seen / row.planned for row in rows if row.planned and not row.axis}
    assert [memory[name] for name in ("weights", "gradients", "optimizer")] == [pytest.approx(1, abs=0.003)] * 3


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_optimizer_of_bf16_weights_is_bf16(optimizer: str, tmp_path: Path) -> None:
    """Only that of the routers is not, which are fp32 and never Muon's."""
    config, plan, facts, run = described([f"optimizer={optimizer}"], base=NARROW)
    with no_group():
        rows = rows_of(rehearsed(config, plan, 0, 1.0, tmp_path), plan, facts, run)
    (state,) = (row for row in rows if row.name == "optimizer")
    assert state.seen == pytest.approx(state.planned, rel=0.001)


@pytest.mark.slow
def test_gradients_that_are_reduced_each_time_have_a_buffer_and_sums_beside_them(tmp_path: Path) -> None:
    """bf16 shards beside their sums, and FSDP's fp32 buffer: the peak is where the layers are large."""
    sizes = ["n_routed_experts=64", "moe_intermediate_size=256", "hidden_size=128", "num_hidden_layers=6"]
    changes = [*(f"model.config.{each}" for each in sizes), "trainer.reduce=each", "trainer.gather=layer"]
    config, plan, facts, run = described([*changes, "data.seq_len=16"], base=NARROW)
    with no_group():
        rows = rows_of(rehearsed(config, plan, 0, 1.0, tmp_path), plan, facts, run)
    (peak,) = (row for row in rows if row.name == "peak")
    assert peak.seen == pytest.approx(peak.planned, rel=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("gather", ["layer", "step"])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_what_replicas_sum_in_fp32_stays_until_the_end_of_a_backward(
    gather: str, accumulation: int, tmp_path: Path
) -> None:
    """FSDP2 keeps it beside the bf16 shards that it is cast to; a quarter too low without."""
    sizes = ["n_routed_experts=32", "moe_intermediate_size=256", "hidden_size=128", "num_hidden_layers=6"]
    changes = [*(f"model.config.{each}" for each in sizes), f"trainer.gather={gather}", "trainer.reduce=last"]
    batch = [f"data.global_batch_size={4 * accumulation}", "data.micro_batch_size=1", "data.seq_len=16"]
    mesh = ["mesh=cpu_2x2", "mesh.dp_replicate=2", "mesh.ep=2", f"rehearse.micro_batches={accumulation}"]
    config, plan, facts, run = described([*changes, *mesh, *batch], base=NARROW)
    with no_group():
        rows = rows_of(rehearsed(config, plan, 0, 1.0, tmp_path), plan, facts, run)
    (peak,) = (row for row in rows if row.name == "peak")
    assert peak.seen == pytest.approx(peak.planned, rel=0.03)


WORDS = {
    "qwen3_30b_a3b": {"num_experts": 16, "num_key_value_heads": 2, "moe_intermediate_size": 64, "head_dim": 16},
    "gpt_oss_20b": {"num_local_experts": 16, "num_key_value_heads": 2, "intermediate_size": 64, "head_dim": 16},
    "mixtral_8x7b": {"num_key_value_heads": 2, "intermediate_size": 64},
    "deepseek_v3": {**SIZES, "n_routed_experts": 16},
}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("model", WORDS)
def test_the_loss_over_many_words_is_in_fp32(model: str, dtype: str, tmp_path: Path) -> None:
    """Logits are upcast."""
    sizes = WORDS[model] | {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "vocab_size": 8192}
    base = [f"model={model}", *(f"model.config.{name}={size}" for name, size in sizes.items()), *NARROW[-5:]]
    config, plan, facts, run = described([f"model.config.dtype={dtype}", "data.seq_len=128"], base=base)
    with no_group():
        rows = rows_of(rehearsed(config, plan, 0, 1.0, tmp_path), plan, facts, run)
    (peak,) = (row for row in rows if row.name == "peak")
    assert peak.seen == pytest.approx(peak.planned, rel=0.04)


MANY = {
    "its own shared experts": (NARROW, ["mesh.num_nodes=16", "data.global_batch_size=256"]),
    "a shared gate, a latent width": (
        TINY,
        ["mesh.num_nodes=12", "mesh.ep=4", "data.global_batch_size=96", "experts.shared_gate=true",
         "experts.latent_size=40", "experts.latent_norm=true"],
    ),
    "experts beside dense weights": (TINY, ["mesh.num_nodes=12", "mesh.ep=1", "data.global_batch_size=96"]),
    "tp": (TINY, ["mesh.num_nodes=12", "mesh.ep=4", "mesh.tp=2", "dispatch=flat", "data.global_batch_size=96"]),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", MANY)
def test_rows_that_are_filled_up_are_planned(kind: str, tmp_path: Path) -> None:
    """On 24 or 64 ranks, few of these weights have rows that the ranks divide."""
    base, overrides = MANY[kind]
    config, plan, facts, run = described(overrides, base=base)
    with no_group():
        rows = rows_of(rehearsed(config, plan, 0, 1.0, tmp_path), plan, facts, run)
    found = {(row.name, row.axis): row.seen / row.planned for row in rows if row.planned and "summed" not in row.name}
    sent = [found[name, "dp_shard"] for name in ("weights gathered", "gradients reduced") if kind != "tp"]
    assert sent == [pytest.approx(1, abs=0.001)] * len(sent)
    memory = [found[name, ""] for name in ("weights", "gradients", "optimizer")]
    assert memory == [pytest.approx(1, abs=0.012)] * 3


def test_shards_that_are_cut_unevenly_are_found(tmp_path: Path) -> None:
    """A rank of two that share one expert would have all of it, and gathers would be twice as large."""
    overrides = [
        "dispatch=flat", "mesh.ranks_per_node=4", "mesh.ep=4", "experts.num_routed=4", "routing.groups=1",
        "routing.top_groups=1", "routing.max_nodes=null", "data.global_batch_size=32",
    ]  # fmt: skip
    config, plan, facts, run = described(overrides)
    with no_group():
        even = rows_of(rehearsed(config, plan, 0, 1.0, tmp_path), plan, facts, run)
    assert [row.text for row in even if row.differs] == []
    uneven = mock.patch.multiple(sharding, cut_dim=lambda shape, ranks: 0, check_even=lambda model, plan: None)
    with uneven, no_group():
        found = rows_of(rehearsed(config, plan, 0, 1.0, tmp_path), plan, facts, run)
    texts = [row.text for row in found if row.differs]
    assert [text.partition(":")[0] for text in texts] == ["weights gathered over edp", "gradients reduced over edp"]
    assert conclusion(texts).startswith("rehearsed: the program differs from the plan: weights gathered over edp: ")


@pytest.mark.parametrize("given", [[], ["data.global_batch_size=16", "trainer.reduce=each", "trainer.gather=layer"]])
def test_weights_are_freed_before_the_gradients_of_many_words_are_reduced(given: list[str], tmp_path: Path) -> None:
    base = [
        "model=deepseek_nano", "mesh=cpu_1x4", "model.config.num_hidden_layers=2", "model.config.vocab_size=16384",
        "data.vocab_size=300", "data.seq_len=32", "data.micro_batch_size=2", "data.global_batch_size=8",
        "trainer.progress_bar=false",
    ]  # fmt: skip
    config, plan, facts, run = described(given, base=base)
    with no_group():
        rows = rows_of(rehearsed(config, plan, 0, 1.0, tmp_path), plan, facts, run)
    (peak,) = (row for row in rows if row.name == "peak")
    assert peak.seen == pytest.approx(peak.planned, rel=0.07)  # a third apart if these counted


QWEN = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 16384, "moe_intermediate_size": 32, "num_experts": 16,
    "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 16,
}  # fmt: skip


@pytest.mark.parametrize("dense", [0, 1, 3])
def test_the_largest_layer_is_whole(dense: int, tmp_path: Path) -> None:
    """Not the mean of all: a dense layer here has 36 times the weights of the others without their experts."""
    base = [
        "model=qwen3_30b_a3b", *(f"model.config.{name}={size}" for name, size in QWEN.items()), *NARROW[-5:],
        f"+model.config.mlp_only_layers=[{dense}]", "data.seq_len=16", "trainer.gather=layer", "trainer.reduce=each",
    ]  # fmt: skip
    config, plan, facts, run = described([], base=base)
    with no_group():
        rows = rows_of(rehearsed(config, plan, 0, 1.0, tmp_path), plan, facts, run)
    found = {row.name: row.seen / row.planned for row in rows if row.planned and not row.axis}
    assert found["weights"] == pytest.approx(1, abs=0.002) and found["peak"] == pytest.approx(1, abs=0.02)


def test_what_a_gpu_makes_inside_of_experts_is_held(tmp_path: Path) -> None:
    wide = ["model.config.moe_intermediate_size=1024", "model.config.n_routed_experts=32", "data.seq_len=256"]
    found = {}
    for device in ("cpu", "cuda"):
        config, plan, facts, run = described([*wide, "dispatch=dedup", f"mesh.device={device}"], base=NARROW)
        with no_group():
            rows = rows_of(rehearsed(config, plan, 0, 1.0, tmp_path / device), plan, facts, run)
        (peak,) = (row for row in rows if row.name == "peak")
        assert peak.seen == pytest.approx(peak.planned, rel=0.06)
        found[device] = peak.seen
    assert found["cuda"] > 1.3 * found["cpu"]


def test_a_full_rank_receives_more(tmp_path: Path) -> None:
    config, plan, facts, run = described(["dispatch=hierarchical"])
    with no_group():
        seen = rehearsed(config, plan, 0, 1.5, tmp_path)
    rows = rows_of(seen, plan, facts, dataclasses.replace(run, row_load=1.5))
    assert [row.text for row in rows if row.differs] == []
    even = {row.axis: row.planned for row in rows_of(seen, plan, facts, run) if row.name == ROWS}
    full = {row.axis: row.seen for row in rows if row.name == ROWS}
    assert full["ep_inter"] == pytest.approx(even["ep_inter"], rel=0.01)
    assert full["ep_intra"] == pytest.approx(1.25 * even["ep_intra"], rel=0.02)  # half of it is sent by full ranks


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["trainer.compile=regions"],
            "trainer.compile=regions: cannot be rehearsed: a compiler makes other tensors than the program. Use none for "
            "task=rehearse.",
        ),
        (
            ["dispatch=dedup", "dispatch.balance=lend", "hardware.tflops=1e-9"],
            "dispatch.balance=lend: cannot be rehearsed: values decide which experts are lent. Use none for task=rehearse.",
        ),
    ],
)  # fmt: skip
def test_what_is_not_covered_is_refused(overrides: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        task.run(compose_config(["task=rehearse", *TINY, *overrides]), tmp_path)
    assert str(caught.value) == message
    assert not any(tmp_path.iterdir())


# -- beside ranks that train ------------------------------------------------------------------------------------------

# A router that upcycling starts from virtual groups sends fewer rows than any other.
BESIDE = [*TINY, "experts.init=random"]
KINDS = {
    "flat": ["dispatch=flat"],
    "dedup": ["dispatch=dedup", "trainer.checkpointing=keep_exchanges"],
    "hierarchical": ["dispatch=hierarchical", "trainer.reduce=each", "trainer.gather=layer"],
    "allgather": ["dispatch=allgather", "trainer.gather=layer"],
    "chunks": ["dispatch=dedup", "dispatch.overlap=chunks", "dispatch.chunks=2"],
    "shared experts": ["mesh.ep=2", "dispatch=dedup", "trainer.checkpointing=full", "optimizer=muon"],
}


def trained(rank: int, world_size: int, folder: str) -> dict[str, Rehearsal]:
    """What a watch sees of a rank that trains."""
    return {name: _trained(compose_config([*BESIDE, *overrides]), Path(folder)) for name, overrides in KINDS.items()}


def _trained(config: Config, folder: Path) -> Rehearsal:
    model = build_model(config.model, config.seed)
    plan = planned(model, config, None).plan  # the rest refers to layers of other stages
    compile_model(model, config, example=example_inputs(model, config.data.seq_len), plan=plan)
    config, watch = shortened(config, plan), Watch()
    trainer = make_trainer(config, plan, folder, [Moments(watch)], loggers=[])
    module = LanguageModule(model, config.optimizer, config.trainer.max_steps)
    generator = torch.Generator().manual_seed(
        plan.mesh.batch_index(dist.get_rank())
    )  # routes, and so rows, are the same in each run
    tokens = torch.randint(0, 512, (accumulation_steps(config, plan.mesh), 2, 64), generator=generator)
    batches = [dict.fromkeys(BATCH, each) for each in tokens]
    loader = torch.utils.data.DataLoader(batches, batch_size=None)
    with watch:
        trainer.fit(module, loader)
        return seen_of(trainer, watch, dist.get_rank())


def trained_by(overrides: list[str], folder: Path) -> dict[str, Any]:
    """What a watch sees of this rank, as a rehearsal writes it."""
    found: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(_trained(compose_config(overrides), folder))))
    return found


def _rehearsals(sender: Any, folder: str) -> None:
    found = {}
    for name, overrides in KINDS.items():
        config, plan, _, _ = described(["experts.init=random", *overrides])
        found[name] = rehearsed(config, plan, 0, 1.0, Path(folder))
        dist.destroy_process_group()
    sender.send(found)


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict[str, Rehearsal]], dict[str, Rehearsal]]:
    folder = str(tmp_path_factory.mktemp("ranks"))
    ranks = run_distributed_test(trained, 4, folder, timeout_s=240)
    receiver, sender = forked.context.Pipe(duplex=False)
    process = forked.context.Process(target=_rehearsals, args=(sender, folder), daemon=True)
    forked.start(process)
    sender.close()
    found = receiver.recv()
    process.join()
    return ranks, found


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_it_does_what_four_ranks_do(both: Any, kind: str) -> None:
    """The same collectives in the same order over the same axes. Bytes are equal where they do not depend on routing,
    and within 10% of all ranks' where they do.
    """
    ranks, found = both
    ours = found[kind]

    def form(seen: Rehearsal, *, bytes_too: bool) -> list[tuple[Any, ...]]:
        return [
            (s.moment, s.op, s.axis, s.ranks, s.bytes if bytes_too and _fixed(s.op) else None)
            for s in seen.seen.sent if s.op != "broadcast"
        ]  # fmt: skip

    for each in ranks:
        assert form(each[kind], bytes_too=True) == form(ours, bytes_too=True)
    assert _rows(ours) == pytest.approx(sum(_rows(each[kind]) for each in ranks) / len(ranks), rel=0.1)


def _fixed(op: str) -> bool:
    return task.KINDS.get(op) != ROWS and not op.startswith("alltoall")


def _rows(seen: Rehearsal) -> int:
    return sum(each.bytes for each in seen.seen.sent if task.KINDS.get(each.op) == ROWS)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_it_holds_what_four_ranks_hold(both: Any, kind: str) -> None:
    """A rank has more where more rows come to it; the mean over ranks is that of a balanced load."""
    ranks, found = both
    ours = found[kind]
    for each in ranks:
        assert each[kind].weights == pytest.approx(ours.weights, rel=0.001)  # a few numbers of Lightning
        assert each[kind].optimizer == ours.optimizer
    peaks = [_peak(each[kind]) / _peak(ours) for each in ranks]
    assert sum(peaks) / len(peaks) == pytest.approx(1, abs=0.02) and max(peaks) < 1.05


def _peak(seen: Rehearsal) -> int:
    return max(moment.peak for moment in seen.seen.moments)
