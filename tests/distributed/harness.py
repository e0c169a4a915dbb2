"""Runs a function on several real ranks: `results = run_distributed_test(fn, world_size, *args)`.

The ranks are forked (`tests/forked.py`), so that a launch of 4 takes a fraction of a second after the first one. Put
many checks into one launch all the same: each rank still imports its test module.
"""

from __future__ import annotations

import faulthandler
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch.distributed as dist

from moecompile.runtime.failures import is_peer_lost
from moecompile.runtime.ranks import worker_variables
from tests import composed, forked

_PEER_GRACE_S = 2.0
_MORE_S, _BUSY = 2.0, 0.05
"""How long ranks that compute go on at a time; less than this part of a core is waiting."""
_COLLECTIVE = 4
"""Times the limit of a launch: a peer may have less of the machine."""
_SHOW = signal.SIGUSR2


def run_distributed_test(fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 60) -> list[Any]:
    """`fn(rank, world_size, *args)` on `world_size` processes with a gloo process group; what each rank returned.

    Args:
        fn: a top-level function of a test module. args, results and exceptions are pickled.
        timeout_s: of the whole launch, on a machine that does nothing else. After it, ranks go on while they compute (the
            machine may be a loaded one), until they have used all of its cores for that long.

    Raises:
        BaseException: what the first failing rank raised (a broken connection to a peer counts last), with the rank's
            traceback as a note.
        RuntimeError, TimeoutError: a rank died, or did not end; with the stacks of all ranks as a note.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    stacks = tempfile.TemporaryDirectory(prefix="ranks_")
    ranks: dict[Connection, int] = {}
    processes: list[ForkServerProcess] = []
    try:
        for rank in range(world_size):
            receiver, sender = forked.context.Pipe(duplex=False)
            process = forked.context.Process(
                target=_rank,
                args=(sender, fn, rank, world_size, store.port, timeout_s, _stack(stacks.name, rank), args),
                daemon=True,
            )
            forked.start(process)
            sender.close()  # the rank's end alone stays open: the pipe breaks when the rank dies
            ranks[receiver] = rank
            processes.append(process)
        return _collect(ranks, processes, timeout_s)
    except (RuntimeError, TimeoutError) as error:
        for rank in ranks.values():
            path = _stack(stacks.name, rank)
            if path.is_file() and (text := path.read_text()):
                error.add_note(f"rank {rank} was here:\n{text}")
        raise
    finally:
        for process in processes:
            process.kill()
            process.join()
        for receiver in ranks:
            receiver.close()
        stacks.cleanup()


def _stack(folder: str, rank: int) -> Path:
    return Path(folder) / f"rank{rank}.txt"


def _collect(ranks: dict[Connection, int], processes: list[ForkServerProcess], timeout_s: float) -> list[Any]:
    """The results in rank order. A lost peer is held back for a moment, so that the rank that failed first is heard."""
    results: dict[int, Any] = {}
    lost: BaseException | None = None
    waiting, patience = dict(ranks), _Patience(processes, timeout_s)
    while waiting and (ready := patience.wait(list(waiting))):
        for receiver in ready:
            assert isinstance(receiver, Connection)
            rank = waiting.pop(receiver)
            error = _receive(receiver, rank, processes[rank], results)
            if error is not None and not is_peer_lost(error):
                raise error
            if error is not None and lost is None:
                lost = error
                patience.ends_in(_PEER_GRACE_S)
    if lost is not None:
        raise lost
    if waiting:
        for rank in waiting.values():
            if processes[rank].pid is not None:
                os.kill(processes[rank].pid, _SHOW)
        time.sleep(0.2)
        raise TimeoutError(f"ranks {sorted(waiting.values())} of {len(ranks)} did not end")
    return [results[rank] for rank in sorted(results)]


class _Patience:
    """Waits for ranks, after the time limit while they compute."""

    def __init__(self, processes: list[ForkServerProcess], timeout_s: float) -> None:
        self.processes, self.limit = processes, timeout_s * (os.cpu_count() or 1)
        self.deadline = time.monotonic() + timeout_s
        self.is_final = False

    def ends_in(self, seconds: float) -> None:
        self.is_final, self.deadline = True, min(self.deadline, time.monotonic() + seconds)

    def wait(self, receivers: list[Connection]) -> list[Any]:
        """Those that can be read; none when it is over."""
        ready = wait(receivers, timeout=max(0.0, self.deadline - time.monotonic()))
        while not ready and not self.is_final:
            before = self._cpu_seconds()
            ready = wait(receivers, timeout=_MORE_S)
            now = self._cpu_seconds()
            self.is_final = now - before < _BUSY * _MORE_S or now > self.limit
        return ready

    def _cpu_seconds(self) -> float:
        """What the ranks have used by now; one that has ended counts no more."""
        ticks = 0
        for process in self.processes:
            stat = Path(f"/proc/{process.pid}/stat")
            if stat.is_file():
                ticks += sum(map(int, stat.read_text().rpartition(")")[2].split()[11:13]))
        return ticks / os.sysconf("SC_CLK_TCK")


def _receive(
    receiver: Connection, rank: int, process: ForkServerProcess, results: dict[int, Any]
) -> BaseException | None:
    try:
        succeeded, value, note = pickle.loads(receiver.recv_bytes())
    except EOFError:
        process.join()
        return RuntimeError(f"rank {rank} died with exit code {process.exitcode}")
    if succeeded:
        results[rank] = value
        return None
    assert isinstance(value, BaseException)
    value.add_note(note)
    return value


def _rank(
    sender: Connection, fn: Callable[..., Any], rank: int, world_size: int, port: int, timeout_s: float, stack: Path,
    args: Any,
) -> None:  # fmt: skip
    # A rank that crashes, or hangs until it is killed, shows where. (Not by a timer: it crashes ranks that compute.)
    trace = stack.open("w")
    faulthandler.enable(trace)
    faulthandler.register(_SHOW, trace)
    os.environ.update(worker_variables(1, one_machine=True))
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    try:
        import torch

        torch.set_num_threads(1)
        composed.use()
        timeout = timedelta(seconds=timeout_s * _COLLECTIVE)
        store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timeout)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)
        value = fn(rank, world_size, *args)
        dist.barrier()
        message = pickle.dumps((True, value, ""))
    except BaseException as error:
        note = f"rank {rank} of {world_size}:\n" + "".join(traceback.format_exception(error))
        message = pickle.dumps((False, _portable(error), note))
    sender.send_bytes(message)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # a gloo thread may abort the interpreter's own shutdown


def _portable(error: BaseException) -> BaseException:
    """`error` if it survives pickling, else its text."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError("".join(traceback.format_exception_only(error)).strip())
    return error
