"""The table of a multirun, from the files alone."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from moecompile.report.sweep import summarize


def write_job(folder: Path, config: dict[str, Any] | None, result: dict[str, Any] | None) -> None:
    folder.mkdir()
    if config is not None:
        (folder / "resolved.yaml").write_text(yaml.safe_dump(config))
    if result is not None:
        (folder / "result.json").write_text(json.dumps(result))


def config(top_k: int, lr: float = 1e-3) -> dict[str, Any]:
    return {"name": "mixtral_ep", "routing": {"top_k": top_k}, "optimizer": {"lr": lr, "betas": [0.9, 0.95]}}


def result(loss_last: float) -> dict[str, Any]:
    return {
        "status": "ok", "loss_first": 7.5, "loss_last": loss_last, "val_loss": loss_last + 0.25,
        "max_violation_last": 0.5, "tokens_per_second": 8123.4,
        "bytes_per_token_per_layer": {"intra_node": 100.0, "inter_node": 1536.0},
    }  # fmt: skip


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    write_job(tmp_path / "0", config(1), result(4.5))
    write_job(tmp_path / "2", config(4), None)
    write_job(tmp_path / "10", config(2), result(4.125))
    write_job(tmp_path / "11", None, None)
    write_job(tmp_path / ".submitit", None, None)
    return tmp_path


def test_csv_has_the_keys_that_differ_and_every_job(sweep: Path) -> None:
    summarize(sweep)
    with (sweep / "sweep.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0])[:3] == ["job", "routing.top_k", "status"]
    assert [(r["job"], r["routing.top_k"], r["status"]) for r in rows] == [
        ("0", "1", "ok"), ("2", "4", "failed"), ("10", "2", "ok"), ("11", "", "failed"),
    ]  # fmt: skip
    assert rows[2]["loss_last"] == "4.125"
    assert rows[2]["inter_node_bytes_per_token"] == "1536.0"
    assert rows[1]["loss_last"] == ""


def test_printed_table_fits_80_columns(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summarize(sweep)
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 80 for line in lines if "sweep.csv" not in line)
    assert next(line for line in lines if line.startswith("10")).split() == [
        "10", "top_k=2", "ok", "7.5000", "4.1250", "4.3750", "0.500", "8,123", "1.50", "KiB",
    ]  # fmt: skip
    assert next(line for line in lines if line.startswith("2")).split() == ["2", "top_k=4", "failed", *"------"]
    assert lines[-1].endswith("sweep.csv")


def test_keys_with_one_last_part_are_told_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i, name in enumerate(("a", "b")):
        write_job(tmp_path / str(i), {"model": {"name": name}, "data": {"name": name}}, result(4.0))
    summarize(tmp_path)
    out = capsys.readouterr().out
    assert "model.name=a" in out
    assert "data.name=b" in out


def test_many_differing_keys_are_cut_in_print_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(2):
        write_job(tmp_path / str(i), {f"key_{n}": i for n in range(9)}, result(4.0))
    summarize(tmp_path)
    assert "3 more keys differ" in capsys.readouterr().out
    assert "key_8" in (tmp_path / "sweep.csv").read_text().splitlines()[0]


def test_neither_torch_nor_hydra_is_imported() -> None:
    code = "import sys, moecompile.report.sweep; assert not {'torch', 'hydra', 'omegaconf'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
