"""benchmarks/layer.py: a small run, and that the products it compares with are those of the experts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

REPOSITORY = Path(__file__).parents[2]
BENCHMARKS = REPOSITORY / "benchmarks"


@pytest.mark.slow
def test_a_small_run_with_its_profile(tmp_path: Path) -> None:
    output = tmp_path / "layer.json"
    command = [sys.executable, "benchmarks/layer.py", "--dtype", "float32", "--sizes", "4,2,32,64", "--rounds", "2"]
    environ = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [*command, "--profile", "--json", str(output)],
        cwd=REPOSITORY, env=environ, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["layer"]: row for row in json.loads(output.read_text())}
    assert rows.keys() >= {"dense", "fused", "skewed", "products", "torch only", "lowered", "grouped_mm", "eager"}
    assert all(row["cpu_ms"] > 0 for row in rows.values()) and rows["dense"]["ratio"] == 1
    profiles = [line for line in done.stdout.splitlines() if "profile of" in line]
    assert len(profiles) == 2
    dense, fused = (dict(part.rsplit(" ", 2)[:2] for part in line.partition(": ")[2].split(", ")) for line in profiles)
    assert all(float(found["products"]) > 0 for found in (dense, fused))
    assert not dense.keys() & {"rows", "kernels"} and float(fused["kernels"]) > 0


def test_the_products_alone_are_those_of_the_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import layer

    experts, top_k, width, tokens = 4, 2, 8, 30
    generator = torch.Generator().manual_seed(0)
    router = torch.randn(experts, layer.HIDDEN, generator=generator)
    x = torch.randn(1, tokens, layer.HIDDEN, generator=generator)
    gate_up = torch.randn(experts, 2 * width, layer.HIDDEN, generator=generator)
    down = torch.randn(experts, layer.HIDDEN, width, generator=generator)
    counts = torch.bincount((x[0] @ router.t()).topk(top_k).indices.flatten(), minlength=experts)
    found = layer.Products(router, top_k, gate_up, down)(x)()
    for count, (grad_gate_up, grad_down) in zip(counts.tolist(), found, strict=True):
        assert grad_gate_up.shape == gate_up[0].shape and grad_down.shape == down[0].shape
        assert grad_gate_up.eq(count).all() and grad_down.eq(count).all()  # of rows of ones
    assert counts.sum() == tokens * top_k


def test_the_kernel_beside_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import few_rows

    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    native = few_rows.products.kernels()
    if native is None or not native.has_products:
        pytest.skip("no C++ compiler or no AVX512")
    called: list[str] = []
    run = type(native).__call__
    monkeypatch.setattr(
        type(native), "__call__", lambda self, name, *rest: (called.append(name), run(self, name, *rest))[1]
    )
    found = few_rows.measure(torch.float32, rows=4, rounds=1)
    assert len(found) == 6 and all(min(times) > 0 for times in found.values())
    assert len(called) == 6  # once with the kernel, once without
