"""The native kernels are compiled once, however many ranks ask for them at the same time."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

COMPILER = """#!{python}
import pathlib, subprocess, sys, time
with pathlib.Path({calls!r}).open("a") as calls:
    calls.write("called\\n")
time.sleep(1)  # so that the others come meanwhile
sys.exit(subprocess.call([{compiler!r}, *(word for word in sys.argv[1:] if not word.startswith("-O"))]))
"""
PROGRAM = "from moecompile.ops.cpu.native import kernels; print(kernels() is not None)"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
def test_ranks_that_need_it_at_the_same_time_build_it_once(tmp_path: Path) -> None:
    calls, wrapper = tmp_path / "calls", tmp_path / "slow-c++"
    wrapper.write_text(COMPILER.format(python=sys.executable, calls=str(calls), compiler=shutil.which("g++")))
    wrapper.chmod(0o755)
    environment = {**os.environ, "CXX": str(wrapper), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    ranks = [
        subprocess.Popen([sys.executable, "-c", PROGRAM], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    assert [rank.communicate(timeout=170)[0].strip() for rank in ranks] == ["True"] * 3
    assert calls.read_text().count("called") == 1
    assert len(list((tmp_path / "cache" / "moecompile").glob("*.so"))) == 1
