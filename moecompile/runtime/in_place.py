"""Ranks that torchrun or SLURM started: rank 0 runs the command line, the others follow its orders.

Algorithm:
1. All ranks connect to the store at the launcher's MASTER_ADDR and MASTER_PORT, and publish their node.
2. Rank 0 composes the config. For each launch it sends an order with the run directory and the module; all ranks run
   its `main(run_dir)`. When the command line ends, the others end too, with its exit code.
3. If a rank fails, one rank reports the first cause: the one that first claims the report in the run directory. The
   others exit after it, without a message.
"""

from __future__ import annotations

import importlib
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from moecompile import waiting
from moecompile.errors import MoecompileError, RankFailure, UserError
from moecompile.named_code import VARIABLE
from moecompile.rundir import discard, is_discarded, place
from moecompile.runtime import failures, logs, machine, signals, slurm
from moecompile.runtime.orders import Order, end_others, free_port, give, meet, next_order, places
from moecompile.runtime.ranks import Ranks, check_mesh, check_order, check_places, worker_variables

GRACE_S = 5.0
"""Seconds that a rank waits for another one, which may report the same failure, or end this rank."""

PEER_GRACE_S = 1.0
"""Seconds that a rank which has lost a peer waits, so that all other ranks can record their failures."""


@dataclass
class _Now:
    """The current run of this process."""

    run_dir: Path | None = None
    was_pending: bool = False
    ranks: Ranks | None = None
    terminal: int = 2  # descriptor of the terminal's stderr
    ended: bool = False  # other ranks have exited after a failure
    is_reporting: bool = False  # this process reports the failure


_now = _Now()


def lead(ranks: Ranks, command_line: Callable[[], int]) -> NoReturn:
    """Rank 0: runs the command line, and ends all ranks with its exit code."""
    machine.hold(ranks)
    _watch(ranks)
    try:
        check_order(ranks)
        store = meet(ranks)
    except Exception as error:
        _report_early(error, ranks)
        leave(_code(error))
    try:
        code = command_line()
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    if code:
        machine.claim(ranks)  # the command line has reported it
    if not _now.ended:
        end_others(store, ranks, code)
    if (told := slurm.requeue_if_asked()) is not None:
        print(told, flush=True)
    leave(code)


def follow(ranks: Ranks) -> NoReturn:
    """The other ranks: run the orders of rank 0 until the last one."""
    _now.terminal = logs.hide()
    machine.hold(ranks)
    _watch(ranks)
    try:
        check_order(ranks)
        store = meet(ranks)
        while (order := next_order(store)).module is not None:
            with suppress(signals.Stopped):  # rank 0 reports it and sends the exit code
                _run(order, ranks)
        store.add("moecompile/ended", 1)
    except Exception as error:
        if _now.run_dir is None:
            _report_early(error, ranks)
            leave(_code(error))
        cause = _failed(error, _now.run_dir, ranks)
        if cause is None:
            time.sleep(GRACE_S)
        else:
            os.write(_now.terminal, f"error: {cause}\n".encode())
            if cause.exit_code == UserError.exit_code:
                discard(_now.run_dir)  # rank 0 may be ended before it can
        leave(_code(cause or error))
    leave(order.exit_code)


def is_leading() -> bool:
    """Whether this process is rank 0 of ranks that torchrun or SLURM started."""
    return _now.ranks is not None


def check_started(num_nodes: int, ranks_per_node: int) -> None:
    """Checks that ranks which a launcher started fit a mesh, as far as their variables tell; `run_on_all` sees all.

    Raises:
        ConfigError: they do not.
    """
    ranks = _now.ranks
    if ranks is not None and ranks.world_size % ranks.local_world_size == 0:
        hosts = ranks.world_size // ranks.local_world_size
        check_mesh(num_nodes, ranks_per_node, hosts, ranks.local_world_size, ranks.launcher)


def run_on_all(world_size: int, run_dir: Path, *, module: str, threads: int, num_nodes: int) -> None:
    """Rank 0: runs `module`'s `main(run_dir)` on all ranks.

    Raises:
        UserError, ConfigError: the ranks do not fit the mesh, or a rank raised it.
        RankFailure: any other failure. Both have `reported` set if another rank has reported it.
    """
    ranks = _now.ranks
    assert ranks is not None
    if _now.ended:
        raise RankFailure("the other ranks have ended with an earlier job")
    store = meet(ranks)
    all_places = places(store, ranks)
    check_places(all_places, ranks.launcher)
    hosts = len({node for node, _ in all_places})
    played = check_mesh(num_nodes, world_size // num_nodes, hosts, ranks.world_size // hosts, ranks.launcher)
    waiting.done()
    if played:
        print(played, flush=True)
    failures.clear(run_dir)
    order = Order(
        run_dir=str(run_dir.resolve()), module=module, threads=threads, port=free_port(), one_machine=hosts == 1,
        code=os.environ.get(VARIABLE, ""),
    )  # fmt: skip
    give(store, order)
    try:
        _run(order, ranks)
    except signals.Stopped:
        raise
    except Exception as error:
        _now.ended = True
        cause = _failed(error, run_dir, ranks)
        if cause is None:
            time.sleep(PEER_GRACE_S)
            cause = failures.first_error(run_dir, world_size, {})
            cause.reported = True
        raise cause from error


def leave(code: int) -> NoReturn:
    """Ends this process immediately, with output flushed: gloo may abort the interpreter's own shutdown."""
    waiting.done()
    sys.stdout.flush()
    sys.stderr.flush()
    if _now.ranks is not None:
        machine.release(_now.ranks, keep_claim=code != 0)
    os._exit(code)


def _run(order: Order, ranks: Ranks) -> None:
    import torch

    for name, value in worker_variables(order.threads, one_machine=order.one_machine).items():
        os.environ.setdefault(name, value)
    torch.set_num_threads(order.threads)  # OpenMP has already read its variable
    run_dir = Path(order.run_dir)
    # A store of its own: in the launcher's, a second process group would find the addresses of the first one.
    os.environ["MASTER_PORT"] = str(order.port)
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
    os.environ[VARIABLE] = order.code
    if not run_dir.is_dir():
        raise UserError(
            f"hydra.run.dir={run_dir}: is not there on {socket.gethostname()} (rank {ranks.rank}). All ranks must see "
            "the same run directory: use one on a shared file system."
        )
    _now.run_dir, _now.was_pending = run_dir, place(run_dir) != run_dir
    logs.hold(run_dir, ranks.rank)
    try:
        importlib.import_module(order.module or "").main(run_dir)
    except SystemExit as error:
        raise RankFailure(f"the process wanted to end with exit code {error.code}") from error
    module = sys.modules.get("torch.distributed")
    if module is not None and module.is_initialized():
        module.barrier()
        module.destroy_process_group()  # the next job of a multirun starts one in this process
    _now.run_dir = None


def _failed(error: Exception, run_dir: Path, ranks: Ranks) -> MoecompileError | None:
    """Records the failure of this rank; returns the error to report, or None if another rank reports it."""
    folder = place(run_dir)  # also after another rank discards it, when `place` is the folder of the previous run
    if is_discarded(run_dir, was_pending=_now.was_pending):
        return None
    failure = failures.record(error, folder, ranks.rank)
    if failure.peer_lost:
        time.sleep(PEER_GRACE_S)  # so that the rank that failed first reports it
    if is_discarded(run_dir, was_pending=_now.was_pending) or not failures.claim(folder):
        return None
    _now.is_reporting = True
    return failures.first_error(folder, ranks.world_size, {})


# -- reports ---------------------------------------------------------------------------------------------------------


def _watch(ranks: Ranks) -> None:
    _now.ranks = ranks

    def failed() -> bool:
        run_dir = _now.run_dir
        if run_dir is None:
            return any(rank != ranks.rank for rank in machine.gone(ranks))
        if is_discarded(run_dir, was_pending=_now.was_pending):
            return False
        return failures.others_failed(run_dir, ranks.rank, ranks.world_size)

    def end(code: int) -> NoReturn:
        if _now.is_reporting:
            time.sleep(GRACE_S)
        elif code == 128 + signal.SIGTERM and failed():
            _report_other_rank(ranks)
        else:
            _report_signal(code - 128, ranks)
        machine.release(ranks, keep_claim=True)
        os._exit(code)

    signals.watch(failed=failed, leave=end, is_orphan=lambda: False, counts=True)


def _report_other_rank(ranks: Ranks) -> None:
    """Reports the rank that has failed and ends this process, unless another rank has reported it."""
    run_dir = _now.run_dir
    cause: MoecompileError | None = None
    if run_dir is None and machine.claim(ranks):
        lost = next(rank for rank in machine.gone(ranks) if rank != ranks.rank)
        cause = failures.ended_silently(lost, ranks.world_size)
    elif run_dir is not None:
        folder = place(run_dir)
        if not is_discarded(run_dir, was_pending=_now.was_pending) and failures.claim(folder):
            cause = failures.first_error(folder, ranks.world_size, {})
    if cause is not None:
        os.write(_now.terminal, f"error: {cause}\n".encode())
        os._exit(cause.exit_code)


def _report_signal(number: int, ranks: Ranks) -> None:
    """Reports a signal, which a launcher may have sent because a rank was killed before it locked its file."""
    if ranks.node > 0:
        return
    if ranks.rank > 0:
        time.sleep(PEER_GRACE_S)
    if machine.claim(ranks):
        other = (
            f" If you did not send it, another rank ended before it could report: see what {ranks.launcher} reports."
            if number == signal.SIGTERM and _now.run_dir is None
            else ""
        )
        name = signal.Signals(number).name
        os.write(_now.terminal, f"error: rank {ranks.rank} was ended at once by {name}.{other}\n".encode())


def _report_early(error: Exception, ranks: Ranks) -> None:
    """Reports an error before there is a run directory: rank 0 first, others if no rank on their machine has."""
    if ranks.rank > 0:
        time.sleep(GRACE_S)
    if machine.claim(ranks):
        text = _error_text(error) + f" (rank {ranks.rank} of {ranks.world_size})" * (ranks.rank > 0)
        os.write(_now.terminal, f"{text}\n".encode())


def _error_text(error: Exception) -> str:
    trace = "" if isinstance(error, MoecompileError) else "".join(traceback.format_exception(error))
    return f"{trace}error: {error}" if isinstance(error, MoecompileError) else trace.rstrip()


def _code(error: BaseException) -> int:
    return error.exit_code if isinstance(error, MoecompileError) else 1
