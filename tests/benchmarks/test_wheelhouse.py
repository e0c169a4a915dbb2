"""benchmarks/wheelhouse.py: what it takes along, and that it installs without a network where torch is."""

from __future__ import annotations

import os
import subprocess
import sys
import venv
from importlib.metadata import distribution
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The programs of benchmarks/ import each other as scripts do."""
    monkeypatch.syspath_prepend(REPOSITORY / "benchmarks")


def test_it_takes_what_torch_and_transformers_do_not_bring() -> None:
    from wheelhouse import needed

    names = needed(PYTHON)
    assert names >= {"lightning", "hydra-core", "omegaconf", "antlr4-python3-runtime", "pytest"}
    assert "aiohttp" in names  # fsspec[http]: fsspec is there, its extra is not
    assert not names & {"torch", "transformers", "tokenizers", "safetensors", "numpy", "fsspec", "moecompile"}
    assert not [name for name in names if name.startswith(("nvidia", "triton", "cuda"))]


@pytest.mark.nightly
def test_it_installs_without_a_network_and_the_program_runs(tmp_path: Path) -> None:
    from wheelhouse import GIVEN, _closure

    wheels, bare = tmp_path / "wheelhouse", tmp_path / "bare"
    built = subprocess.run(
        [sys.executable, str(REPOSITORY / "benchmarks" / "wheelhouse.py"), "--folder", str(wheels)],
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    if built.returncode and "Connection" in built.stderr:
        pytest.skip(f"the registry cannot be reached: {built.stderr[-300:]}")
    assert built.returncode == 0, built.stdout + built.stderr
    venv.create(bare, with_pip=True)
    given = tmp_path / "given"
    given.mkdir()
    for name in _closure(GIVEN, PYTHON, known=set()):
        for file in distribution(name).files or ():
            top = file.parts[0]
            if top != ".." and not (given / top).exists():
                (given / top).symlink_to(Path(str(distribution(name).locate_file(top))))
    (site,) = bare.glob("lib/python3*/site-packages")
    (site / "given.pth").write_text(f"{given}\n")
    python = str(bare / "bin" / "python")
    subprocess.run(
        [python, "-m", "pip", "uninstall", "--quiet", "--yes", "setuptools"], check=True
    )  # torch has a newer one
    environ = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PIP_FIND_LINKS")}
    installed = subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--no-index", "--find-links", str(wheels), "moecompile", "pytest"],
        env={**environ, "PIP_CONFIG_FILE": os.devnull}, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert installed.returncode == 0, installed.stdout + installed.stderr
    part = "layer 8,2,64 float32"
    done = subprocess.run(
        [python, str(REPOSITORY / "benchmarks" / "gpu.py"), "--device", "cpu", "--parts", part],
        env=environ, cwd=tmp_path, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0 and "1 of 1 parts are ok; gpu.json" in done.stdout, done.stdout + done.stderr
