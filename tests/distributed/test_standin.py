"""What runs on a GPU, on GPUs that are played by the CPU (tests/standin): the losses are those of CPUs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from moecompile.ops.expert_ffn import PIECE
from tests.standin import compare, waits

REPOSITORY = Path(__file__).parents[2]
IN_CI = ("two nodes", "pairs of stages", "all axes", "replicas, in bf16")
pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++, which builds the device")


def on_gpus(*words: str, timeout_s: float) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(compare.STANDIN), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *words], cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=timeout_s
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", IN_CI)
def test_a_training_has_the_losses_of_cpus(name: str, tmp_path: Path) -> None:
    found, allowed = compare.off(name, tmp_path)
    assert found <= allowed


@pytest.mark.nightly
@pytest.mark.parametrize("name", [name for name in compare.CASES if name not in IN_CI])
def test_every_other_training_has_the_losses_of_cpus(name: str, tmp_path: Path) -> None:
    found, allowed = compare.off(name, tmp_path)
    assert found <= allowed


OWN_TRAINER = """
import sys

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import moecompile
from tests.distributed.classifier import Classifier

accelerator, epochs, folder, from_checkpoint, *overrides = sys.argv[1:]


class Module(LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = moecompile.compile_model(Classifier(), overrides, example=torch.zeros(1, 6))

    def training_step(self, batch, index):
        loss = cross_entropy(self.model(batch[0]), batch[1])
        print(f"LOSS {self.trainer.global_step} {self.global_rank} {float(loss)}\\n", end="", flush=True)
        self.log("loss", loss, sync_dist=True, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self):  # with less eps, its steps would be those of rounding
        return torch.optim.AdamW(self.parameters(), lr=0.01, eps=1e-3)

    def train_dataloader(self):
        x = torch.randn(96, 6, generator=torch.Generator().manual_seed(2))
        return DataLoader(TensorDataset(x, x[:, :3].argmax(1)), batch_size=4)


best = ModelCheckpoint(folder, monitor="loss", save_last=True)  # keeps a number of the device
Trainer(
    strategy="expert_parallel", accelerator=accelerator, devices=4, max_epochs=int(epochs), logger=False, callbacks=[best],
    gradient_clip_val=1.0, enable_progress_bar=False, enable_model_summary=False,
).fit(Module(), ckpt_path=from_checkpoint or None)
"""


def losses_of_own_trainer(
    layout: list[str], accelerator: str, epochs: int, folder: Path, begin: str = ""
) -> dict[str, float]:
    """By step and rank."""
    program = folder.parent / "program.py"
    program.write_text(OWN_TRAINER)
    path = f"{compare.STANDIN}:{REPOSITORY}" if accelerator == "gpu" else str(REPOSITORY)
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=4", str(program), accelerator,
            str(epochs), str(folder), begin, "experts.num_routed=4", "routing.top_k=2", "balance=bias", *layout,
        ],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    words = (line.split() for line in done.stdout.splitlines() if line.startswith("LOSS"))
    return {f"{step} {rank}": float(loss) for _, step, rank, loss in words}


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(["mesh.num_nodes=2", "mesh.ranks_per_node=2", "dispatch=hierarchical"], marks=pytest.mark.slow),
        pytest.param(["mesh.ranks_per_node=4", "mesh.pp=2"], marks=pytest.mark.nightly),
        pytest.param(["mesh.ranks_per_node=4", "mesh.ep=2", "mesh.dp_replicate=2"], marks=pytest.mark.nightly),
    ],
    ids=lambda words: words[-1],
)
def test_a_trainer_of_ones_own_has_the_losses_of_cpus(layout: list[str], tmp_path: Path) -> None:
    """It binds ranks to their devices, so groups are split from that of all; its optimizer is torch's; CPUs go on with it."""
    uninterrupted = losses_of_own_trainer(layout, "cpu", 2, tmp_path / "cpu")
    first = losses_of_own_trainer(layout, "gpu", 1, tmp_path / "gpu")
    second = losses_of_own_trainer(layout, "cpu", 2, tmp_path / "gpu", str(tmp_path / "gpu" / "last.ckpt"))
    assert len(first) == len(second) >= 24
    assert first | second == pytest.approx(uninterrupted, rel=1e-5)


PLAYED = """
import torch

x = torch.ones(3, 4, device="cuda", requires_grad=True)
(x * 2).sum().backward()
assert x.grad.device.type == "cuda" and x.grad.tolist() == [[2.0] * 4] * 3
try:
    x + torch.ones(3, 4)
except RuntimeError as error:
    assert "same device" in str(error)
else:
    raise AssertionError("tensors of two devices were mixed")

import torch.distributed as dist

dist.init_process_group("nccl", rank=0, world_size=1, store=dist.HashStore())
for wrong in (torch.ones(2), torch.ones(4, 4, device="cuda").t(), torch.ones(2, dtype=torch.int16, device="cuda")):
    try:
        dist.all_reduce(wrong)
    except RuntimeError:
        continue
    raise AssertionError(f"NCCL would have refused {wrong}")
"""


@pytest.mark.slow
def test_it_refuses_what_a_gpu_refuses() -> None:
    done = on_gpus("-c", PLAYED, timeout_s=120)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_host_waits_once_a_layer_and_three_times_a_step(tmp_path: Path) -> None:
    """In bf16, with two layers and two micro-batches; the rest is Lightning's and transformers'."""
    words = [
        *compare._MIXTRAL,
        *compare._RUN[:2],
        "mesh=cpu_1x2",
        "trainer.precision=bf16_mixed",
        "data.global_batch_size=8",
    ]
    ours = Counter[str]()
    for (op, place, _), number in waits.per_step(words, tmp_path).items():
        if (path := Path(place.rpartition(":")[0])).is_relative_to(REPOSITORY) and op != "to the device":
            ours[f"{path.parent.name}/{path.name}"] += round(number)
    assert +ours == {"ops/host.py": 2 * 2, "runtime/strategy.py": 2, "nn/balance.py": 1}


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16_params"])
def test_a_step_takes_the_memory_that_is_planned_for_a_gpu(precision: str, tmp_path: Path) -> None:
    """One that experts' activations fill: 2.4 and 3 times the plan, where these were computed for all rows at once.

    With bf16_params FSDP has the model on one rank too, beside the fp32 buffer of a layer's gradients. Beside the plan is
    what a GPU without Triton, as this one, makes of a piece of the rows in between: about five times its gate and up.
    """
    words = [
        "task=bench", "recipe=mixtral_ep", "mesh=cpu_1", "mesh.device=cuda", "model.config.num_hidden_layers=2",
        "model.config.intermediate_size=2048", "data.micro_batch_size=16", "data.seq_len=256", "data.global_batch_size=16",
        f"trainer.precision={precision}", "bench.warmup=1", "bench.rounds=1", "bench.machine=false",
        f"hydra.run.dir={tmp_path / 'run'}",
    ]  # fmt: skip
    done = on_gpus("-m", "moecompile", *words, timeout_s=400)
    assert done.returncode == 0, done.stdout + done.stderr
    step = json.loads((tmp_path / "run" / "result.json").read_text())["step"]
    assert step["peak_bytes"] == pytest.approx(step["planned_bytes"] + 5 * 4 * PIECE, rel=0.02)


@pytest.mark.nightly
def test_the_tests_for_a_gpu_pass() -> None:
    needs_kernels = "layer or two_ranks or host_does"
    done = on_gpus(
        "-m", "pytest", "-m", "gpu", "tests/gpu", "-p", "no:xdist", "-k", f"not ({needs_kernels})", timeout_s=1500
    )
    assert done.returncode == 0, done.stdout
