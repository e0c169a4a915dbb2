"""benchmarks/gpu.py on a CPU: its checks hold there and can fail, and its report tells what failed and what was skipped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

REPOSITORY = Path(__file__).parents[2]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The programs of benchmarks/ import each other as scripts do."""
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")


def test_every_recipe_without_pretrained_weights_is_checked() -> None:
    from on_gpu.correct import recipes

    names = {path.stem for path in (REPOSITORY / "recipes").glob("*.yaml")}
    assert names - set(recipes()) == {"upcycle_bert", "upcycle_smollm2"}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_recipe_is_what_it_is_in_float64(precision: str) -> None:
    from on_gpu.correct import check_recipe

    found = check_recipe("nemotron3", CPU, precision)
    assert found["ok"] and 0 < found["gradients"] < found["limits"]["gradients"] <= 0.2


def test_a_device_that_computes_something_else_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from on_gpu import correct

    plain = correct._step

    def off(*arguments: Any) -> dict[str, torch.Tensor]:
        found = plain(*arguments)
        if arguments[3] is torch.float32:
            name = next(name for name in found if name.endswith("down_proj"))
            found[name] = found[name] * 1.001
        return found

    monkeypatch.setattr(correct, "_step", off)
    monkeypatch.setattr(correct, "TIMES", 0.0)  # both sides are this CPU
    found = correct.check_recipe("nemotron3", CPU, "fp32")
    assert not found["ok"] and found["worst_name"].endswith("down_proj") and found["worst"] > 9e-4


def test_layers_agree_and_what_needs_a_gpu_is_left_out() -> None:
    from on_gpu.layer import SMALL, measure

    found = measure(SMALL[0], CPU, torch.float32, rounds=1)
    assert found["ok"] and found["layers"].keys() == {"transformers", "moecompile", "grouped", "dense"}
    assert all(row["kernels"] is None and row["waits"] is None for row in found["layers"].values())
    assert found["layers"]["dense"]["ratio"] == 1.0


def test_a_layer_with_other_weights_does_not_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    from on_gpu import layer

    class Wrong(layer.Grouped):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 1.01

    monkeypatch.setattr(layer, "Grouped", Wrong)
    found = layer.measure(layer.SMALL[0], CPU, torch.float32, rounds=1)
    assert not found["ok"] and found["errors"]["grouped"]["output"] > 9e-3 > found["errors"]["moecompile"]["output"]


@pytest.mark.nightly
def test_two_ranks_are_one_process_and_a_missing_sum_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from on_gpu import ranks

    assert ranks.check("dedup", CPU, tmp_path)["ok"]
    alone = ranks._alone(ranks._config("dedup"))
    name = next(name for name in alone["grads"] if "router" in name)
    alone["grads"][name] *= 2
    monkeypatch.setattr(ranks, "_alone", lambda config: alone)
    monkeypatch.setattr(ranks.mp, "spawn", lambda *args, **kwargs: None)  # the files are there
    found = ranks.check("dedup", CPU, tmp_path)
    assert not found["ok"] and found["gradients"] == pytest.approx(0.5, rel=1e-3)


@pytest.mark.nightly
def test_a_smoke_run_of_whole_runs(tmp_path: Path) -> None:
    wanted = ["memory fp32", "train bf16_params"]
    done, report = program(tmp_path, ";".join(wanted))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" in report["machine"]
    assert sorted(part["name"] for part in report["parts"]) == wanted
    assert all(part["status"] == "ok" for part in report["parts"])


def program(folder: Path, parts: str) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    command = [sys.executable, str(REPOSITORY / "benchmarks" / "gpu.py"), "--device", "cpu", "--parts", parts]
    done = subprocess.run(
        [*command, "--report", str(folder / "gpu.json")], cwd=folder, capture_output=True, text=True, timeout=400,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    return done, json.loads((folder / "gpu.json").read_text())


def test_a_failure_is_told_with_its_reason_and_ends_only_its_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gpu

    def broken(_: Path) -> dict[str, Any]:
        raise RuntimeError("CUDA error: an illegal memory access")

    monkeypatch.setattr(
        gpu, "parts", lambda device: {"layer x": broken, "layer y": lambda _: {"ok": False, "off": 0.5}}
    )
    entries = []
    for name in ("layer x", "layer y"):
        assert gpu._run_one(name, "cpu", tmp_path / "part.json") == 1
        entries.append({"name": name, "seconds": 1.0, **json.loads((tmp_path / "part.json").read_text())})
    assert [entry["status"] for entry in entries] == ["failed", "wrong"]
    assert "illegal memory access" in gpu._line(entries[0]) and "off 0.5" in gpu._line(entries[1])
    assert gpu._summary({"parts": entries}, tmp_path / "gpu.json") == 1


def test_without_a_gpu_the_program_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import gpu

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    assert gpu.main() == 2
    assert "finds no GPU here: --device cpu" in capsys.readouterr().err


def test_products_on_a_gpu_use_no_scratch_memory_of_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decided from the device alone; meta stands for it."""
    from moecompile.ops.cpu.blocks import make_blocks
    from moecompile.ops.cpu.products import Products, faster_wide

    monkeypatch.setenv("MOECOMPILE_WIDE_PRODUCTS", "1")
    faster_wide.cache_clear()
    try:
        wide = [Products(torch.empty(0, dtype=torch.bfloat16, device=device)).is_wide for device in ("cpu", "meta")]
    finally:
        faster_wide.cache_clear()
    assert wide == [True, False]
    counts = torch.full((8,), 4096)
    blocks = {
        device: make_blocks(counts, torch.empty(8, 64, device=device), 64, pad=False)[0] for device in ("cpu", "meta")
    }
    assert len(blocks["cpu"]) == 8 and len(blocks["meta"]) == 2  # of 12 MiB each
