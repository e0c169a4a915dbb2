"""Routes on disk: recorded on one mesh, replayed on another; folders that do not fit are refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
import yaml

from moecompile.errors import ConfigError
from moecompile.nn.replay import ReplayLayer
from moecompile.runtime.routes import _Place, _Recorder, check_data, check_fits, create, open_routes
from tests.tasks.test_train import TINY, losses_of, moecompile

LAYERS = (ReplayLayer("a.router", 8, 2), ReplayLayer("b.router", 8, 3))
SIZE = {"steps": 2, "sequences": 4, "tokens": 5}
DATA = {"seed": 0, "data.path": "a.txt", "data.val_fraction": 0.05, "data.text": "4f", "data.tokenizer": "9c"}


def written(folder: Path, layers: tuple[ReplayLayer, ...] = LAYERS) -> Path:
    create(folder, layers, DATA, **SIZE)
    return folder


def test_a_new_folder_has_no_records(tmp_path: Path) -> None:
    assert create(tmp_path / "routes", LAYERS, DATA, **SIZE) and not create(tmp_path / "routes", LAYERS, DATA, **SIZE)
    routes = open_routes(tmp_path / "routes")
    assert routes.ids.shape == (2, 4, 5, 2, 3) and routes.ids.dtype == np.uint8 and routes.layers == LAYERS
    assert (np.asarray(routes.ids) == routes.unknown).all() and routes.unknown == 255


def test_many_experts_take_two_bytes(tmp_path: Path) -> None:
    for count, dtype in ((254, np.uint8), (255, np.uint16), (256, np.uint16)):
        folder = written(tmp_path / str(count), (ReplayLayer("a", count, 1),))
        assert open_routes(folder).ids.dtype == dtype


def test_records_stay_when_a_run_goes_on(tmp_path: Path) -> None:
    routes = open_routes(written(tmp_path / "routes"), writable=True)
    routes.ids[1, 2] = 7
    routes.ids.flush()
    assert (np.asarray(open_routes(written(tmp_path / "routes")).ids[1, 2]) == 7).all()
    with pytest.raises(ConfigError, match=r"routing.replay=record: .* has routes of another run"):
        create(tmp_path / "routes", LAYERS, DATA, **{**SIZE, "steps": 3})
    with pytest.raises(ConfigError, match=r"routing.replay=record: .* has routes of another run"):
        create(tmp_path / "routes", LAYERS, {**DATA, "seed": 1}, **SIZE)
    create(tmp_path / "routes", LAYERS, {**DATA, "data.path": "moved.txt"}, **SIZE)
    as_format_1(tmp_path / "routes")
    create(tmp_path / "routes", LAYERS, {**DATA, "seed": 1}, **SIZE)  # it does not say


@pytest.mark.parametrize("how", ["a step", "no step", "another rank"])
def test_steps_that_a_run_does_not_reach_have_no_routes_of_a_run_before(
    how: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It goes on from step 1 of 4, and is ended after one more, or before. The first rank removes; all wait for it."""
    nobody: Any = None
    calls: list[str] = []
    monkeypatch.setattr(dist, "barrier", lambda: calls.append("barrier"))
    size = {**SIZE, "steps": 4}
    create(tmp_path / "routes", LAYERS, DATA, **size)
    routes = open_routes(tmp_path / "routes", writable=True)
    routes.ids[:] = 7
    recorder = _Recorder(routes, _Place(0, 2, 1, 1), forgets=how != "another rank")
    if how != "no step":
        recorder._unwritten.append(((1, slice(0, 2)), np.array(3)))
        recorder.step_ended(nobody, nobody)
    recorder.ended(nobody)
    ids, rest = np.asarray(open_routes(tmp_path / "routes").ids), 7 if how == "another rank" else routes.unknown
    assert (ids[0] == 7).all() and (ids[2:] == rest).all() and calls == ["barrier"]
    assert (ids[1, :2] == (routes.unknown if how == "no step" else 3)).all() and (ids[1, 2:] == rest).all()


@pytest.mark.parametrize(
    ("layers", "size", "message"),
    [
        (LAYERS[:1], SIZE, "has routes for 2 layers, model has 1"),
        ((LAYERS[0], ReplayLayer("b.router", 8, 2)), SIZE, r"b.router \(top 3 of 8\), of the model b.router \(top 2"),
        (LAYERS, {**SIZE, "sequences": 8}, "has routes for 4 sequences, data.global_batch_size has 8"),
        (LAYERS, {**SIZE, "tokens": 6}, "has routes for 5 tokens, data.seq_len has 6"),
        (LAYERS, {**SIZE, "steps": 3}, "has routes of 2 steps, trainer.max_steps=3"),
    ],
)
def test_what_does_not_fit(layers: Any, size: dict[str, int], message: str, tmp_path: Path) -> None:
    folder = written(tmp_path / "routes")
    check_fits(open_routes(folder), folder, LAYERS, **{**SIZE, "steps": 1})
    with pytest.raises(ConfigError, match=message):
        check_fits(open_routes(folder), folder, layers, **size)


def as_format_1(folder: Path) -> None:
    head = yaml.safe_load((folder / "routes.yaml").read_text())
    del head["data"]
    (folder / "routes.yaml").write_text(yaml.safe_dump({**head, "format": 1}))


def test_other_tokens_do_not_fit(tmp_path: Path) -> None:
    """Another seed or text; the place of the text does not matter. Routes of format 1 are read, and cannot say."""
    folder = written(tmp_path / "routes")
    assert check_data(open_routes(folder), folder, {**DATA, "data.path": "moved.txt"})
    with pytest.raises(ConfigError) as caught:
        check_data(open_routes(folder), folder, {**DATA, "seed": 1, "data.text": "5a"})
    assert str(caught.value) == (
        f"routing.replay={folder}: has routes of other tokens (seed: 0 in the record, 1 here; data.text: 4f in the "
        "record, 5a here). Use the config with which they were recorded."
    )
    as_format_1(folder)
    check_fits(open_routes(folder), folder, LAYERS, **SIZE)
    assert not check_data(open_routes(folder), folder, {**DATA, "seed": 1})


def test_damaged_folders(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"routes\.yaml cannot be read"):
        open_routes(tmp_path)
    folder = written(tmp_path / "routes")
    np.save(folder / "ids.npy", np.zeros((2, 4)))
    with pytest.raises(ConfigError, match=r"ids.npy has the shape \(2, 4\), routes.yaml says \(2, 4, 5, 2, 3\)"):
        open_routes(folder)
    (folder / "ids.npy").write_bytes(b"no array")
    with pytest.raises(ConfigError, match=r"ids\.npy cannot be read"):
        open_routes(folder)
    (folder / "routes.yaml").write_text("format: 9")
    with pytest.raises(ConfigError, match="is not of format 1 or 2"):
        open_routes(folder)


@pytest.mark.slow
def test_recorded_on_one_rank_and_replayed_on_two(tmp_path: Path) -> None:
    """Losses are those of the recorded run; with other routes in the file they are not. On four ranks the same is
    recorded: the file has the order of one process.
    """
    recorded = moecompile([*TINY, "mesh=cpu_1", "routing.replay=record", "hydra.run.dir=one"], tmp_path)
    assert recorded.returncode == 0, recorded.stderr
    wanted, ids = losses_of(tmp_path / "one"), np.load(tmp_path / "one" / "routes" / "ids.npy")
    assert (ids < 16).all()  # every token of every step

    def replayed(name: str, source: str) -> list[float]:
        done = moecompile([*TINY, "mesh=cpu_1x2", f"routing.replay={source}", f"hydra.run.dir={name}"], tmp_path)
        assert done.returncode == 0, done.stderr
        return losses_of(tmp_path / name)

    assert replayed("two", str(tmp_path / "one")) == pytest.approx(wanted, rel=1e-5)
    another = [*TINY, "mesh=cpu_1x2", f"routing.replay={tmp_path / 'one'}", "seed=1", "hydra.run.dir=another"]
    refused = moecompile(another, tmp_path)
    assert refused.returncode == 2 and "has routes of other tokens (seed: 0 in the record, 1 here)" in refused.stderr
    other = tmp_path / "other"
    shutil.copytree(tmp_path / "one" / "routes", other)
    np.save(other / "ids.npy", (ids + 1) % 16)
    assert replayed("changed", str(other)) != pytest.approx(wanted, rel=1e-5)
    four = moecompile([*TINY, "mesh=cpu_2x2", "routing.replay=record", "hydra.run.dir=four"], tmp_path)
    assert four.returncode == 0, four.stderr
    same = np.load(tmp_path / "four" / "routes" / "ids.npy")
    # Step 0, before weights differ by rounding; scores may nearly tie.
    assert (np.sort(same[0]) == np.sort(ids[0])).mean() > 0.995


@pytest.mark.slow
def test_routes_of_another_config_are_one_message(tmp_path: Path) -> None:
    written(tmp_path / "routes")
    refused = moecompile([*TINY, "mesh=cpu_1x2", "routing.replay=routes", "hydra.run.dir=run"], tmp_path)
    assert (
        refused.returncode == 2
        and "error: routing.replay=" in refused.stderr
        and "layer 0 of the routes" in (refused.stderr)
    )
