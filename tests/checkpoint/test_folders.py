"""Names, the pointer, what is kept, what a crash leaves behind."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from moecompile.atomic import write_text
from moecompile.checkpoint import folders
from moecompile.errors import ConfigError
from tests.killed import killed_at


def save(checkpoints: Path, step: int, keep_last: int = 0) -> Path:
    tmp = folders.unfinished(folders.step_folder(checkpoints, step))
    tmp.mkdir(parents=True)
    write_text(tmp / folders.STATE, "{}")
    return folders.finish(checkpoints, step, keep_last)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_latest_is_a_link_and_old_ones_go(tmp_path: Path) -> None:
    for step in (8, 9, 10, 100):
        assert save(tmp_path, step, keep_last=2) == tmp_path / f"step-{step}"
        assert (tmp_path / "latest").readlink() == Path(f"step-{step}")
    assert names(tmp_path) == ["latest", "step-10", "step-100"]
    assert folders.steps(tmp_path) == [10, 100]
    assert folders.latest(tmp_path) == tmp_path / "step-100"


def test_zero_keeps_all(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, keep_last=0)
    assert folders.steps(tmp_path) == [1, 2, 3]


def test_a_folder_that_was_cut_off_is_no_checkpoint(tmp_path: Path) -> None:
    assert folders.latest(tmp_path / "nothing") is None
    (tmp_path / "step-5.tmp").mkdir()
    (tmp_path / "step-6").mkdir()  # nobody renames a folder without its state; a hand may have emptied it
    assert folders.steps(tmp_path) == [] and folders.latest(tmp_path) is None


def test_killed_between_rename_and_link(tmp_path: Path) -> None:
    save(tmp_path, 1)
    second = save(tmp_path, 2)
    (tmp_path / "latest").unlink()
    (tmp_path / "latest").symlink_to("step-1")
    assert folders.latest(tmp_path) == tmp_path / "step-1"  # whole, if older
    shutil.rmtree(tmp_path / "step-1")
    assert folders.latest(tmp_path) == second


def test_going_on_moves_aside_what_will_be_written_again(tmp_path: Path) -> None:
    """What is aside is a run directory of its own, out of the way of `auto` and of `keep_last`."""
    checkpoints, aside = folders.checkpoints_of(tmp_path), tmp_path / "replaced-1"
    for step in (1, 2, 3, 4):
        save(checkpoints, step)
    (checkpoints / "step-5.tmp").mkdir()
    (checkpoints / ".latest.0a1b2c3d.tmp").symlink_to("step-5")
    (checkpoints / "mine.tmp").write_text("of the user")
    (tmp_path / "metrics.csv").write_text("step,loss\n4,1.0\n")
    assert folders.set_aside(tmp_path, 2) == aside
    assert names(checkpoints) == ["latest", "mine.tmp", "step-1", "step-2"]
    assert folders.latest(checkpoints) == checkpoints / "step-2"
    assert names(aside / "checkpoints") == ["latest", "step-3", "step-4"]
    assert folders.find(str(aside), tmp_path) == aside / "checkpoints" / "step-4"
    assert (aside / "metrics.csv").read_text() == (tmp_path / "metrics.csv").read_text()
    assert "a run went on from step 2, and writes later steps again" in (aside / "README.txt").read_text()
    for step in (3, 4, 5):
        save(checkpoints, step, keep_last=2)
    assert names(checkpoints) == ["latest", "mine.tmp", "step-4", "step-5"]
    assert names(aside / "checkpoints") == ["latest", "step-3", "step-4"]
    assert folders.set_aside(tmp_path, 5) is None and folders.set_aside(tmp_path, 4) == tmp_path / "replaced-2"


@pytest.mark.parametrize("moment", range(6))
def test_killed_while_it_moves_aside_nothing_is_lost(moment: int, tmp_path: Path) -> None:
    checkpoints = folders.checkpoints_of(tmp_path)
    for step in (2, 4, 6):
        save(checkpoints, step)
    with killed_at(moment, (folders, "_point"), (Path, "rename")):
        folders.set_aside(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.rglob("step-*")) == ["step-2", "step-4", "step-6"]
    assert folders.latest(checkpoints) == checkpoints / ("step-6" if moment == 0 else "step-2")
    folders.set_aside(tmp_path, 2)
    assert folders.steps(checkpoints) == [2]
    assert sorted(path.parent.name for path in tmp_path.rglob("step-*/state.json")) == ["step-2", "step-4", "step-6"]


def test_what_resume_may_name(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert folders.find("auto", run) is None
    checkpoints = folders.checkpoints_of(run)
    step = save(checkpoints, 7)
    for name in (run, checkpoints, checkpoints / "latest", step):
        assert folders.find(str(name), tmp_path / "other") == step
    assert folders.find("auto", run) == step
    with pytest.raises(ConfigError) as caught:
        folders.find(str(tmp_path), run)
    assert str(caught.value) == (
        f"trainer.resume={tmp_path}: there is no whole checkpoint. "
        "Give a run directory, one of its checkpoints/step-N, or auto."
    )


@pytest.mark.parametrize("moment", range(12))
def test_killed_while_a_folder_is_replaced_a_whole_one_is_found(moment: int, tmp_path: Path) -> None:
    """Lightning's `last.ckpt`; the third save, which is killed too, begins with what the second one has left."""

    def save(text: str) -> None:
        with folders.whole_folder(path, is_first_rank=True, barrier=lambda: None) as folder:
            (folder / "one").write_text(text)
            (folder / "two").write_text(text)

    def found() -> str:
        folder = folders.whole(path)
        folders.check(folder, ["one", "two"])
        assert (folder / "one").read_text() == (folder / "two").read_text()
        return (folder / "one").read_text()

    path = tmp_path / "last.ckpt"
    save("1")
    kept = "1"
    for text in ("2", "3"):
        with killed_at(moment, (folders, "sync"), (Path, "rename"), (shutil, "rmtree")):
            save(text)
        assert kept <= (kept := found()) <= text
    save("4")
    assert found() == "4" and names(tmp_path) == ["last.ckpt"]


def test_a_file_is_replaced_by_a_folder_more_than_once(tmp_path: Path) -> None:
    """Lightning's checkpoint of another strategy is a file."""
    path = tmp_path / "last.ckpt"
    path.write_text("a file")
    for text in ("1", "2"):
        with folders.whole_folder(path, is_first_rank=True, barrier=lambda: None) as folder:
            (folder / "one").write_text(text)
    assert (path / "one").read_text() == "2" and names(tmp_path) == ["last.ckpt"]


def _save(path: Path) -> None:
    with folders.whole_folder(path, is_first_rank=True, barrier=lambda: None) as folder:
        (folder / "one").write_text("new")


def test_a_folder_with_something_else_is_not_replaced(tmp_path: Path) -> None:
    """A run, the folder of other checkpoints, and notes beside the files of one."""
    path = tmp_path / "checkpoints"
    path.mkdir()
    _save(path)  # an empty one
    for other in ("last.ckpt/one", "notes.txt"):
        (path / other).parent.mkdir(exist_ok=True)
        (path / other).write_text("mine")
        before = sorted(tmp_path.rglob("*"))
        name = other.partition("/")[0]
        with pytest.raises(ConfigError, match=rf"^filepath=.*checkpoints: holds {name}, which is of no checkpoint"):
            _save(path)
        assert sorted(tmp_path.rglob("*")) == before
        (path / other).rename(tmp_path / "aside")
        if (path / name).is_dir():
            (path / name).rmdir()
    _save(path)
    (path / folders.SUMS).unlink()  # as version 0.1.0 wrote it
    with pytest.raises(ConfigError, match="holds one, which is of no checkpoint"):
        _save(path)
    (path / folders.INDEX).touch()
    _save(path)
    (path / ".DS_Store").touch()
    _save(path)
    assert names(path) == [folders.SUMS, "one"]


def test_a_copy_of_the_user_beside_a_checkpoint_stays(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    _save(path)
    shutil.copytree(path, tmp_path / "last.ckpt.old")
    _save(path)
    assert names(tmp_path) == ["last.ckpt", "last.ckpt.old"]
