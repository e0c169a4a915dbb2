"""`moecompile.certify` passes what is right, and says of each known fault what it is, where, and on which axis."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from moecompile.errors import ArgumentError, VerificationFailed
from moecompile.verify import Certificate, Check, Finding, certify
from moecompile.verify.diagnosis import Difference
from tests import forked
from tests.distributed.harness import run_distributed_test
from tests.tiny import one_rank
from tests.verify.by_hand import LENGTH, ExpertParallel, Model, tokens

MESH = {"dp": 2, "ep": 2}
WITHOUT = partial(Model, counts=False)

# fault -> part of the name of a check that must fail, and of what is said; docs/understand/bugs-of-others.md names them
FAULTS = {
    "experts of rank 0": ("entries of weights that no rank has", "layers.0.up"),
    "a weight of its own": ("entries that are not the model's", "layers.1.router.weight on rank 0"),
    "weights untied": ("entries that a rank has twice", "embedding.weight"),
    "backward of gather": ("step 0: gradients", "no multiple"),
    "router not summed": ("step 0: gradients", "each rank has its own on `dp` and `ep`: not summed"),
    "experts times ep": ("step 0: gradients", "2 x on `dp` or `ep`: summed twice, or not averaged"),
    "experts halved on one rank": ("step 0: gradients", "by the place on `ep`: 1 x at 0, 0.5 x at 1"),
    "no gradient for an expert": ("gradients on one side only", "layers.0.up on rank 0"),
    "not a number": ("step 0: gradients", "not finite on rank 1"),
    "norm of own experts": ("gradient norm", "step 0"),
    "loads of one rank": ("buffers and counts", "each rank has its own on `dp` and `ep`: not summed"),
    "loads counted again": ("recomputed, buffers and counts", "2 x on `dp` or `ep`"),
    "another decay": ("updates of weights", "no multiple"),
    "slots that were not chosen": ("step 0: gradients", "no multiple"),
    "weights cut off": ("gradients on one side only", "layers.0.router.weight on rank 0"),
    "experts over ep": ("step 0: gradients", "0.5 x on `dp` or `ep`: averaged twice, or not summed"),
    "divided by own targets": ("step 0: gradients", "no multiple"),
    "accumulated as an average": ("step 0: gradients", "no multiple"),
    "norm averaged": ("gradient norm", "step 0"),
    "tied weight twice in the norm": ("gradient norm", "x on every rank"),
    "loads in bfloat16": ("buffers and counts", "layers.0.load"),
    "layers by local index": ("entries of weights that no rank has", "layers.1.up"),
    "batch of rank 0": ("losses of micro-batches", "micro-batch 0 of rank 3"),
    "experts frozen": ("gradients on one side only", "layers.0.up on rank 0"),
    "optimizer without experts": ("updates of weights", "zero on every rank"),
    "moments lost": ("updates of weights", "no multiple"),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "loads counted again": {"recompute": True},
    "divided by own targets": {"reduction": "targets"},
    "loads in bfloat16": {"accumulation": 3},  # which is exact up to 256
}
"""Of `certify`, for some faults."""


class OtherCounts(ExpertParallel):
    """Counts of a name that one process has not."""

    def loads(self) -> dict[str, torch.Tensor]:
        return {f"{name} of tokens": load for name, load in super().loads().items()}


def data_parallel(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    return DistributedDataParallel(model)


def sharded(model: Any, mesh: DeviceMesh) -> nn.Module:
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


class Dropping(Model):
    """Dropout in a module, by an attribute, by a rate of a config, and, if `masked`, by random numbers of its own."""

    def __init__(self, masked: bool = False) -> None:
        super().__init__(counts=False)
        self.drop, self.masked = nn.Dropout(0.2), masked
        self.dropout_p, self.config = 0.3, SETTINGS
        self.register_forward_hook(self.dropped)

    def dropped(self, module: nn.Module, args: Any, out: Any) -> Any:
        x = F.dropout(self.drop(out.logits), self.dropout_p, self.training)
        x = F.dropout(x, self.config.resid_pdrop, self.training)
        return SimpleNamespace(logits=x * torch.rand_like(x) if self.masked else x)


SETTINGS = SimpleNamespace(resid_pdrop=0.1)


def other_logits(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    if dist.get_rank() == 1:
        model.register_forward_hook(lambda _, __, out: SimpleNamespace(logits=out.logits.roll(1, -1)))
    return DistributedDataParallel(model)


def dropping_itself(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """A rate of 0.2 that the ranks alone have, written into the code."""
    model.register_forward_hook(lambda _, __, out: SimpleNamespace(logits=F.dropout(out.logits, 0.2)))
    return DistributedDataParallel(model)


class OwnShards(ExpertParallel):
    """Who gives no `clip`, and has a part of the experts in plain tensors."""

    def __init__(self, model: Model, mesh: DeviceMesh) -> None:
        super().__init__(model, mesh)
        self.clip = None


def counted(model: nn.Module) -> None:
    if hasattr(model, "seen"):
        model.seen += 1


class Counting(Model):
    """Counts its micro-batches."""

    def __init__(self) -> None:
        super().__init__(counts=False)
        self.register_buffer("seen", torch.zeros(()))
        self.register_forward_hook(lambda model, _, __: counted(model))


def renamed_buffer(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """On ranks nothing is counted, under another name."""
    del model.seen
    model.register_buffer("kept", torch.zeros(()))
    return DistributedDataParallel(model)


class LateFault(ExpertParallel):
    """Is wrong from the third step on."""

    calls = 0

    def reduce(self, targets: int) -> None:
        super().reduce(targets)
        self.calls += 1
        if self.calls >= 3:
            self.dense[0].grad *= 2


_DP = {"dp": 4}
CASES: dict[str, Callable[[], Certificate]] = {
    "other logits": lambda: certify(WITHOUT, other_logits, tokens, _DP, steps=1, recompute=False),
    "one step": lambda: certify(Model, ExpertParallel, tokens, MESH, steps=1, recompute=False, reduction="sum"),
    "labels at the end": lambda: certify(
        WITHOUT, other_logits, partial(tokens_with, first=LENGTH - 2), _DP, steps=1, recompute=False
    ),
    "no labels on rank 1": lambda: certify(WITHOUT, other_logits, none_for_rank_1, _DP, steps=1, recompute=False),
    "dropout": lambda: certify(Dropping, data_parallel, tokens, _DP),
    "masked": lambda: certify(partial(Dropping, masked=True), data_parallel, tokens, _DP, recompute=False),
    "dropping itself": lambda: certify(WITHOUT, dropping_itself, tokens, _DP, recompute=False),
    "own shards": lambda: certify(Model, OwnShards, tokens, MESH, reduction="sum", recompute=False),
    "renamed buffer": lambda: certify(Counting, renamed_buffer, tokens, _DP, recompute=False),
    "late": lambda: certify(Model, LateFault, tokens, MESH, reduction="sum", recompute=False),
    "late, 3 steps": lambda: certify(Model, LateFault, tokens, MESH, reduction="sum", recompute=False, steps=3),
}


def tokens_with(number: int, first: int) -> dict[str, torch.Tensor]:
    """Targets from a place on, as after a prompt."""
    batch = tokens(number)
    labels = batch["labels"].clone()
    labels[:, :first] = -100
    return {**batch, "labels": labels}


def none_for_rank_1(number: int) -> dict[str, torch.Tensor]:
    return tokens_with(number, LENGTH if number in (2, 3) else 0)


def _all(rank: int, world_size: int) -> dict[str, Certificate]:
    found = {
        "right": certify(Model, ExpertParallel, tokens, MESH, reduction="sum"),
        "float32": certify(Model, ExpertParallel, tokens, MESH, reduction="sum", dtype=torch.float32),
        "shared": certify(Model, ExpertParallel, tokens, {"ep": 2, "tp": 2}, reduction="sum", same_batch=["tp"]),
        "data parallel": certify(WITHOUT, data_parallel, tokens, {"dp": 4}),
        "as sums": certify(WITHOUT, data_parallel, tokens, {"dp": 4}, reduction="sum", recompute=False),
        "sharded": certify(WITHOUT, sharded, tokens, {"dp": 4}),
        "replicated and sharded": certify(WITHOUT, sharded, tokens, {"outer": 2, "inner": 2}),
    }
    divided = partial(ExpertParallel, by_targets=True)
    found["divided by targets"] = certify(Model, divided, tokens, MESH, reduction="targets")
    for fault in FAULTS:
        options = {"reduction": "sum", "recompute": False, **OPTIONS.get(fault, {})}
        wrong = partial(ExpertParallel, fault=fault, by_targets=options["reduction"] == "targets")
        found[fault] = certify(Model, wrong, tokens, MESH, **options)
    found["other counts"] = certify(Model, OtherCounts, tokens, MESH, reduction="sum", recompute=False)
    found |= {name: run() for name, run in CASES.items()}
    found["loads under DDP"] = certify(Model, data_parallel, tokens, {"dp": 4}, recompute=False)
    return found


@pytest.fixture(scope="module")
def found() -> dict[str, Certificate]:
    first, *others = run_distributed_test(_all, 4, timeout_s=120)
    for other in others:
        assert {name: str(c) for name, c in other.items()} == {name: str(c) for name, c in first.items()}
    return first


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["right", "float32", "shared", "data parallel", "sharded", "replicated and sharded", "divided by targets"]
)
def test_what_is_right_passes(found: dict[str, Certificate], name: str) -> None:
    certificate = found[name]
    assert certificate.passed, str(certificate)
    in_float32 = ["updates of weights in float32"] if name == "float32" else []
    assert certificate.not_tried == ["more than 2 optimizer steps", *in_float32]
    assert "a rank without any" in certificate.tried
    worst = max(check.error for check in certificate.checks)
    assert 0 < worst < (1e-3 if name == "float32" else 1e-8)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_told(found: dict[str, Certificate], fault: str) -> None:
    check, text = FAULTS[fault]
    failed = {each.name: each.where for each in found[fault].checks if not each.passed}
    said = [finding for finding in found[fault].findings if check in finding.check]
    assert any(check in name for name in failed), f"{failed}"
    assert any(text in str(finding) for finding in said), "\n".join(map(str, said[:5]))
    with pytest.raises(VerificationFailed, match="dp 2 x ep 2"):
        found[fault].check()


@pytest.mark.slow
def test_another_reduction_is_a_factor(found: dict[str, Certificate]) -> None:
    gradients = [finding for finding in found["as sums"].findings if finding.check == "step 0: gradients"]
    assert {finding.name for finding in gradients} == {name for name, _ in Model().named_parameters()}
    for each in gradients:
        assert each.difference.factor == pytest.approx(0.25) and each.difference.axes == ("dp",)
        assert each.difference.text == "0.25 x on `dp`: averaged twice, or not summed"


@pytest.mark.slow
def test_what_cannot_be_compared_is_said(found: dict[str, Certificate]) -> None:
    left_out = [text for text in found["other counts"].not_tried if "layers.0.load of tokens" in text]
    assert len(left_out) == 1 and "on one side only" in left_out[0]


def _failed(certificate: Certificate) -> set[str]:
    return {check.name for check in certificate.checks if not check.passed}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["other logits", "labels at the end"])
def test_each_rank_has_targets_in_a_single_step(found: dict[str, Certificate], name: str) -> None:
    assert {"step 0: losses of micro-batches", "step 0: gradients"} <= _failed(found[name])
    (losses,) = [check for check in found[name].checks if check.name == "step 0: losses of micro-batches"]
    assert "of rank 1" in losses.where


@pytest.mark.slow
def test_what_a_single_step_cannot_try_is_in_the_verdict(found: dict[str, Certificate]) -> None:
    assert found["one step"].passed
    assert found["one step"].verdict == (
        "dp 2 x ep 2, float64: passed; not tried: a rank without any; recomputation; more than 1 optimizer steps"
    )


@pytest.mark.slow
def test_a_rank_without_targets_of_its_own_is_in_the_verdict(found: dict[str, Certificate]) -> None:
    assert found["no labels on rank 1"].passed
    assert "rank 1, whose losses are all 0" in found["no labels on rank 1"].verdict


@pytest.mark.slow
def test_dropout_is_set_to_zero_and_said(found: dict[str, Certificate]) -> None:
    certificate = found["dropout"]
    assert certificate.passed, str(certificate)
    said = "dropout, whose rates were set to 0 (dropout_p of 0.3, config.resid_pdrop of 0.1, drop.p of 0.2)"
    assert certificate.verdict.endswith(f"passed; not tried: more than 2 optimizer steps; {said}")
    assert SETTINGS.resid_pdrop == 0.1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "who"),
    [
        ("masked", "one process computes other losses and ranks compute other losses"),
        ("dropping itself", "ranks compute other losses"),
    ],
)
def test_what_is_random_is_not_called_wrong(found: dict[str, Certificate], name: str, who: str) -> None:
    certificate = found[name]
    assert certificate.not_comparable == f"{who} when run again with other random numbers"
    assert not certificate.passed and not certificate.findings and not _failed(certificate)
    assert "FAILED" not in str(certificate) and f"dp 4, float64: not comparable: {who}" in str(certificate)
    with pytest.raises(VerificationFailed, match=f"dp 4 failed: not comparable: {who}"):
        certificate.check()


@pytest.mark.slow
def test_a_norm_of_own_shards_is_named(found: dict[str, Certificate]) -> None:
    certificate = found["own shards"]
    assert certificate.passed, str(certificate)
    said = "gradient norm, which torch tells of a rank's own shards alone (layers.0.up on rank 0)"
    assert said in certificate.verdict


@pytest.mark.slow
def test_steps_that_were_not_tried_are_in_the_verdict(found: dict[str, Certificate]) -> None:
    assert found["late"].passed
    assert found["late"].verdict.endswith("passed; not tried: recomputation; more than 2 optimizer steps")
    failed = _failed(found["late, 3 steps"])
    assert "step 2: gradients" in failed and not any(name.startswith(("step 0", "step 1")) for name in failed)


@pytest.mark.slow
def test_a_stale_buffer_of_another_name_is_in_the_verdict(found: dict[str, Certificate]) -> None:
    certificate = found["renamed buffer"]
    assert ": passed; not tried: " in certificate.verdict and certificate.verdict in str(certificate).splitlines()
    assert "buffers with another shape on a rank, or on one side only: seen, kept" in certificate.verdict


def _targets_of_nothing(rank: int, world_size: int) -> str:
    try:
        certify(Model, ExpertParallel, _hidden, {"ep": 2}, reduction="targets")
    except ArgumentError as error:
        return str(error)
    return ""


def _hidden(number: int) -> torch.Tensor:
    return torch.zeros(2, 3)


@pytest.mark.slow
def test_targets_that_cannot_be_counted_are_refused() -> None:
    for message in run_distributed_test(_targets_of_nothing, 2):
        assert message.startswith("reduction=targets: micro-batches have no")


@pytest.mark.slow
def _model(*_: object) -> Model:
    return Model()


def _nothing(*_: object) -> None:
    return None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mesh": [2]}, r"mesh=\[2\]: it needs axes with at least one rank each"),
        ({"steps": 1.5}, r"steps=1\.5: it must be at least 1"),
        ({"timeout_s": 0}, r"timeout_s=0: it must be more than 0"),
        ({"build": Model()}, r"build=Model: it must be a function"),
        (
            {"build": _nothing},
            r"build=NoneType: it must return a torch\.nn\.Module, or a moecompile\.Parallel with one",
        ),
        ({"parallelize": _nothing}, r"parallelize=NoneType: it must return a torch\.nn\.Module"),
        ({"loss": lambda module, batch: torch.ones(2)}, r"loss=\(2,\): it must return a scalar"),
    ],
)
def test_arguments_that_break_a_rule(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    arguments = {
        "build": _model,
        "parallelize": lambda model, mesh: model,
        "batch": tokens,
        "mesh": {"ep": 1},
        **changes,
    }
    with one_rank(tmp_path), pytest.raises(ArgumentError, match=f"^{message}"):
        certify(**arguments, recompute=False)


@pytest.mark.parametrize("file", [None, "<stdin>"])
def test_functions_of_a_session_without_a_file_are_told(file: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    def build() -> Model:
        return Model()

    main = sys.modules["__main__"]
    build.__module__, build.__qualname__ = "__main__", "build_of_session"
    monkeypatch.setattr(main, "build_of_session", build, raising=False)
    monkeypatch.setattr(main, "__file__", file, raising=False)
    with pytest.raises(ArgumentError, match=r"cannot import a session without a file, such as a notebook\. Write them"):
        certify(build, _model, tokens, {"ep": 1})


def test_a_mistake_on_a_rank_that_was_started_is_raised_as_it_is() -> None:
    with pytest.raises(ArgumentError, match=r"^parallelize=NoneType: it must return") as caught:
        certify(_model, _nothing, tokens, {"ep": 1}, recompute=False)
    assert caught.value.__cause__ is None


def test_buffers_that_are_not_summed_are_told(found: dict[str, Certificate]) -> None:
    """DDP gives every rank the buffers of rank 0 before each forward, so what other ranks counted is lost."""
    (failed,) = [check for check in found["loads under DDP"].checks if not check.passed]
    assert failed.name == "buffers and counts"


class Idle(Model):
    """No token chooses expert 3 of the second layer, and its last layer is not called."""

    def __init__(self) -> None:
        super().__init__(counts=False)
        self.layers[1].router.register_forward_hook(lambda _, __, out: out.index_fill(1, torch.tensor(3), -1e9))
        self.unused, self.frozen = nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False)


def test_gradients_that_were_never_anything_but_zero_are_said(tmp_path: Path) -> None:
    """Of an expert that no token chose, a wrong gradient is as zero as a right one."""
    with one_rank(tmp_path):
        certificate = certify(Idle, lambda model, mesh: model, tokens, {"ep": 1}, recompute=False)
    assert certificate.passed
    idle = "layers.1.down of 3, layers.1.up of 3, unused.bias, unused.weight"
    assert certificate.not_tried[-1] == f"gradients that are zero in every step: {idle}"


# -- the examples ------------------------------------------------------------------------------------------------------

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


@pytest.mark.slow
def test_the_example_starts_its_ranks_itself() -> None:
    done = forked.python(str(EXAMPLES / "certify_ours.py"), cwd=EXAMPLES)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "ep 2, float64: passed" in done.stdout and "gradient norm" in done.stdout


def _of_transformers(rank: int, world_size: int) -> Certificate:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        import certify_transformers as example

        return certify(
            example.build, example.parallelize, example.batch, {"ep": 2}, dtype=torch.float32, recompute=False
        )


@pytest.mark.slow
def test_expert_parallelism_of_transformers_passes_in_float32() -> None:
    certificate = run_distributed_test(_of_transformers, 2)[0]
    assert certificate.passed, str(certificate)
    assert [text.partition(",")[0] for text in certificate.not_tried] == [
        "recomputation", "more than 2 optimizer steps", "gradient norm", "updates of weights in float32",
    ]  # fmt: skip


def test_a_certificate_can_be_kept(tmp_path: Path) -> None:
    finding = Finding(
        check="gradients", name="w", difference=Difference(error=1.0, factor=2.0, axes=("ep",), text="2 x")
    )
    check = Check(name="gradients", error=1.0, tolerance=1e-10, passed=False, where="w: 2 x")
    certificate = Certificate(
        mesh={"ep": 2},
        dtype="float64",
        checks=[check],
        findings=[finding],
        tried=["2 steps"],
        not_tried=[],
        versions={},
    )
    certificate.save(tmp_path / "certificate.json")
    kept = json.loads((tmp_path / "certificate.json").read_text())
    assert not kept["passed"] and kept["findings"][0]["factor"] == 2.0 and kept["checks"][0]["where"] == "w: 2 x"
    assert "FAILED  w: 2 x" in str(certificate) and "ep 2, float64: FAILED" in str(certificate)
