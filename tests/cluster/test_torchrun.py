"""torchrun on two nodes: network namespaces with a link between them, and no other way."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tests.cluster.slow_model import SMALL
from tests.cluster.slurm import processes
from tests.distributed.resume_job import losses
from tests.distributed.test_external_launch import errors

REPOSITORY = Path(__file__).parents[2]
RUN = (
    *SMALL, "mesh.ranks_per_node=1", "data.micro_batch_size=1", "optimizer.warmup_steps=2", "trainer.max_steps=5",
)  # fmt: skip

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def nodes() -> ModuleType:
    """benchmarks/nodes.py, which is no module of a package."""
    spec = importlib.util.spec_from_file_location("nodes", REPOSITORY / "benchmarks" / "nodes.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def start(node: int, name: str, nodes: ModuleType, flags: bool, *overrides: str) -> subprocess.Popen[str]:
    """torchrun on one of the nodes, told by flags, or by the variables that a PyTorchJob sets."""
    told = {
        "nnodes": "2", "nproc_per_node": "1", "node_rank": str(node), "master_addr": nodes.ADDRESSES[0],
        "master_port": "29500",
    }  # fmt: skip
    command = ["ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run"]
    command += [word for key, value in told.items() for word in (f"--{key}", value) if flags]
    variables = {} if flags else {f"PET_{key.upper()}": value for key, value in told.items()}
    environ = {**os.environ, **variables, "GLOO_SOCKET_IFNAME": nodes.INTERFACE, "PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen(
        [*command, "-m", "moecompile", *RUN, *overrides], cwd=REPOSITORY, env=environ, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def test_two_nodes_train_as_one_and_a_wrong_count_is_told_once(nodes: ModuleType, tmp_path: Path) -> None:
    if reason := nodes.why_not():
        pytest.skip(f"NOT TESTED on two nodes: {reason}")
    two, one, wrong = (tmp_path / name for name in ("two", "one", "wrong"))
    with nodes.two_nodes(1000) as names:
        for run_dir, count in ((two, 2), (wrong, 4)):
            each = [
                start(node, name, nodes, run_dir == wrong, f"mesh.num_nodes={count}", f"hydra.run.dir={run_dir}")
                for node, name in enumerate(names)
            ]
            said = [process.communicate(timeout=200)[0] for process in each]
            if run_dir == two:
                assert [process.returncode for process in each] == [0, 0], said
            else:
                assert all(process.returncode for process in each)
                assert [line for text in said for line in errors(text)] == [
                    "mesh.num_nodes * mesh.ranks_per_node=4: torchrun started 2 ranks, 1 on each of 2 machines. "
                    "Use mesh.num_nodes=2 mesh.ranks_per_node=1, or start 4 ranks."
                ]
            assert not processes(str(run_dir))
    command = (sys.executable, "-m", "moecompile", *RUN, "mesh.num_nodes=2", f"hydra.run.dir={one}")
    subprocess.run(command, cwd=REPOSITORY, check=True, timeout=200, stdout=subprocess.DEVNULL)
    assert list(losses(two)) == [1, 2, 3, 4, 5]
    assert losses(two) == pytest.approx(losses(one), abs=1e-6)
