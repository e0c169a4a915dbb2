"""Runs a function on several real ranks: `results = run_distributed_test(fn, world_size, *args)`.

The ranks are forked from a fork server that has imported torch (and what else the tests of this process import) once,
so that a launch of 4 ranks takes a fraction of a second after the first one. Put many checks into one launch all the
same: each rank still imports its test module.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from typing import Any

import torch.distributed as dist

from moecompile.runtime.failures import is_peer_lost
from moecompile.runtime.ranks import worker_variables

_PRELOAD = ("torch", "torch.distributed", "pytest", "lightning", "transformers")
_PEER_GRACE_S = 2.0
_context = multiprocessing.get_context("forkserver")


def run_distributed_test(fn: Callable[..., Any], world_size: int, *args: Any, timeout_s: float = 60) -> list[Any]:
    """`fn(rank, world_size, *args)` on `world_size` processes with a gloo process group; what each rank returned.

    Args:
        fn: a top-level function of a test module. args, results and exceptions are pickled.
        timeout_s: of the whole launch, and of every collective. All ranks are killed when it is over.

    Raises:
        BaseException: what the first failing rank raised (a broken connection to a peer counts last), with the rank's
            traceback as a note.
        TimeoutError: a rank did not end.
    """
    _context.set_forkserver_preload([name for name in _PRELOAD if name in sys.modules])
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks: dict[Connection, int] = {}
    processes: list[ForkServerProcess] = []
    try:
        for rank in range(world_size):
            receiver, sender = _context.Pipe(duplex=False)
            process = _context.Process(
                target=_rank, args=(sender, fn, rank, world_size, store.port, timeout_s, args), daemon=True
            )
            process.start()
            sender.close()  # the rank's end alone stays open: the pipe breaks when the rank dies
            ranks[receiver] = rank
            processes.append(process)
        return _collect(ranks, processes, time.monotonic() + timeout_s)
    finally:
        for process in processes:
            process.kill()
            process.join()
        for receiver in ranks:
            receiver.close()


def _collect(ranks: dict[Connection, int], processes: list[ForkServerProcess], deadline: float) -> list[Any]:
    """The results in rank order. A lost peer is held back for a moment, so that the rank that failed first is heard."""
    results: dict[int, Any] = {}
    lost: BaseException | None = None
    waiting = dict(ranks)
    while waiting and (ready := wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))):
        for receiver in ready:
            assert isinstance(receiver, Connection)
            rank = waiting.pop(receiver)
            error = _receive(receiver, rank, processes[rank], results)
            if error is not None and not is_peer_lost(error):
                raise error
            if error is not None and lost is None:
                lost, deadline = error, min(deadline, time.monotonic() + _PEER_GRACE_S)
    if lost is not None:
        raise lost
    if waiting:
        raise TimeoutError(f"ranks {sorted(waiting.values())} of {len(ranks)} did not end")
    return [results[rank] for rank in sorted(results)]


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
    sender: Connection, fn: Callable[..., Any], rank: int, world_size: int, port: int, timeout_s: float, args: Any
) -> None:
    # A hung rank shows where it hangs before it is killed.
    faulthandler.dump_traceback_later(timeout_s * 0.9)
    os.environ.update(worker_variables(1, one_machine=True))
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip
    try:
        import torch

        torch.set_num_threads(1)
        timeout = timedelta(seconds=timeout_s)
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
