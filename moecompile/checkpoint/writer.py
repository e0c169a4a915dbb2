"""Saves checkpoints one at a time, optionally in the background.

Algorithm of one save:
  1. Wait for the previous save; copy tensors that training will change.
  2. Every rank writes its shards into step-N.tmp. DCP returns on rank 0 only when all ranks have written.
  3. Rank 0 adds plan.yaml and state.json, renames the folder, moves `latest`, removes old checkpoints.
A save in the background uses its own process group, so that its messages never mix with those of training.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from moecompile.checkpoint import folders
from moecompile.checkpoint.placed import Orders
from moecompile.checkpoint.resume import State, write_state
from moecompile.checkpoint.tensors import failed_rank, staged, write_tensors
from moecompile.errors import UserError
from moecompile.plan import Plan
from moecompile.plan import save as save_plan


class Writer:
    """Writes the checkpoints of one run; all ranks create one and make the same calls.

    Args:
        checkpoints: their folder. plan: saved with each of them. keep_last: number of newest ones to keep (0: all).
        background: whether `save` returns once the tensors are copied.
        group: a CPU process group for this writer only.
    """

    def __init__(
        self, checkpoints: Path, plan: Plan, *, keep_last: int, background: bool, group: dist.ProcessGroup
    ) -> None:
        self.checkpoints, self.plan, self.keep_last, self.background = checkpoints, plan, keep_last, background
        self.group, self.is_first_rank = group, dist.get_rank() == 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def save(self, tensors: Mapping[str, Tensor], state: State, orders: Orders) -> None:
        """Saves the current values of `tensors` as the checkpoint of `state.step`; `orders` as for `write_tensors`.

        Raises:
            UserError: this save, or the previous one, could not be written.
        """
        self.wait()  # Step 1
        if not self.background:
            return self._write(tensors, state, orders)
        self._pending = self._thread.submit(self._write, staged(tensors), state, orders)
        return None

    def check(self) -> None:
        """Raises the error of a save that has ended by now, if any."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Waits for the save in progress, if any, and raises its error."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def _write(self, tensors: Mapping[str, Tensor], state: State, orders: Orders) -> None:
        tmp = folders.unfinished(folders.step_folder(self.checkpoints, state.step))
        try:
            write_tensors(tmp, tensors, self.group, orders=orders)  # Step 2
            if self.is_first_rank:  # Step 3
                save_plan(self.plan, tmp / folders.PLAN)
                write_state(tmp, state)
                folders.finish(self.checkpoints, state.step, self.keep_last)
        except (CheckpointException, OSError) as error:
            if self.is_first_rank:
                shutil.rmtree(tmp, ignore_errors=True)
            raise UserError(self._message(state.step, error)) from error

    def _message(self, step: int, error: CheckpointException | OSError) -> str:
        rank, cause = failed_rank(error) if isinstance(error, CheckpointException) else (0, str(error))
        last = folders.latest(self.checkpoints)
        kept = f"The checkpoints before it are whole, the latest is {last.name}" if last else "There is none before it"
        return (
            f"the checkpoint of step {step} could not be written to {self.checkpoints} on rank {rank}: {cause}. "
            f"{kept}. Make room, lower trainer.keep_last, or use another hydra.run.dir, and resume with trainer.resume."
        )
