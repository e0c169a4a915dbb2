"""Going on with another model, another text or a damaged checkpoint is refused, and what differs is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from moecompile.checkpoint import folders
from moecompile.checkpoint.folders import INDEX
from moecompile.errors import ConfigError
from tests.checkpoint.test_sums import flip
from tests.distributed.harness import run_distributed_test
from tests.distributed.resume_job import losses, run

STEPS = ["trainer.max_steps=2", "trainer.save_interval=1", "mesh=cpu_1"]
SENTENCE = "It was the best of times, it was the worst of times, it was the age of wisdom. {}\n"

pytestmark = pytest.mark.slow


def outcome(overrides: Sequence[str], root: Path, text: str = "text.txt") -> str:
    """`ran` or the message, for a run that goes on from the first step of `root`/old."""
    resume = f"trainer.resume={root}/old/checkpoints/step-1"
    folder = root / f"go_on_{len(list(root.iterdir()))}"
    try:
        run([*STEPS, f"data.path={root}/{text}", resume, *overrides], folder)
    except ConfigError as error:
        return str(error).replace(str(root), "ROOT")
    return f"ran {json.dumps(losses(folder))}"


CHANGES: dict[str, list[str]] = {
    "same": [],
    "free": ["optimizer.lr=0.003", "trainer.log_interval=2", "dispatch=flat", "+model.config.attention_dropout=0.1"],
    "rope": ["+model.config.rope_parameters={rope_theta:5000.0,rope_type:default}"],
    "two": [
        "model.config.num_attention_heads=4",
        "model.config.num_key_value_heads=4",
        "+model.config.rms_norm_eps=0.1",
    ],
    "accepted": ["+model.config.rms_norm_eps=0.1", "trainer.allow_changes=[model.config.rms_norm_eps]"],
    "another": ["+model.config.rms_norm_eps=0.1", "seed=3", "trainer.allow_changes=[seed]"],
    "everything": ["+model.config.rms_norm_eps=0.1", "seed=3", "trainer.allow_changes=['*']"],
}


def one_rank(rank: int, world_size: int, folder: str) -> dict[str, str]:
    root = Path(folder)
    run([*STEPS, f"data.path={root}/text.txt"], root / "old")
    found = {name: outcome(overrides, root) for name, overrides in CHANGES.items()}
    shutil.copy(root / "text.txt", root / "moved.txt")
    found["moved"] = outcome([], root, "moved.txt")
    whole = (root / "text.txt").read_text()
    (root / "text.txt").write_text(whole.replace("wisdom. 77", "wisdom. 78"))
    found["text"] = outcome([], root)
    (root / "text.txt").write_text(whole)
    checkpoint = root / "old" / "checkpoints" / "step-1"
    for name in (folders.STATE, folders.PLAN, INDEX, "__0_0.distcp"):
        kept = (checkpoint / name).read_bytes()
        flip(checkpoint / name)
        found[name] = outcome([], root)
        (checkpoint / name).write_bytes(kept)
    state = json.loads((checkpoint / folders.STATE).read_text())
    del state["fingerprint"]
    (checkpoint / folders.STATE).write_text(json.dumps(state))
    (checkpoint / folders.SUMS).unlink()
    found["no checksums"] = outcome([], root)
    plan = (checkpoint / folders.PLAN).read_text()
    (checkpoint / folders.PLAN).write_text(plan.replace("context_parallel: []\n", ""))
    found["old version"] = outcome(["+model.config.rms_norm_eps=0.1"], root)
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("function")
    (root / "text.txt").write_text("".join(SENTENCE.format(i) for i in range(4000)))
    results: dict[str, str] = run_distributed_test(one_rank, 1, str(root), timeout_s=400)[0]
    return results


def test_the_same_function_goes_on(found: dict[str, str]) -> None:
    assert found["same"].startswith("ran") and found["moved"] == found["same"]
    assert found["free"].startswith("ran") and found["free"] != found["same"]


REFUSED = "trainer.resume=ROOT/old/checkpoints/step-1: the checkpoint does not fit this run: "


def fix(names: str) -> str:
    return f" Set these as they were, start a new run, or go on all the same with trainer.allow_changes=[{names}]."


def test_another_function_is_refused_by_name(found: dict[str, str]) -> None:
    name = "model.config.rope_parameters.rope_theta"
    assert found["rope"] == f"{REFUSED}{name}: 10000.0 in the checkpoint, 5000.0 here.{fix(name)}"
    two = found["two"]
    assert two.startswith(REFUSED) and "model.config.num_attention_heads: 2 in the checkpoint, 4 here; " in two
    assert "model.config.rms_norm_eps: 1e-06 in the checkpoint, 0.1 here" in two


def test_another_text_in_the_same_place_is_refused(found: dict[str, str]) -> None:
    assert found["text"].startswith(f"{REFUSED}data.text: ")
    assert found["text"].endswith(fix("data.text")) or found["text"].endswith(fix("data.text,data.tokenizer"))


def test_changes_are_accepted_one_by_one(found: dict[str, str]) -> None:
    assert found["accepted"].startswith("ran") and found["accepted"] != found["same"]
    name = "model.config.rms_norm_eps"
    assert found["another"] == f"{REFUSED}{name}: 1e-06 in the checkpoint, 0.1 here.{fix(name)}"
    assert found["everything"].startswith("ran")


def test_a_damaged_file_is_named(found: dict[str, str]) -> None:
    for name in (folders.STATE, folders.PLAN, INDEX, "__0_0.distcp"):
        assert found[name].startswith(f"trainer.resume=ROOT/old/checkpoints/step-1: {name} has the checksum "), name


def test_a_checkpoint_of_the_first_version_goes_on_and_others_need_their_checksums(found: dict[str, str]) -> None:
    assert found["old version"].startswith("ran")
    assert "/step-1: has no checksums.json, which the version that wrote it writes" in found["no checksums"]
