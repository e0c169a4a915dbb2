"""task=rehearse: what it prints and writes, and its exit code."""

from __future__ import annotations

import dataclasses
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import pytest
import torch

from moecompile.compose import RESOLVED, compose_config, save_resolved
from moecompile.errors import ConfigError, MoecompileError, RehearsalDiffers
from moecompile.planner.step import TABLE_ROWS, step_of_rank
from moecompile.tasks import rehearse as task
from moecompile.torch_private import fake_values
from tests.forked import python

SMALL = [
    "task=rehearse", "recipe=deepseek_ep", "model.config.num_hidden_layers=2", "data.seq_len=64",
    "data.micro_batch_size=2", "data.global_batch_size=16",
]  # fmt: skip


@pytest.mark.slow
def test_the_command_line(tmp_path: Path) -> None:
    """A mesh that no laptop has, the fullest rank, and the plan of this run for another one."""
    mesh = ["mesh=h100_2x8", "data.global_batch_size=64", "rehearse.load=hot"]
    done = python("-m", "moecompile", *SMALL, *mesh, "hydra.run.dir=first", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.split() for line in done.stdout.splitlines() if line]
    assert lines[-1] == [
        "rehearsed:",
        "the",
        "program",
        "sends",
        "and",
        "holds",
        "what",
        "the",
        "plan",
        "says,",
        "and",
        "its",
        "ranks",
        "agree",
    ]
    assert any(line[:4] == ["weights", "gathered", "dp_shard", "16"] for line in lines)
    assert " load hot, " in done.stdout and " times the mean rows\n" in done.stdout
    result = json.loads((tmp_path / "first" / "result.json").read_text())
    assert result["ranks"] == [0, 15] and result["differs"] == [] and result["memory_fits"] is True
    assert {path.name for path in (tmp_path / "first" / "rehearsed").iterdir()} == {"rank-0.json", "rank-15.json"}
    again = python(
        "-m", "moecompile", *SMALL, "data.global_batch_size=64", "plan=first", "rehearse.ranks=[3]", "hydra.run.dir=second",
        cwd=tmp_path,
    )  # fmt: skip
    assert again.returncode == 0, again.stdout + again.stderr
    second = json.loads((tmp_path / "second" / "result.json").read_text())
    assert (second["plan_hash"], second["ranks"]) == (result["plan_hash"], [3])


@pytest.mark.slow
def test_a_difference_is_told_and_ends_with_code_1(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def other(*facts: object) -> list[object]:
        first, *rest = step_of_rank(*facts)  # type: ignore[arg-type]
        return [dataclasses.replace(first, calls=(first.calls or 0) + 1), *rest]

    config = compose_config([*SMALL, "rehearse.ranks=[0]"])
    save_resolved(config, tmp_path / RESOLVED)
    with mock.patch.object(task, "step_of_rank", other), pytest.raises(RehearsalDiffers) as caught:
        task.run(config, tmp_path)
    assert caught.value.exit_code == 1
    last = capfd.readouterr().out.strip().splitlines()[-1]
    assert last.startswith("rehearsed: the program differs from the plan: counts over ep_inter: 2 calls, ")
    assert json.loads((tmp_path / "result.json").read_text())["differs"] == [last.partition("plan: ")[2]]


@pytest.mark.slow
def test_the_pipeline_of_a_rank(tmp_path: Path) -> None:
    """All its ranks are rehearsed, the fullest one is shown, and a rank with the layers of one of them is compared."""
    done = python(
        "-m", "moecompile", *SMALL, "mesh=h100_2x8", "mesh.pp=2", "mesh.ep=8", "model.config.num_hidden_layers=4",
        "data.global_batch_size=64", "rehearse.ranks=[3,12]", "hydra.run.dir=run", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line.split() for line in done.stdout.splitlines() if line]
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["ranks"] == [3, 11, 12] and result["micro_batches"] == 3 and result["differs"] == []
    assert [(each["rank"], each["stages"]) for each in result["pipeline"]] == [(3, [0]), (11, [1])]
    fullest = max(result["pipeline"], key=lambda each: each["memory_peak_bytes"])
    assert lines[2][:4] == ["rank", str(fullest["rank"]), "of", "16,"]
    assert (result["rank"], result["memory_peak_bytes"]) == (fullest["rank"], fullest["memory_peak_bytes"])
    shown = [line for line in lines if line[:3] in (["3", "0", "2"], ["11", "1", "2"])]
    assert len(shown) == 2
    sent = {
        row["name"]: (row["calls"], row["planned_calls"], row["seen"]) for row in result["pipeline"][0]["collectives"]
    }
    crossing = 3 * 2 * 64 * 128 * 4
    assert sent["sent on"] == (4, 4, crossing + 8 * (3 + 8)) and sent["gradients received"] == (6, 6, crossing + 3 * 8)
    assert " ".join(lines[-1]) == (
        "rehearsed: the program sends and holds what the plan says, its ranks agree, and each of the 10 messages of a "
        "pipeline has its receive"
    )


@pytest.mark.nightly
def test_deepseek_v3_in_16_stages(tmp_path: Path) -> None:
    """All 61 layers on 2,048 ranks, in the CPU time of 200 times 20,000 ops on fake tensors, on any processor."""
    command = ["task=rehearse", "model=deepseek_v3", "mesh=h800_256x8", "mesh.pp=16", "hydra.run.dir=run"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "moecompile", *command], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["ranks"] == [*range(0, 2048, 128), 2047] and result["micro_batches"] == 17
    assert result["messages"] == 15 * (18 + 34) and result["differs"] == [] and result["rank"] == 0
    took = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert took < 200 * min(_ops_on_fake_tensors() for _ in range(3))


def _ops_on_fake_tensors() -> float:
    """CPU seconds of 20,000 of them, which a rehearsal consists of."""
    with fake_values():
        x, start = torch.empty(64, 64), time.process_time()
        for _ in range(20_000):
            x.add(x)
    return time.process_time() - start


def test_a_rank_that_is_not_in_the_mesh(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        task.run(compose_config([*SMALL, "rehearse.ranks=[0,4]"]), tmp_path)
    assert str(caught.value) == "rehearse.ranks=[4]: the mesh has ranks 0 to 3. Give some of these."


@pytest.mark.slow
def test_a_rank_that_fails_is_told_in_one_line(tmp_path: Path) -> None:
    """There is no config in the folder that the rank could read."""
    with pytest.raises(MoecompileError) as caught:
        task._rehearse(compose_config([*SMALL]), tmp_path, [0], 1.0)
    assert str(caught.value).startswith("rank 0 cannot be rehearsed: FileNotFoundError: ")
    assert str(caught.value).endswith(" (debug=true shows where)") and "\n" not in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ["embeddings.shard=ep"], ["embeddings.optimizer=rowwise_adagrad", "trainer.checkpointing=full"],
        ["embeddings.optimizer=lazy_adamw", "trainer.checkpointing=keep_exchanges", "mesh.dp_replicate=2"],
    ],
)  # fmt: skip
def test_lookups_send_and_hold_what_the_plan_says(overrides: list[str], tmp_path: Path) -> None:
    model = ["model.factory=tests.table_models:build", "experts.num_routed=4", "routing.top_k=2", "data.vocab_size=300"]
    size = ["mesh=cpu_1x4", "mesh.ep=2", "data.seq_len=16", "data.global_batch_size=32", "embeddings.min_numbers=300"]
    words = ["task=rehearse", *model, *size, *overrides, f"hydra.run.dir={tmp_path / 'run'}"]
    done = python("-m", "moecompile", *words, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "run" / "result.json").read_text())["collectives"]
    (sent,) = (row for row in rows if row["name"] == TABLE_ROWS)
    assert sent["calls"] == sent["planned_calls"] > 0
