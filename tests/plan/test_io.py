"""plan.yaml: what is written is read back, and what is wrong is said."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from moecompile.errors import ConfigError, PlanError
from moecompile.plan import Plan, from_yaml, load, save, to_yaml
from tests.plan.plans import a_plan

Change = Callable[[dict[str, Any]], Any]


def edited(change: Change) -> str:
    """The plan's YAML after `change` was made to it."""
    body = yaml.safe_load(to_yaml(a_plan()))
    change(body)
    return yaml.safe_dump(body)


def test_a_plan_survives_the_round_trip() -> None:
    plan = a_plan()
    read = from_yaml(to_yaml(plan))
    assert read == plan
    assert read.hash == plan.hash
    assert to_yaml(read) == to_yaml(plan)


def test_an_empty_plan_without_an_estimate_does_too() -> None:
    plan = Plan(mesh=a_plan().mesh, layers=(), reductions=(), estimate=None)
    assert from_yaml(to_yaml(plan)) == plan
    body = yaml.safe_load(to_yaml(plan))
    del body["estimate"]  # it has a default
    assert from_yaml(yaml.safe_dump(body)) == plan


def test_files_are_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    save(a_plan(), path)
    assert load(path) == a_plan()
    assert [file.name for file in tmp_path.iterdir()] == ["plan.yaml"]


def test_it_reads_well() -> None:
    text = to_yaml(a_plan())
    assert text.startswith(f"format: 1\nhash: {a_plan().hash}\nmesh:\n  num_nodes: 2\n")
    assert max(map(len, text.splitlines())) <= 120


def test_an_edited_plan_has_another_hash() -> None:
    def change(body: dict[str, Any]) -> None:
        body["layers"][0]["routing"]["scale"] = 1  # a whole number is fine where a float is meant

    read = from_yaml(edited(change))
    assert read.layers[0].routing.scale == 1.0
    assert read.hash != a_plan().hash


def test_the_hash_in_the_file_is_not_believed() -> None:
    assert from_yaml(edited(lambda body: body.update(hash="0" * 16))).hash == a_plan().hash


def _set(path: str, value: Any) -> Change:
    """Sets `layers.0.site.fqn` and the like."""
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]

    def change(body: dict[str, Any]) -> None:
        for part in parents:
            body = body[part]
        body[last] = value

    return change


def _remove(path: str) -> Change:
    *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]

    def change(body: dict[str, Any]) -> None:
        for part in parents:
            body = body[part]
        del body[last]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("colour", "red"), "plan.yaml.colour=...: is not a key of the plan. Use one of ['mesh', 'layers'"),
        (_set("mesh.up", 2), "plan.yaml.mesh.up=...: is not a key of the plan. Use one of ['num_nodes'"),
        (_set("layers.1.routing.noise", 0.1), "plan.yaml.layers[1].routing.noise=...: is not a key of the plan."),
        (_remove("mesh"), "plan.yaml.mesh=null: is missing. Add it, or plan again."),
        (_remove("layers.0.dispatch"), "plan.yaml.layers[0].dispatch=null: is missing. Add it, or plan again."),
        (_remove("layers.1.site.d_ff"), "plan.yaml.layers[1].site.d_ff=null: is missing."),
        (_remove("estimate.fits"), "plan.yaml.estimate.fits=null: is missing."),
        (_set("layers", {}), "plan.yaml.layers={}: must be a list. Correct the plan."),
        (_set("layers.0", "mlp"), "plan.yaml.layers[0]=mlp: must be a mapping. Correct the plan."),
        (_set("layers.0.site", None), "plan.yaml.layers[0].site=null: must be a mapping."),
        (_set("layers.0.routing.top_k", "3"), "plan.yaml.layers[0].routing.top_k=3: must be of type int."),
        (_set("layers.0.routing.top_k", 3.0), "plan.yaml.layers[0].routing.top_k=3.0: must be of type int."),
        (_set("layers.0.routing.top_k", True), "plan.yaml.layers[0].routing.top_k=True: must be of type int."),
        (_set("layers.0.routing.top_k", None), "plan.yaml.layers[0].routing.top_k=null: must be of type int."),
        (_set("layers.0.routing.normalize", 1), "plan.yaml.layers[0].routing.normalize=1: must be of type bool."),
        (_set("layers.0.routing.scale", "1e-3"), "plan.yaml.layers[0].routing.scale=1e-3: must be of type float."),
        (_set("layers.0.routing.score", 7), "plan.yaml.layers[0].routing.score=7: must be of type str."),
        (_set("reductions.0.sum_over", "ep"), "plan.yaml.reductions[0].sum_over=ep: must be a list."),
        (_set("reductions.0.sum_over.0", 1), "plan.yaml.reductions[0].sum_over[0]=1: must be of type str."),
        (
            _set("estimate.memory_bytes_per_rank.grads", []),
            "plan.yaml.estimate.memory_bytes_per_rank.grads=[]: must be",
        ),
        (_set("format", 2), "plan.yaml: format=...: must be 1. Plan again with this version."),
        (_remove("format"), "plan.yaml: format=...: must be 1."),
    ],
)
def test_what_is_wrong_is_said(change: Change, message: str) -> None:
    with pytest.raises(PlanError, match=f"^{re.escape(message)}"):
        from_yaml(edited(change))


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system ['true']",
        "mesh: !!python/object:moecompile.mesh.MeshSpec {}",
        "format: !!python/name:os.system",
        "a: [1, 2",
        "a: b: c",
        "\t- x",
        "when: 2026-99-99",
    ],
)
def test_hostile_or_broken_yaml_is_refused(text: str) -> None:
    with pytest.raises(PlanError, match=r"plan\.yaml=\.\.\.: is not plain YAML"):
        from_yaml(text)


@pytest.mark.parametrize(("text", "kind"), [("", "NoneType"), ("- 1", "list"), ("plan", "str"), ("3", "int")])
def test_yaml_that_is_no_mapping_is_refused(text: str, kind: str) -> None:
    with pytest.raises(PlanError, match=f"^plan.yaml={kind}: must be a mapping"):
        from_yaml(text)


def test_a_mapping_that_holds_itself_is_refused() -> None:
    with pytest.raises(PlanError, match="must be a list"):
        from_yaml("&a {format: 1, mesh: {}, layers: *a, reductions: []}")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"^plan=.*none\.yaml: cannot be read: .* Give the path of a plan\.yaml\.$"):
        load(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlanError, match="cannot be read"):
        load(tmp_path / "binary.yaml")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("mesh.ep", 3), "mesh.ep=3: must divide the world size (2 nodes x 2 ranks = 4 ranks). Use one of [1, 2, 4]."),
        (_set("mesh.ep", 2), "layers[0].placement.ep=4: must be mesh.ep=2. Plan again for this mesh."),
        (_set("layers.1.site.fqn", "layers.0.mlp"), "layers[1].site.fqn=layers.0.mlp: is planned twice."),
        (_set("layers.0.site.kind", "round"), "layers.0.mlp.kind=round: must be gated or up_down. Use one of these."),
        (_set("layers.0.site.d_model", 0), "layers.0.mlp.d_model=0: must be at least 1. Match the model."),
        (_set("layers.0.experts.num_routed", 24), "layers[layers.0.mlp].placement.num_experts=12: must be experts.num_"),
        (_set("layers.0.experts.granularity", 2), "layers[layers.0.mlp].experts.d_expert=12: must be site.d_ff / gran"),
        (_set("layers.0.experts.granularity", 0), "experts.granularity=0: must be at least 1."),
        (_set("layers.0.experts.d_shared", 24), "experts.d_shared=24: must be num_shared * d_expert = 1 * 12. Use 12."),
        (_set("layers.0.experts.num_shared", 4), "experts.d_shared=12: must be num_shared * d_expert = 4 * 12. Use 48."),
        (_set("layers.0.experts.init", "zeros"), "experts.init=zeros: must be one of ['copy', 'virtual_group', 'drop', "),
        (_set("layers.0.experts.init", "drop"), "experts.drop_ratio=0.0: must be in (0, 1] with init=drop, else 0."),
        (_set("layers.0.experts.drop_ratio", 0.5), "experts.drop_ratio=0.5: must be in (0, 1] with init=drop, else 0."),
        (_set("layers.0.experts.weight_scaling", "root"), "experts.weight_scaling=root: must be one of ['none', 'exact', "),
        (_set("layers.0.experts.init", "copy"), "experts.init=copy: copies whole FFNs but experts.granularity=4."),
        (_set("layers.0.routing.top_k", 0), "routing.top_k=0: must be at least 1."),
        (_set("layers.0.routing.top_k", 4), "layers[layers.0.mlp].routing.top_k=4: only 1 groups x 3 experts = 3 experts are"),
        (_set("layers.0.routing.top_k", 2), "layers[layers.0.mlp].routing.top_k=2: must be a multiple of the routed slices"),
        (_set("layers.0.routing.groups", 5), "layers[layers.0.mlp].routing.groups=5: must divide experts.num_routed=12."),
        (_set("layers.0.routing.groups", 0), "routing.groups=0: must be at least 1."),
        (_set("layers.0.routing.top_groups", 5), "routing.top_groups=5: there are only routing.groups=4 groups. Use at most 4."),
        (_set("layers.0.routing.top_groups", 0), "routing.top_groups=0: must be at least 1. Use 1 or more."),
        (_set("layers.0.routing.score", "softplus"), "routing.score=softplus: must be one of ['softmax', 'sigmoid', "),
        (_set("layers.0.routing.group_score", "mean"), "routing.group_score=mean: must be one of ['max', 'top2', 'topk_o"),
        (_set("layers.0.routing.scale", 0.0), "routing.scale=0.0: must be positive. Use 1.0."),
        (_set("layers.0.routing.scale", float("nan")), "routing.scale=nan: must be a finite number."),
        (_set("layers.0.balance.rule", "loss"), "balance.rule=loss: must be one of ['none', 'bias', 'quantile']."),
        (_set("layers.0.balance.rule", "none"), "balance.rate=0.001: must be 0 with balance.rule=none."),
        (_set("layers.0.balance.rate", -1.0), "balance.rate=-1.0: must not be negative."),
        (_set("layers.0.placement.ep", 0), "placement.ep=0: must be at least 1."),
        (_set("layers.0.placement.ep", 5), "experts.num_routed=12: must be a multiple of mesh.ep=5. Use 10 or 15."),
        (_set("layers.0.placement.nodes", 3), "placement.nodes=3: must divide placement.ep=4. Plan again."),
        (
            _set("layers.0.routing.choice", "both"),
            "routing.choice=both: must be one of ['token', 'expert', 'hash'].",
        ),
        (_set("layers.0.routing.capacity_factor", 1.0), "routing.drop=none: must be none if and only if capacity_factor is null."),
        (_set("layers.0.routing.jitter", 1.0), "routing.jitter=1.0: must lie in [0, 1). Use 0.01."),
        (_set("layers.0.balance.z", -1.0), "balance.z=-1.0: must not be negative."),
        (_set("layers.0.dispatch.kind", "carrier pigeon"), "dispatch.kind=carrier pigeon: must be one of ['local', "),
        (
            _set("layers.0.dispatch.kind", "local"),
            "layers[layers.0.mlp].dispatch.kind=local: must be local if and only if ep is 1, but ep=4.",
        ),
    ],
)  # fmt: skip
def test_an_edit_that_contradicts_the_rest_is_refused(change: Change, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}"):
        from_yaml(edited(change))


def test_virtual_groups_must_fit_routing_groups() -> None:
    def change(body: dict[str, Any]) -> None:
        body["layers"][0]["routing"].update(groups=6, top_groups=2)

    with pytest.raises(
        PlanError, match=r"routing\.groups=6: a virtual group of 3 experts would straddle routing groups"
    ):
        from_yaml(edited(change))


def test_errors_survive_pickling() -> None:
    """Ranks hand them to the launching process."""
    import pickle

    error = PlanError("plan.layers", "x", "is wrong", "Mend it")
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy), copy.exit_code) == (PlanError, "plan.layers=x: is wrong. Mend it.", 2)


@pytest.mark.parametrize(("before", "now"), [(True, "if even"), (False, "no")])
def test_a_plan_of_version_020_which_says_whether_it_fits_by_a_bool_is_read(before: bool, now: str) -> None:
    body = yaml.safe_load(to_yaml(a_plan()))
    body["estimate"] |= {"fits": before, "remedies": [{"change": "mesh.ep=2", "total": 1, "fits": True}]}
    read = from_yaml(yaml.safe_dump(body)).estimate
    assert read is not None and (read.fits, read.remedies) == (now, ())


@pytest.mark.parametrize(
    ("precision", "number"), [("fp32", 4), ("fp32 on weights of 2 bytes", 2), ("bf16_mixed on weights of 8 bytes", 2)]
)
def test_a_plan_of_version_020_has_the_bytes_of_its_precision(precision: str, number: int) -> None:
    body = yaml.safe_load(to_yaml(a_plan()))
    del body["estimate"]["assumes"]["number_bytes"]
    body["estimate"]["assumes"]["precision"] = precision
    read = from_yaml(yaml.safe_dump(body)).estimate
    assert read is not None and read.assumes is not None and read.assumes.number_bytes == number


def test_the_estimate_does_not_count_for_the_hash() -> None:
    plan = a_plan()
    assert plan.estimate is not None
    assert replace(plan, estimate=None).hash == plan.hash
    cheaper = replace(plan.estimate, params_total=1)
    assert replace(plan, estimate=cheaper).hash == plan.hash
