"""result.json: atomic, flat, valid JSON."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import pytest

from moecompile.report.result import write_result

HEAD = ("train", "deepseek_ep")


def test_versions_are_added_and_the_rest_is_kept(tmp_path: Path) -> None:
    returned = write_result(tmp_path, *HEAD, {"loss_last": 3.25, "sites": [{"fqn": "mlp"}]})
    found = json.loads((tmp_path / "result.json").read_text())
    assert list(found) == ["task", "recipe", "status", "seconds", "report", "versions", "loss_last", "sites"]
    assert {name: value for name, value in found.items() if name != "versions"} == returned
    assert (returned["status"], returned["seconds"] > 0) == ("ok", True)
    assert found["versions"]["python"] == platform.python_version()
    assert set(found["versions"]) == {"python", "torch", "transformers", "lightning", "moecompile"}
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


def test_numbers_that_json_cannot_write_become_null(tmp_path: Path) -> None:
    write_result(tmp_path, *HEAD, {"val_loss": float("nan"), "bytes": {"intra_node": float("inf")}, "rows": (1.0,)})
    found = json.loads((tmp_path / "result.json").read_text())
    assert (found["val_loss"], found["bytes"], found["rows"]) == (None, {"intra_node": None}, [1.0])


def test_a_failed_write_leaves_the_old_result(tmp_path: Path) -> None:
    write_result(tmp_path, *HEAD, {})
    before = (tmp_path / "result.json").read_text()
    with pytest.raises(TypeError):
        write_result(tmp_path, *HEAD, {"path": tmp_path})
    assert (tmp_path / "result.json").read_text() == before
