"""benchmarks/peers.py: a small run beside transformers, what it computes from times, and that the page shows what is
stored.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

REPOSITORY = Path(__file__).parents[2]
BENCHMARKS = REPOSITORY / "benchmarks"
STORED = BENCHMARKS / "results" / "peers.json"


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The programs of benchmarks/ import each other as scripts do."""
    monkeypatch.syspath_prepend(BENCHMARKS)


def run(*arguments: str, program: str = "peers.py") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, f"benchmarks/{program}", *arguments]
    environ = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(command, cwd=REPOSITORY, env=environ, capture_output=True, text=True, timeout=240)


def run_small(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    """What a run of two rounds stored."""
    output = tmp_path / "peers.json"
    done = run("--rounds", "2", "--results", str(output), "--page", str(tmp_path), *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = json.loads(output.read_text()).values()
    assert f"| {found['rows'][-1]['layer']} |" in done.stdout
    assert f"| {found['rows'][-1]['layer']} |" in next(tmp_path.glob("peers_*.md")).read_text()
    assert next(tmp_path.glob("peers_*.png")).read_bytes().startswith(b"\x89PNG")
    return dict(found)


@pytest.mark.slow
def test_a_small_run_beside_transformers(tmp_path: Path) -> None:
    layers = ["moecompile", "transformers grouped_mm", "transformers eager"]
    found = run_small(tmp_path, "--sizes", "4,2,32,64", "--only", *layers)
    assert [row["layer"] for row in found["rows"]] == ["limit", *layers]
    for row in found["rows"]:
        assert row["rounds"] == 2 and row["cpu_ms"] > 0 and row["wall_ms"] > 0 and row["x_limit"] > 0
        assert 64 * 512 * 2 / 2**20 <= row["kept_mib"] <= row["peak_mib"] < 50  # at least the output, bf16
        if row["layer"] != "limit":
            assert set(row["errors"]) == {"output", "input", "gate_up", "down", "router"}
            assert 0 < max(row["errors"].values()) < 0.02
    assert found["versions"].keys() == {"torch", "transformers"}


@pytest.mark.slow
def test_two_ranks_send_what_the_dispatch_says(tmp_path: Path) -> None:
    names = ["flat", "allgather", "auto", "dedup"]
    layers = [*(f"moecompile {name}" for name in names), "transformers all_to_all"]
    found = run_small(tmp_path, "--ranks", "2", "--sizes", "8,2,64,512", "--only", *layers)
    rows = {row["layer"]: row for row in found["rows"]}
    assert rows.keys() == {"limit", *layers}
    if found["namespace"] != "own":
        pytest.skip("no network namespace: other programs' bytes are counted too")
    assert 1 <= found["counter_x"] < 1.05
    assert rows["limit"]["sent_mib"] < 0.01
    # Half of the rows go to the other rank: dispatch and combine, forward and backward, bf16.
    flat = 4 * 512 * 2 / 2 * 512 * 2 / 2**20
    for name in ("moecompile flat", "transformers all_to_all"):
        assert rows[name]["sent_mib"] == pytest.approx(flat, rel=0.1)
    assert rows["moecompile dedup"]["sent_mib"] < 0.95 * flat


@pytest.mark.slow
def test_two_nodes_send_over_the_link_what_the_dispatch_says(tmp_path: Path) -> None:
    import nodes

    if reason := nodes.why_not():
        pytest.skip(f"two nodes cannot be made here: {reason}")
    layers = ["moecompile flat", "moecompile hierarchical", "moecompile auto", "transformers all_to_all"]
    found = run_small(tmp_path, "--ranks", "4", "--link-mbit", "1000", "--sizes", "16,4,64,512", "--only", *layers)
    rows = {row["layer"]: row for row in found["rows"]}
    assert rows.keys() == {"limit", *layers} and found["link_mbit"] == 1000
    assert 1 <= found["counter_x"] < 1.05
    assert rows["limit"]["sent_mib"] < 0.01
    # Half of a rank's rows go to the other node: dispatch and combine, forward and backward, bf16.
    flat = 4 * 512 * 4 / 2 * 512 * 2 / 2**20
    for name in ("moecompile flat", "transformers all_to_all"):
        assert rows[name]["sent_mib"] == pytest.approx(flat, rel=0.1)
    # Hierarchical: a token crosses once if any of its four experts is there, 1 - C(8, 4) / C(16, 4) of them.
    once = 4 * 512 * (1 - 70 / 1820) * 512 * 2 / 2**20
    assert rows["moecompile hierarchical"]["sent_mib"] == pytest.approx(once, rel=0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sizes", "4,8,32,64"], "'4,8,32,64' is no size: give experts,top-k,width,tokens"),
        (["--sizes", "4,2,32"], "'4,2,32' is no size"),
        (["--ranks", "3"], "64 experts cannot be spread over 3 ranks"),
        (["--rounds", "0"], "--ranks and --rounds start at 1"),
        (
            ["--ranks", "4", "--link-mbit", "0"],
            "--link-mbit is a positive rate, of a link between two halves of --ranks",
        ),
        (["--link-mbit", "1000"], "--link-mbit is a positive rate, of a link between two halves of --ranks"),
    ],
)
def test_options_are_checked(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import peers

    monkeypatch.setattr(sys, "argv", ["peers.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        peers.options()
    assert ended.value.code == 2 and message in capsys.readouterr().err


def test_a_peer_that_is_not_installed_is_named_with_how_to_install_it() -> None:
    from side_by_side import registry

    entries = {"limit": registry.ONE_RANK["limit"], "x": registry.Entry(registry.DenseLayer, "no-such-peer")}
    chosen, missing = registry.choose(entries, None)
    assert list(chosen) == ["limit"]
    with pytest.raises(ValueError, match="--only 'nobody': there is limit, x"):
        registry.choose(entries, ["nobody"])
    assert missing == {"x": f"no-such-peer is not installed: {registry.INSTALL}"}
    half = registry.Entry(registry.DenseLayer, "torch", ("no_such_module",))
    _, missing = registry.choose({"x": half}, None)
    assert "needs no_such_module, which is not installed: make peers" in missing["x"]


def test_a_layer_with_other_weights_is_found() -> None:
    from side_by_side.agreement import Reference, require
    from side_by_side.common import Place, Size, Weights
    from side_by_side.hugging_face import TransformersLayer

    size = Size.parse("4,2,32,64")
    weights = Weights.random(size)
    reference = Reference(size, weights, Place())
    require("same", reference.errors(TransformersLayer(size, weights, Place(), "eager")))
    swapped = Weights(weights.router_ED, weights.gate_up_EHD.flip(0), weights.down_EDF)
    with pytest.raises(SystemExit, match="swapped does not compute"):
        require("swapped", reference.errors(TransformersLayer(size, swapped, Place(), "eager")))
    with pytest.raises(SystemExit):
        require("nan", {"output": float("nan")})


def test_memory_counts_what_ops_allocate_and_free() -> None:
    from side_by_side.memory import _profile, allocated

    x = torch.randn(1024, 256)  # 1 MiB
    with _profile() as profile:
        kept = (x + 1) + (x + 2)  # two more at the same time
    now, most = allocated(profile)
    assert now == kept.nbytes == 2**20
    assert most == 3 * 2**20


def test_ratios_are_medians_within_rounds() -> None:
    from side_by_side.one_rank import summary
    from side_by_side.report import verdicts

    times = {
        "limit": {3: (1.0, 1.0), 4: (2.0, 2.0), 5: (4.0, 4.0)},
        "moecompile": {3: (2.0, 3.0), 4: (4.0, 5.0), 5: (8.0, 9.0)},
        "slow": {3: (8.0, 9.0)},
    }
    found = summary(times, "moecompile")
    assert found["moecompile"] == {"cpu_ms": 4000, "wall_ms": 5000, "x_limit": 2.0, "ours_x": 1.0, "rounds": 3}
    assert found["slow"] == {"cpu_ms": 8000, "wall_ms": 9000, "x_limit": 8.0, "ours_x": 0.25, "rounds": 1}
    rows = [{"size": "4,2,32,64", "layer": name, **row} for name, row in found.items()]
    assert verdicts(rows) == ["4,2,32,64: moecompile takes 0.50 x the CPU time of slow"]
    sent = {"limit": 0.0, "moecompile": 3.0, "slow": 2.0}
    (line,) = verdicts([row | {"sent_mib": sent[row["layer"]]} for row in rows])
    assert "of slow (aim: at most 0.8, met); moecompile sends 1.50 x the bytes of slow (aim: at most 1, missed)" in line


def test_the_counter_counts_what_crosses_the_loopback() -> None:
    from side_by_side.wire import sent_bytes

    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as sender:
        receiver, _ = server.accept()
        before = sent_bytes("lo")
        sender.sendall(bytes(10_000))
        with receiver:
            assert len(receiver.recv(10_000, socket.MSG_WAITALL)) == 10_000
    assert sent_bytes("lo") - before >= 10_000


@pytest.mark.nightly
def test_whole_models_are_the_same_and_take_turns(tmp_path: Path) -> None:
    for ranks, models in (
        ("1", {"moecompile", "transformers grouped_mm", "transformers eager", "limit"}),
        ("2", {"moecompile auto", "moecompile flat"}),
    ):
        results = tmp_path / "full_models.json"
        size = ["--families", "mixtral", "--hidden", "128", "--rounds", "1", "--sequences", "1", "--ranks", ranks]
        done = run("--results", str(results), "--page", str(tmp_path), *size, program="full_models.py")
        assert done.returncode == 0, done.stdout + done.stderr
        found = json.loads(results.read_text())[f"ranks_{ranks}"]
        rows = {row["model"]: row for row in found["rows"]}
        assert rows.keys() >= models
        for row in rows.values():
            assert row["tokens_per_cpu_second"] > 0 and row["optimizer_ms"] < row["cpu_ms"]
            if row["model"] != "limit":
                assert row["errors"]["logits"] < 1e-3 and row["errors"]["step"] < 2e-2


# -- what is stored ------------------------------------------------------------------------------------------------


def test_the_page_shows_what_is_stored() -> None:
    from side_by_side import report

    page = (REPOSITORY / "docs" / "understand" / "peers.md").read_text()
    for name, text_of in (("peers", report.layers_page), ("full_models", report.models_page)):
        stored = json.loads((BENCHMARKS / "results" / f"{name}.json").read_text())
        for key, found in stored.items():
            part = f"{name}_{key.removeprefix('ranks_')}.md"
            assert f'--8<-- "docs/assets/{part}"' in page
            assert (REPOSITORY / "docs" / "assets" / part).read_text() == text_of(found)


def test_all_peers_took_part_in_what_is_stored() -> None:
    from side_by_side import registry

    stored = json.loads(STORED.read_text())
    for key, entries in (("ranks_1", registry.ONE_RANK), ("ranks_2", registry.MANY_RANKS)):
        assert stored[key]["missing"] == {}
        assert {row["layer"] for row in stored[key]["rows"]} == entries.keys()
    assert stored["ranks_1"]["versions"].keys() == {
        "torch", "transformers", "torchtitan", "deepspeed", "megatron-core"
    }  # fmt: skip
