"""Starts one process per rank, or runs in place if torchrun or SLURM has started them already.

However it is started, a rank has torchrun's environment variables. The launcher and its ranks share only the run
directory: each rank runs `main(run_dir)` of a module. Ranks are forked from a fork server, a process that imports what
they need once, while the launcher does other things. torch.multiprocessing starts, watches and ends them.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
import types
from collections.abc import Iterator, Sequence
from dataclasses import replace
from multiprocessing import connection, forkserver, reduction
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from moecompile import hub_kernels, waiting
from moecompile.checkpoint.resume import has_trained, is_restarted
from moecompile.errors import RankFailure
from moecompile.rundir import output_dir, settle
from moecompile.runtime import failures, logs, signals
from moecompile.runtime.external_launch import GRACE_S, PEER_GRACE_S, is_leading, leave, run_on_all
from moecompile.runtime.ranks import Ranks, check_alone, check_mesh, free_port, worker_variables

_RESTART = "MOECOMPILE_RESTART"
_HANGING_UP = (signal.SIGHUP, signal.SIGQUIT)
"""Signals that end ranks at once; `signals.ASKING` end training after the current step."""


def launch(
    world_size: int, run_dir: Path, *, module: str, threads: int, max_restarts: int = 0, num_nodes: int = 1
) -> None:
    """Runs `module`'s `main(run_dir)` on `world_size` ranks and returns when all of them have succeeded.

    If torchrun or SLURM has started ranks, this process is rank 0 and runs `main` itself.

    Args:
        threads: OpenMP threads per rank.
        max_restarts: how often all ranks are restarted after one was lost; user errors are not retried. In place,
            torchrun does this (its --max-restarts).
        num_nodes: of the mesh; processes of one machine may simulate several.

    Raises:
        UserError: a rank raised it, or another launcher has started several processes like this one.
        RankFailure: any other failure, with the rank and the last line of its traceback.
        ConfigError: torchrun or SLURM started ranks that do not fit the mesh.
        Stopped: a signal has ended the run.
    """
    if is_leading():
        run_on_all(world_size, run_dir, module=module, threads=threads, num_nodes=num_nodes)
    else:
        check_alone()
        if played := check_mesh(num_nodes, world_size // num_nodes, 1, world_size, "moecompile"):
            waiting.done()
            print(played, flush=True)
        prepare([module], threads)
        with _environment(_launch_variables(threads)):
            _launch_again(world_size, run_dir, max_restarts, module)


def prepare(modules: Sequence[str], threads: int) -> None:
    """Starts the fork server, if none runs and there are no ranks: it imports `modules` while this process goes on.

    Args:
        modules: they may not start threads or use a GPU. threads: OpenMP threads per rank.
    """
    if not is_leading():
        multiprocessing.set_forkserver_preload(["moecompile.runtime.fork_server", "torch.multiprocessing", *modules])
        with _environment(_launch_variables(threads)):
            forkserver.ensure_running()


def is_restart(run_dir: Path) -> bool:
    """Whether this rank was restarted, after an attempt that lost a rank or in a job that was requeued, and an attempt
    before has trained in `run_dir`: what was refused or lost before its first step has left everything as it was.
    """
    if int(os.environ.get(_RESTART) or 0) > 0:
        return output_dir(run_dir) == run_dir
    return is_restarted() and has_trained(run_dir)


def _rank(
    rank: int, of_rank_0: Ranks, module: str, run_dir: Path, folder: str, variables: dict[str, str], terminal: _Terminal
) -> None:
    """A rank, in a process that was forked for it. Returning from `main` is success; nothing else returns from here."""
    os.setsid()  # a terminal's Ctrl-C goes to the launcher alone
    _watch_launcher(run_dir, rank, of_rank_0.world_size)
    try:
        _begin(replace(of_rank_0, rank=rank, local_rank=rank), run_dir, folder, variables)
        importlib.import_module(module).main(run_dir)
        if (group := _process_group()) is not None:
            group.barrier()  # so that no exit breaks a connection that another rank needs
    except signals.Stopped as stopped:
        failures.record_stop(run_dir, stopped)
    except SystemExit as error:
        leave(error.code if isinstance(error.code, int) and error.code else 128 + signal.SIGTERM)
    except BaseException as error:
        failure = failures.record(error, run_dir, rank)
        if failure.peer_lost:
            time.sleep(PEER_GRACE_S)
        leave(failure.exit_code)
    leave(0)  # no thread that a callback has left keeps the process


def _begin(ranks: Ranks, run_dir: Path, folder: str, variables: dict[str, str]) -> None:
    """Makes this process what it would be if it were started by a command line in `folder`."""
    import torch

    multiprocessing.set_start_method(None, force=True)  # what the rank starts begins as in any program
    os.environ.clear()
    os.environ.update(variables | ranks.variables())
    os.chdir(folder)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # torch has read the fork server's variable
    with contextlib.suppress(OSError):  # Linux: what `ps -e` and `top` call it
        Path("/proc/self/comm").write_text(f"moecompile_r{ranks.rank}"[:15], encoding="utf-8")
    logs.outlive_readers()
    logs.hold(run_dir, ranks.rank)


class _Terminal:
    """Stdout and stderr of the process that pickles it, which become those of the process that is started with it."""

    def __reduce__(self) -> Any:
        return _take_terminal, (reduction.DupFd(1), reduction.DupFd(2))


def _take_terminal(*outputs: Any) -> _Terminal:
    for number, output in enumerate(outputs, start=1):
        descriptor = output.detach()
        os.dup2(descriptor, number)
        os.close(descriptor)
    return _Terminal()


def _launch_again(world_size: int, run_dir: Path, max_restarts: int, module: str) -> None:
    """Starts all ranks, and restarts them after each lost rank; the last failure is raised."""
    run_dir.mkdir(parents=True, exist_ok=True)
    for restart in range(max_restarts + 1):
        settle(run_dir)  # what the attempt before could not
        failures.clear(run_dir)
        try:
            return _launch_local(world_size, run_dir, module, {_RESTART: str(restart)})
        except RankFailure as error:
            if restart == max_restarts:
                raise
            kept = failures.keep(run_dir, restart)
            text = str(error).replace(str(failures.errors_dir(run_dir)), str(kept))
            print(f"{text}\nrestart {restart + 1} of {max_restarts}", file=sys.stderr, flush=True)
    return None


def _launch_local(world_size: int, run_dir: Path, module: str, variables: dict[str, str]) -> None:
    """Runs all ranks, and raises what ended them early."""
    from torch.multiprocessing import ProcessExitedException, start_processes

    logging.getLogger(start_processes.__module__).setLevel(logging.ERROR)  # which ranks it ends, beside our message
    ranks = Ranks(
        rank=0, world_size=world_size, local_rank=0, local_world_size=world_size, master_addr="127.0.0.1",
        master_port=free_port(), launcher="moecompile",
    )  # fmt: skip
    job = (ranks, module, run_dir, os.getcwd(), {**os.environ, **variables}, _Terminal())
    exit_codes: dict[int, int] = {}
    processes: list[ForkServerProcess] = []
    with _passing_signals_to(processes) as asked:
        waiting.done()
        with _without_main_module():
            context = start_processes(_rank, job, world_size, join=False, start_method="forkserver")
        processes += context.processes
        try:
            for index, number in enumerate(asked):  # while they were started
                _send(_for_ranks(number, asked[:index]), processes)
            while not context.join(grace_period=GRACE_S):
                pass
        except ProcessExitedException as first:  # now all have ended
            codes = {rank: process.exitcode for rank, process in enumerate(processes) if process.exitcode}
            exit_codes = {first.error_index: first.exit_code, **codes}
        finally:
            _send(signal.SIGKILL, processes)
    ending = [number for number in asked if number != signals.WARNING]
    is_hung_up = any(number in _HANGING_UP for number in ending)
    if is_hung_up or (ending and exit_codes and (len(ending) > 1 or not failures.any_recorded(run_dir))):
        raise signals.Stopped(ending[0])
    if exit_codes:
        raise failures.first_error(run_dir, world_size, exit_codes)
    if (stopped := failures.stopped(run_dir)) is not None:
        failures.clear(run_dir)
        raise signals.Stopped(ending[0] if ending else stopped.number, stopped.step, stopped.num_steps)


def _for_ranks(number: int, before: Sequence[int]) -> int:
    """What ranks get for the signal `number` after those `before`: SIGINT for the first that asks for an end, at which
    they save; SIGKILL for a second one, and for a terminal that closes.
    """
    if number == signals.WARNING:
        return number
    is_first = number in signals.ASKING and not any(each in signals.ASKING for each in before)
    return signal.SIGINT if is_first else signal.SIGKILL


def _send(number: int, processes: Sequence[ForkServerProcess]) -> None:
    """Sends a signal to those that run. A handler calls it, perhaps while `join` is reading an exit code."""
    ended = connection.wait([process.sentinel for process in processes], timeout=0)
    for process in processes:
        if process.sentinel not in ended and process.pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, number)


def _launch_variables(threads: int) -> dict[str, str]:
    """Environment variables of the ranks; those that the user has set are kept, except the number of threads and what
    keeps code of a hub out.
    """
    variables = {
        **worker_variables(threads, one_machine=True),
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # a fork server that has initialized CUDA could not fork ranks
    }
    always = {"OMP_NUM_THREADS": str(threads), hub_kernels.VARIABLE: hub_kernels.OFF}
    return {name: os.environ.get(name, value) for name, value in variables.items()} | always


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Sets `variables` in `os.environ`, which ranks get, and restores it afterwards."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def _without_main_module() -> Iterator[None]:
    """Hides `__main__`, which every started process would import: it may be a script without a guard."""
    main, sys.modules["__main__"] = sys.modules["__main__"], types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


@contextlib.contextmanager
def _passing_signals_to(processes: Sequence[ForkServerProcess]) -> Iterator[list[int]]:
    """Signals that would end this process go to `processes`. Yields those so far; in a thread there are none.

    Ranks are in their own sessions, which do not receive the terminal's Ctrl-C.
    """
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def pass_on(number: int, frame: object) -> None:
        passed = _for_ranks(number, asked)
        asked.append(number)
        _send(passed, processes)
        if passed != signal.SIGKILL:
            again = "" if number == signals.WARNING else "; the same again ends at once"
            text = f"\n{signal.Signals(number).name}: the step is finished and saved{again}\n"
            os.write(2, text.encode())

    before = {number: signal.getsignal(number) for number in (*signals.ASKING, signals.WARNING, *_HANGING_UP)}
    for number, handler in before.items():
        if number not in _HANGING_UP or handler is not signal.SIG_IGN:  # as nohup sets it
            signal.signal(number, pass_on)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            if handler is not None:  # None: not set by Python
                signal.signal(number, handler)


def _watch_launcher(run_dir: Path, rank: int, world_size: int) -> None:
    """Ends this rank when its launcher is gone, or at a SIGTERM because another rank failed."""
    launcher = multiprocessing.parent_process()
    assert launcher is not None
    signals.watch(
        failed=lambda: failures.others_failed(run_dir, rank, world_size), leave=os._exit,
        is_orphan=lambda: not launcher.is_alive(), counts=False,
    )  # fmt: skip


def _process_group() -> Any:
    """`torch.distributed`, if `main` has imported it and left its process group open."""
    module = sys.modules.get("torch.distributed")
    return module if module is not None and module.is_initialized() else None
