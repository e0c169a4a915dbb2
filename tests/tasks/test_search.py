"""task=search: what it prints is what task=plan predicts and what runs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from moecompile.compose import compose_config
from moecompile.errors import ConfigError
from moecompile.plan import load
from moecompile.planner import RunFacts
from moecompile.planner.memory import memory_of_fullest_rank
from moecompile.planner.pipeline import ranks_of
from moecompile.planner.search import run
from moecompile.schema import validate
from moecompile.tasks import plan as plan_task
from moecompile.tasks import search as task
from tests.counted import counted
from tests.forked import python

CALLS = 1_600  # of a candidate


def searched(folder: Path, *overrides: str) -> dict[str, Any]:
    task.run(compose_config(["task=search", *overrides]), folder)
    return json.loads((folder / "result.json").read_text())  # type: ignore[no-any-return]


def planned(folder: Path, *overrides: str) -> dict[str, Any]:
    folder.mkdir()
    plan_task.run(compose_config(["task=plan", *overrides]), folder)
    return json.loads((folder / "result.json").read_text())  # type: ignore[no-any-return]


def test_the_whole_front_is_what_task_plan_predicts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = searched(tmp_path, "recipe=mixtral_ep", "search.show=2")
    shown = capsys.readouterr().out
    assert found["best"] == found["front"][0]
    assert found["best"]["overrides"] in shown
    assert "best layout that runs" in shown
    assert found["candidates"] == found["fitting"] + sum(reason["count"] for reason in found["rejected"])
    assert set(found["kept"]) == {"micro_batch", "max_nodes", "granularity"}
    candidates = [*found["front"], *found["described_front"]]
    assert all(each["runs"] for each in found["front"])
    assert not any(each["runs"] for each in found["described_front"])
    for i, each in enumerate([candidates[0], candidates[3], candidates[-1], found["described_front"][0]]):
        plan = planned(tmp_path / str(i), "recipe=mixtral_ep", *each["overrides"].split())
        assert plan["step_seconds"] == each["seconds"]
        assert plan["tokens_per_second_per_rank"] == each["tokens_per_second_per_rank"]
        if each["runs"]:
            assert plan["memory_bytes_per_rank"]["total"] == each["memory_bytes"]
            assert plan["memory_bytes_uneven"] == each["memory_bytes_uneven"]
            assert plan["fits"] == each["fits"] == "yes"
        else:
            assert plan["described_memory_bytes"] == each["memory_bytes"]
    best = planned(tmp_path / "best", "recipe=mixtral_ep", *found["best"]["overrides"].split())
    assert load(tmp_path / "plan.yaml").hash == best["plan_hash"] == found["plan_hash"]


@pytest.mark.parametrize(
    "overrides",
    [
        ["recipe=mixtral_ep", "data.global_batch_size=64"],
        ["recipe=mixtral_ep", "data.global_batch_size=64", "dispatch.balance=lend"],
        ["recipe=deepseek_ep", "mesh=h100_8", "mesh.pp=4", "mesh.ep=2", "data.global_batch_size=64"],
    ],
    ids=["ranks", "lending", "stages"],
)
def test_what_is_kept_between_candidates_is_what_each_needs(
    overrides: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes of layers and states are computed once for many candidates; each is compared with its own estimate."""
    memory_in, seen = run._memory, set[tuple[object, ...]]()

    def compared(structure: Any, given: RunFacts, *known: Any) -> Any:
        found = memory_in(structure, given, *known)

        def total(replicas: int, of_run: RunFacts, load: float, in_flight: bool) -> int:
            bytes_ = found(replicas, of_run, load, in_flight)
            alone = []
            for of in ranks_of(structure.plan, structure.facts):
                layers = run._overlapped(of.layers) if in_flight else of.layers
                its = of.run(replace(of_run, row_load=load), structure.plan.pipeline)
                mesh = replace(of.mesh, dp_replicate=replicas)
                alone.append(memory_of_fullest_rank(layers, mesh, of.facts, its).total)
            assert bytes_ == max(alone), (replicas, of_run, load, in_flight)
            seen.add((replicas, of_run.reduce, of_run.gather, of_run.checkpointing, load, in_flight))
            return bytes_

        return total

    monkeypatch.setattr(run, "_memory", compared)
    searched(tmp_path, *overrides, "search.described=false", "hardware.memory_gib=0.05")  # all ways are tried
    assert [len(set(values)) >= 2 for values in list(zip(*seen, strict=True))[1:]] == [True] * 5, seen


def test_what_is_given_beside_counts(tmp_path: Path) -> None:
    """A rank has half of the tokens of a micro-batch; one momentum instead of two moments; bytes of its matrices."""
    given = ["recipe=mixtral_ep", "mesh.cp=2", "optimizer=muon"]
    found = searched(tmp_path, *given, "search.described=false")
    for i, each in enumerate([found["front"][0], found["front"][-1]]):
        plan = planned(tmp_path / str(i), *given, *each["overrides"].split())
        assert plan["step_seconds"] == each["seconds"]
        assert plan["memory_bytes_per_rank"]["total"] == each["memory_bytes"]


@pytest.mark.parametrize("given", ["mesh.tp=2", "mesh.cp=2"])
def test_described_layouts_keep_what_the_mesh_says(tmp_path: Path, given: str) -> None:
    base = ["recipe=mixtral_ep", given, "search.axes=[layout,micro_batch]"]
    found = searched(tmp_path, *base)
    for i, each in enumerate([*found["described_front"][:2], found["described_front"][-1]]):
        plan = planned(tmp_path / str(i), *base, *each["overrides"].split())
        assert plan["step_seconds"] == each["seconds"]
        assert plan["described_memory_bytes"] == each["memory_bytes"]


def test_a_search_starts_where_the_ep_size_of_a_preset_cannot_be(tmp_path: Path) -> None:
    """16 ranks in an EP group are neither a divisor of 8 experts nor in a stage of 4 ranks; nobody has asked for them."""
    base = ["recipe=mixtral_ep", "mesh=h100_2x8", "mesh.pp=4"]
    fronts = []
    for i, given in enumerate([["search.axes=[ep]"], ["search.axes=[ep]", "mesh.ep=search"]]):
        (tmp_path / str(i)).mkdir()
        validate(compose_config(["task=search", *base, *given]))
        found = searched(tmp_path / str(i), *base, *given)
        fronts.append(found["front"])
        assert "ep" not in found["kept"]
    assert fronts[0] == fronts[1]
    for given in (["mesh.ep=16"], ["search.axes=[dispatch]"]):
        with pytest.raises(ConfigError, match=r"mesh.ep=16: must divide the 4 ranks of a stage"):
            validate(compose_config(["task=search", *base, *given]))
    with pytest.raises(ConfigError, match=r"experts.num_routed=8: must be a multiple of mesh.ep=16"):
        searched(tmp_path, "recipe=mixtral_ep", "mesh=h100_2x8", "mesh.ep=16")


def test_fronts_have_no_candidate_that_another_beats(tmp_path: Path) -> None:
    found = searched(tmp_path, "recipe=deepseek_ep", "mesh=cpu_2x2")
    for front in (found["front"], found["described_front"]):
        speeds = [each["tokens_per_second_per_rank"] for each in front]
        memory = [each["memory_bytes_uneven"] for each in front]
        assert speeds == sorted(speeds, reverse=True)
        assert memory == sorted(set(memory), reverse=True)


def test_only_what_leaves_training_unchanged_is_searched(tmp_path: Path) -> None:
    """With a node limit, groups of the router follow the nodes of an EP group; granularity changes the experts."""
    base = ["recipe=mixtral_ep", "routing.max_nodes=1", "search.described=false"]
    same, changed = tmp_path / "same", tmp_path / "changed"
    same.mkdir()
    found = searched(same, *base)
    assert {each["settings"]["mesh.ep"] for each in found["front"]} == {4}
    assert any("would change the model: the router's groups" in reason["rule"] for reason in found["rejected"])
    assert found["described_front"] == []
    changed.mkdir()
    free = searched(changed, *base, "experts.init=random", "search.model=true")
    assert {"max_nodes"} == set(free["kept"]) - {"layout"}
    assert {each["settings"]["mesh.ep"] for each in free["front"]} > {4}
    assert any(each["settings"]["experts.granularity"] > 1 for each in free["front"])
    assert any(each["settings"]["data.micro_batch_size"] == 2 for each in free["front"])


def test_given_keys_are_kept(tmp_path: Path) -> None:
    found = searched(tmp_path, "recipe=mixtral_ep", "mesh.ep=2", "dispatch.kind=flat", "search.axes=[ep,checkpointing]")
    assert found["kept"]["ep"] == "mesh.ep was set"
    assert found["kept"]["overlap"] == "search.axes does not name it"
    assert {each["overrides"].split("=")[0] for each in found["front"]} == {"trainer.checkpointing"}
    with pytest.raises(ConfigError, match=r"search\.axes=epp: is not an axis. Use some of ep, pp, dp_replicate, tp"):
        searched(tmp_path, "recipe=mixtral_ep", "search.axes=[epp]")


def test_nothing_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = searched(tmp_path, "recipe=mixtral_ep", "hardware.memory_gib=0.001", "search.described=false")
    assert found["best"] is None
    assert found["fitting"] == 0
    assert "no layout that runs fits into memory; the least is" in capsys.readouterr().out
    assert not (tmp_path / "plan.yaml").exists()


@pytest.mark.slow
def test_the_winner_compiles_and_trains(tmp_path: Path) -> None:
    base = ["recipe=mixtral_ep", "trainer.max_steps=3", "trainer.val_interval=3", "data.val_batches=1"]
    found = searched(tmp_path, *base)
    line = found["best"]["overrides"].split()
    for name in ("compile", "train"):
        folder = tmp_path / name
        done = python("-m", "moecompile", f"task={name}", *base, *line, f"hydra.run.dir={folder}", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        result = json.loads((folder / "result.json").read_text())
        assert result["status"] == "ok"
        assert load(folder / "plan.yaml").hash == found["plan_hash"]


@pytest.mark.slow
def test_a_candidate_of_a_large_search_is_cheap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five seconds for 10,000 of them, on the machine of the figures, are about 22 million calls."""
    calls = []

    def search(*args: Any, **kwargs: Any) -> Any:
        found, number = counted(run.search, *args, **kwargs)
        calls.append(number)
        return found

    monkeypatch.setattr(task, "search", search)
    base = ["model=deepseek_v3", "mesh=h800_256x8", "mesh.pp=16", "mesh.tp=1"]
    found = searched(tmp_path, *base)
    assert found["candidates"] > 10_000
    assert calls[0] / found["candidates"] <= CALLS
    for i, each in enumerate([found["best"], found["described_front"][0]]):
        plan = planned(tmp_path / str(i), *base, *each["overrides"].split())
        assert plan["step_seconds"] == each["seconds"]
