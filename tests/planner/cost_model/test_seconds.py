"""Counts by hand, and what must hold of seconds whatever the constants are."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path

import pytest
import yaml

from benchmarks.forecast.families import shape_of
from benchmarks.forecast.fit import fit
from moecompile.compose import compose_config, conf_dir
from moecompile.errors import ConfigError
from moecompile.planner.cost_model.constants import CALIBRATION, CONSTANTS, PRIORS, calibrated, checked
from moecompile.planner.cost_model.counts import count
from moecompile.planner.cost_model.forecast import Keys, alternatives_of, forecast, step_of, synthetic
from moecompile.planner.cost_model.inputs import Inputs, Layout, Machine, Software, machine_of, software_of
from moecompile.planner.cost_model.seconds import step_seconds
from moecompile.planner.cost_model.shapes import with_share
from moecompile.planner.pipeline import counts_of
from moecompile.stages import Pipeline, Stage, Unit

MODEL = shape_of(
    "tiny", {"layers": 4, "hidden": 1024, "vocab": 1000, "heads": 8, "kv": 8, "moe_ffn": 512, "experts": 16, "topk": 2}
)
LAYOUT = Layout(gpus=16, seq=2048, global_batch=64, ep=16, micro_batch=1, zero=1)
H100 = machine_of(compose_config(["hardware=h100"]).hardware)


def seconds(
    machine: Machine = H100, layout: Layout = LAYOUT, software: Software | None = None, load: float = 1.0
) -> float:
    software = software or Software()
    return sum(
        step_seconds(count(MODEL, layout, machine, software), machine, software, PRIORS, layout.gpus, load).values()
    )


def test_counts_of_a_layer_by_hand() -> None:
    counts = count(MODEL, LAYOUT, H100, Software())
    tokens, d, f, e, k = 2048, 1024, 512, 16, 2
    attention = 4 * d * d
    assert counts.body.dense == 4 * 2 * 3 * tokens * attention
    assert counts.body.narrow == 4 * 2 * 3 * tokens * e * d  # routers
    assert counts.head.narrow == 2 * 3 * tokens * 1000 * d
    assert counts.body.grouped == 4 * 2 * 3 * tokens * k * 3 * d * f
    assert counts.body.groups == 4 * 1 * 6  # one local expert, two products, three passes
    assert counts.body.core == pytest.approx(4 * (1 + 2.5) * tokens * 2 * 8 * (128 + 128) * (2048 + 1) / 2)
    assert counts.num_micro == 4
    assert counts.bubble == 0
    # All-to-all: each of 2 rows goes to one of 16 ranks; 7 of the others are on the node, 8 are not; 4 exchanges of bf16.
    assert counts.wire.intra == pytest.approx(4 * 4 * tokens * d * 2 * k * 7 / 16)
    assert counts.wire.inter == pytest.approx(4 * 4 * tokens * d * 2 * k * 8 / 16)
    dense = 4 * (attention + e * d) + 2 * 1000 * d
    experts = 4 * 16 * 3 * d * f / 16
    # Experts have one owner; dense weights are reduced within a node, and what is left of them over two nodes.
    assert counts.step.reduced.intra == pytest.approx(dense * 6 * 7 / 8)
    assert counts.step.reduced.inter == pytest.approx(dense * 6 / 8 * 1 / 2)
    in_bf16 = count(MODEL, LAYOUT, H100, Software(grad_bits=16))
    assert in_bf16.step.reduced.intra == pytest.approx(dense * 4 * 7 / 8)
    assert counts.step.owned == pytest.approx(dense / 16 + experts)


def test_a_share_of_the_layers_is_computed_again_by_hand() -> None:
    tokens, attention, again = 2048, 4 * 1024 * 1024, Software(recompute=("full",))
    for share, layers in ((1.0, 4), (0.5, 2), (0.25, 1), (0.1, 0)):
        work = count(with_share(MODEL, share), LAYOUT, H100, again).body.dense
        assert work == 2 * (3 * 4 + layers) * tokens * attention
        assert count(with_share(MODEL, share), LAYOUT, H100, Software()).body.dense == 2 * 3 * 4 * tokens * attention
    # Rounding is over all layers, not within each kind of them, and a layer that says its own keeps it.
    mixed = replace(MODEL, layers=tuple(replace(MODEL.layers[0], count=number) for number in (1, 1, 2, 3)))
    mixed = replace(mixed, layers=(*mixed.layers[:3], replace(mixed.layers[3], recompute=("attention",))))
    halves = with_share(mixed, 0.5)
    assert [(layer.count, layer.recompute) for layer in halves.layers] == [
        (1, None), (1, ()), (1, None), (3, ("attention",)), (1, ()),
    ]  # fmt: skip
    assert halves.num_layers == mixed.num_layers


def test_a_pipeline_and_tensor_parallelism_by_hand() -> None:
    layout = Layout(gpus=16, seq=2048, global_batch=64, ep=4, tp=2, pp=2, vpp=2, etp=1, zero=1)
    counts = count(MODEL, layout, H100, Software())
    tokens, d = 2048, 1024
    assert counts.num_micro == 16
    assert counts.bubble == 0.5
    assert counts.body.dense == 2 * 2 * 3 * tokens * 4 * d * d / 2
    assert counts.parallel.tensor.intra == 2 * 4 * tokens * d * 2 / 2
    assert counts.parallel.stage.inter == 2 * 2 * tokens * d * 2 / 2
    assert count(MODEL, layout, H100, Software(schedule="dualpipe")).bubble == 0


def test_what_a_plan_does_not_split_over_tp_is_computed_by_each_rank() -> None:
    alone = count(MODEL, replace(LAYOUT, gpus=8, ep=4), H100, Software())
    layout = replace(LAYOUT, ep=4, tp=2, over_tp=frozenset({"experts"}))
    bare = count(MODEL, layout, H100, Software())
    assert (bare.body.dense, bare.body.core, bare.body.narrow) == (
        alone.body.dense, alone.body.core, alone.body.narrow
    )  # fmt: skip
    assert bare.head.passes == alone.head.passes and bare.body.grouped == alone.body.grouped / 2
    tokens, d, vocab = 2048, 1024, 1000
    # Rows are gathered after the experts of four layers, and their gradients in backward: half of them is another's.
    assert bare.parallel.tensor.intra == 4 * 2 * tokens * d * 2 / 2
    whole = count(MODEL, replace(layout, over_tp=frozenset({"experts", "attention", "head"})), H100, Software())
    assert whole.body.dense == alone.body.dense / 2 and whole.body.core == alone.body.core / 2
    assert whole.body.narrow == alone.body.narrow and whole.head.passes == alone.head.passes  # router, softmax
    assert whole.head.narrow == alone.head.narrow / 2
    of_attention, of_head = 4 * 4 * d, vocab + 2 * d
    assert whole.parallel.tensor.intra - bare.parallel.tensor.intra == (of_attention + of_head) * tokens * 2 / 2
    published = count(MODEL, replace(layout, over_tp=None), H100, Software())
    assert published.body.passes < whole.body.passes < bare.body.passes  # norms and scores of words are split too
    weights = 4 * 4 * d * d  # of attention: without a part of them on each rank, they are reduced whole
    more = bare.step.reduced.intra - whole.step.reduced.intra
    assert more == pytest.approx(6 * (weights + vocab * d) / 2 * 3 / 4)


def test_stages_of_a_node_are_near() -> None:
    layout = replace(LAYOUT, ep=1, pp=8, split=((1, 1, 1, 1, 0, 0, 0, 0), 7))
    near, far = (count(MODEL, replace(layout, pp=pp), H100, Software()).parallel.stage for pp in (8, 2))
    assert near.intra / (near.intra + near.inter) == 12 / 14  # of 14 ranks with a next one 2 apart, 2 are at the edge
    assert far.intra == 0 < far.inter
    assert count(MODEL, replace(layout, split=None), H100, Software()).parallel.stage.intra == 0  # as published


def test_wide_numbers_take_as_many_times_the_bytes() -> None:
    half, full = (
        count(MODEL, LAYOUT, H100, each) for each in (Software(), Software(bits=32, number_bytes=4, wide_bytes=4))
    )
    mixed = count(MODEL, LAYOUT, H100, Software(wide_bytes=4))
    fixed = 4 * (16 * 16 * 4) * 2048  # of routers' fp32 scores
    assert full.body.passes - fixed == 2 * (half.body.passes - fixed)
    norms, weights = 4 * 2 * 10 * 1024 * 2 * 2048, 4 * (4 * 1024**2 + 16 * 1024 + 3 * 1024 * 512)
    assert mixed.body.passes - half.body.passes == norms + 12 * weights  # and copies of weights and of gradients
    assert mixed.wire == half.wire and mixed.body.operands == half.body.operands < full.body.operands


@pytest.mark.parametrize("name", ["memory", "passes", "intra", "inter"])
def test_more_bandwidth_is_never_slower(name: str) -> None:
    def times_as_fast(factor: float) -> Machine:
        part = H100 if hasattr(H100, name) else H100.links
        faster = replace(part, **{name: factor * getattr(part, name)})
        return faster if isinstance(faster, Machine) else replace(H100, links=faster)

    times = [seconds(times_as_fast(factor)) for factor in (0.5, 1.0, 2.0, 10.0)]
    assert times == sorted(times, reverse=True)
    assert times[0] > times[-1]


def test_monotonic_in_peak_latency_load_and_tokens() -> None:
    assert seconds(replace(H100, peak={bits: 2 * peak for bits, peak in H100.peak.items()}, watts=1400)) < seconds()
    assert seconds(replace(H100, links=replace(H100.links, latency=1e-3))) > seconds()
    assert seconds(load=1.5) > seconds(load=1.0)
    assert seconds(layout=replace(LAYOUT, global_batch=128)) > seconds()
    assert seconds(software=Software(recompute=("full",))) > seconds()
    assert seconds(software=Software(graph=("all",))) < seconds()
    # A token goes to each node and rank once, so no kind sends more than flat.
    assert seconds(software=Software(dispatcher="hybridep")) < seconds()


def test_the_parts_of_a_step_are_its_time_and_a_broken_constant_is_caught() -> None:
    with pytest.raises(ConfigError) as error:
        checked({**PRIORS, "dense": 1.7}, "calibration.yaml")
    assert str(error.value) == (
        "calibration.yaml.dense=1.7: must be a number from 0.4 to 1. Calibrate again: python benchmarks/foresight.py fit."
    )
    with pytest.raises(ConfigError, match=r"calibration.yaml.launch=null: must be a number from 3 to 80 us"):
        checked({name: value for name, value in PRIORS.items() if name != "launch"}, "calibration.yaml")
    with pytest.raises(ConfigError, match="is not a constant of the model"):
        checked({**PRIORS, "magic": 1}, "calibration.yaml")
    assert len(CONSTANTS) <= 15
    assert all(constant.low <= constant.prior <= constant.high and constant.source for constant in CONSTANTS)
    stored = yaml.safe_load(CALIBRATION.read_text(encoding="utf-8"))
    assert calibrated() == stored["constants"]


def test_a_damaged_calibration_is_one_message(tmp_path: Path) -> None:
    path = tmp_path / "calibration.yaml"
    path.write_text("constants: {dense: fast}\n")
    with pytest.raises(ConfigError, match=r"calibration.yaml.dense=fast: must be a number"):
        calibrated(path)


def test_a_fit_finds_the_constants_that_made_the_data() -> None:
    true = {**PRIORS, "dense": 0.8, "passes": 1.4}

    def predict(constants: object) -> list[float]:
        c = dict(constants)  # type: ignore[call-overload]
        return [k / c["dense"] + c["passes"] for k in (0.1, 0.5, 1.0, 2.0, 5.0, 10.0) * 20]

    found = fit(predict, predict(true), free=["dense", "passes"])
    assert found["dense"] == pytest.approx(0.8, rel=0.02)
    assert found["passes"] == pytest.approx(1.4, rel=0.02)
    assert found["grouped"] == PRIORS["grouped"]
    bounded = fit(predict, predict({**true, "dense": 3.0}), free=["dense"])
    assert bounded["dense"] == 1.0  # its bound


def test_layouts_that_do_not_divide() -> None:
    for values, text in (
        ({"tp": 3}, "layout.gpus=16: tp * pp * cp = 3 must divide the 16 GPUs. Use a multiple of 3."),
        (
            {"global_batch": 63},
            "layout.global_batch=63: must be a multiple of replicas * micro-batch = 16 * 1. Use a multiple of 16.",
        ),
        ({"pp": 0}, "layout.pp=0: must be at least 1. Give a positive number."),
        ({"ep": 32}, "layout.ep=32: pp * ep * etp = 32 must divide the 16 GPUs. Use a divisor of 16."),
    ):
        with pytest.raises(ConfigError) as error:
            replace(LAYOUT, **values)  # type: ignore[arg-type]
        assert str(error.value) == text


def test_hardware_and_stacks_that_are_wrong() -> None:
    for override, text in (
        (
            "hardware.figures.memory_tb_s.value=null",
            "hardware.figures.memory_tb_s.value=null: is needed to predict the time of a step",
        ),
        ("hardware.figures.watts.value=-1", "hardware.figures.watts.value=-1.0: must be positive"),
        (
            "hardware.figures.memory_effective_tb_s.value=10",
            "is above the data sheet's hardware.figures.memory_tb_s.value=3.35",
        ),
    ):
        with pytest.raises(ConfigError, match=text.replace(".", r"\.").replace("(", r"\(")):
            machine_of(compose_config(["hardware=h100", override]).hardware)
    for override, text in (
        ("stack.dispatcher=pigeon", "stack.dispatcher=pigeon: is not known"),
        ("stack.graph=[walls]", "stack.graph=walls: is not known"),
        ("stack.bits=7", "stack.bits=7: is not known"),
        ("stack.wire_share.value=2", "stack.wire_share.value=2.0: must lie in"),
    ):
        with pytest.raises(ConfigError, match=text.replace(".", r"\.")):
            software_of(compose_config([override]).stack)


def test_every_shipped_machine_and_stack_is_complete() -> None:
    for name in (path.stem for path in (conf_dir() / "hardware").glob("*.yaml")):
        hardware = compose_config([f"hardware={name}"]).hardware
        assert machine_of(hardware).name == name
        assert all(getattr(hardware.figures, figure).source for figure in vars(hardware.figures))
    for name in ("runtime", "nccl", "megatron_2026", "megatron_graphs", "deepseek_v3"):
        software_of(compose_config([f"stack={name}"]).stack)


def test_a_forecast_adds_up_and_its_changes_are_real() -> None:
    case = Inputs(model=MODEL, layout=LAYOUT, machine=H100, software=Software(recompute=("full",)))
    options = alternatives_of(case, Keys(), None)
    assert "data.micro_batch_size=2" in options  # not of `workload`, which a run does not read
    made = forecast(case, [synthetic("balanced", 16, 16, 2), synthetic("zipf", 16, 16, 2)], options)
    assert made.seconds == pytest.approx(sum(made.parts.values()))
    assert made.tokens_per_second_per_rank == pytest.approx(64 * 2048 / 16 / made.seconds)
    assert made.tflops_per_rank == pytest.approx(made.flops_per_token * made.tokens_per_second_per_rank / 1e12)
    assert made.changes
    assert len(made.changes) <= 3
    for change in made.changes:
        assert change.seconds == sum(step_of(options[change.change]).values()) < made.seconds
    assert [c.seconds for c in made.changes] == sorted(c.seconds for c in made.changes)
    even, zipf = made.prices
    assert even.p50_seconds == even.p99_seconds == pytest.approx(made.seconds)
    assert made.seconds < zipf.p50_seconds <= zipf.p99_seconds  # one expert per rank: the same in all layers


def stages_of(*layers: int) -> Pipeline:
    paths = iter(range(sum(layers)))
    units = [tuple(Unit(path=f"layers.{next(paths)}", is_layer=True, form="") for _ in range(n)) for n in layers]
    return Pipeline(schedule="1f1b", ranks=len(layers), stages=tuple(Stage(units=each) for each in units))


@pytest.mark.parametrize("vocab", [1000, 200_000])
def test_stages_are_evened_by_seconds(vocab: int) -> None:
    """What is offered is the fastest of all stages that there are."""
    model = replace(MODEL, vocab=vocab, layers=(replace(MODEL.layers[0], count=12),))
    layout = replace(LAYOUT, ep=4, pp=4, split=((5, 4, 2, 1), 3))
    case = Inputs(model=model, layout=layout, machine=H100, software=Software())
    every = {}
    for cuts in combinations(range(1, 12), 3):
        each = tuple(end - start for start, end in pairwise((0, *cuts, 12)))
        every[each] = sum(step_of(replace(case, layout=replace(layout, split=(each, 3)))).values())
    options = alternatives_of(case, Keys(), stages_of(5, 4, 2, 1))
    (offered,) = (text for text in options if text.startswith("pipeline.layout="))
    layers = counts_of(offered.partition("=")[2].strip("'"), 4, 12)
    assert sum(step_of(options[offered]).values()) == every[tuple(layers)] == min(every.values())
    assert (layers[-1] < 3) == (vocab > 1000) and layers[:-1] == sorted(layers[:-1])

    ffn = model.layers[0].ffn
    assert ffn is not None
    mixed = replace(
        model,
        layers=(replace(model.layers[0], count=6), replace(model.layers[0], count=6, ffn=replace(ffn, d_shared=9000))),
    )
    for other in (replace(case, model=mixed), replace(case, model=replace(model, layers=MODEL.layers))):
        assert not any("pipeline" in text for text in alternatives_of(other, Keys(), stages_of(5, 4, 2, 1)))


def test_elasticity_is_the_share() -> None:
    """1% less of the exchange takes its share of 1% off the step."""
    case = Inputs(
        model=MODEL,
        layout=LAYOUT,
        machine=replace(H100, links=replace(H100.links, latency=0.0)),
        software=Software(graph=("all",)),
    )
    parts = step_of(case)
    wire = parts["exchange within the node"] + parts["exchange across nodes"]
    faster = replace(
        case.machine, links=replace(case.machine.links, intra=H100.links.intra * 1.01, inter=H100.links.inter * 1.01)
    )
    moved = sum(parts.values()) - sum(step_of(replace(case, machine=faster)).values())
    others = parts["reduction"] + parts["weights"]
    assert moved / sum(parts.values()) == pytest.approx(0.0099 * (wire + others) / sum(parts.values()), rel=0.1)


def test_replicas_of_sharded_weights_by_hand() -> None:
    """Two replicas of eight ranks each: a node shards, and once a step fp32 gradients of what a rank owns cross them."""
    layout = replace(LAYOUT, zero=3, replicas=2, ep=8)
    counts = count(MODEL, layout, H100, Software())
    d, f, e = 1024, 512, 16
    dense = 4 * (4 * d * d + e * d) + 2 * 1000 * d
    experts = 4 * 16 * 3 * d * f / 8
    assert counts.parallel.gathered.intra == pytest.approx(dense * 8 * 7 / 8)  # experts are whole on their rank
    assert counts.parallel.gathered.inter == 0
    assert counts.step.reduced.inter == pytest.approx((dense / 8 + experts) * 2 * 4 * 1 / 2)
    whole = count(MODEL, replace(layout, replicas=1), H100, Software()).parallel.gathered
    assert whole.inter == pytest.approx(dense * 8 / 8 / 2 + experts * 8 / 2)


def test_exchanges_in_flight_by_hand() -> None:
    parts = {
        kind: step_of(
            Inputs(model=MODEL, layout=LAYOUT, machine=H100, software=Software(in_flight=kind, chunks=chunks))
        )
        for kind, chunks in (("none", 1), ("shared", 1), ("chunks", 2))
    }
    exchanges = {
        kind: sum(s for name, s in each.items() if name.startswith("exchange")) for kind, each in parts.items()
    }
    # Without shared experts: forward gains nothing; in backward, weight gradients run beside the first exchange. Products
    # that are computed apart cost 3% more.
    wire, products = exchanges["none"] / 2, parts["none"]["expert products"] / 3
    apart = 1.03 * products
    backward = max(apart, wire / 2) + apart + wire / 2
    assert exchanges["shared"] == pytest.approx(wire + apart - products + backward - 2 * products)
    assert exchanges["chunks"] < exchanges["none"]
    for kind in ("shared", "chunks"):
        assert parts[kind]["expert products"] == 3 * products
