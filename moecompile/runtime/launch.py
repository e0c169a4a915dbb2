"""Starts one process per rank, or runs in place if torchrun or SLURM has started them already.

The launcher and its ranks share only the run directory: each rank runs `main(run_dir)` of a module. Ranks are forked
from a fork server, a process that imports what they need once, while the launcher does other things.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import logging
import multiprocessing
import os
import re
import signal
import sys
import threading
import time
import types
import uuid
from collections.abc import Iterator, Sequence
from multiprocessing import forkserver, reduction, util
from pathlib import Path
from typing import Any, NoReturn

from moecompile import waiting
from moecompile.checkpoint.resume import has_trained, is_restarted
from moecompile.errors import MoecompileError, RankFailure
from moecompile.rundir import place, settle
from moecompile.runtime import failures, logs, signals
from moecompile.runtime.in_place import GRACE_S, PEER_GRACE_S, is_leading, leave, run_on_all
from moecompile.runtime.ranks import check_mesh, worker_variables

_RESTART = "MOECOMPILE_RESTART"
_OF_ELASTIC = "SIGHUP,SIGQUIT"
"""Signals that the elastic agent handles; others end training after the current step."""
_ELASTIC = r"((LOCAL|GROUP|ROLE)_)?(RANK|WORLD_SIZE)|ROLE_NAME|MASTER_(ADDR|PORT)|TORCHELASTIC_.*|TORCH_NCCL_.*"
"""Environment variables that the elastic agent sets in a rank; all others are those of the launcher."""
_TALKING = ("distributed.elastic", "multiprocessing")
_KEPT = (*signals.ASKING, signals.WARNING, signal.SIGHUP, signal.SIGQUIT)


def launch(
    world_size: int, run_dir: Path, *, module: str, threads: int, timeout_s: float, max_restarts: int = 0,
    num_nodes: int = 1,
) -> None:  # fmt: skip
    """Runs `module`'s `main(run_dir)` on `world_size` ranks and returns when all of them have succeeded.

    If torchrun or SLURM has started ranks, this process is rank 0 and runs `main` itself.

    Args:
        threads: OpenMP threads per rank. timeout_s: of the rendezvous.
        max_restarts: how often all ranks are restarted after one was lost; user errors are not retried. In place,
            torchrun does this (its --max-restarts).
        num_nodes: of the mesh; processes of one machine may simulate several.

    Raises:
        UserError: a rank raised it.
        RankFailure: any other failure, with the rank and the last line of its traceback.
        ConfigError: torchrun or SLURM started ranks that do not fit the mesh.
        Stopped: a signal has ended the run.
    """
    if is_leading():
        run_on_all(world_size, run_dir, module=module, threads=threads, num_nodes=num_nodes)
    else:
        if played := check_mesh(num_nodes, world_size // num_nodes, 1, world_size, "moecompile"):
            waiting.done()
            print(played, flush=True)
        prepare([module], threads)
        with _environment(_launch_variables(threads)):
            _launch_again(world_size, run_dir, max_restarts, module=module, timeout_s=timeout_s)


def prepare(modules: Sequence[str], threads: int) -> None:
    """Starts the fork server, if none runs and there are no ranks: it imports `modules` while this process goes on.

    Args:
        modules: they may not start threads or use a GPU. threads: OpenMP threads per rank.
    """
    if not is_leading():
        multiprocessing.set_forkserver_preload(["moecompile.runtime.fork_server", __name__, *modules])
        with _environment(_launch_variables(threads)):
            forkserver.ensure_running()


def is_restart(run_dir: Path) -> bool:
    """Whether this rank was restarted, after an attempt that lost a rank or in a job that was requeued, and an attempt
    before has trained in `run_dir`: what was refused or lost before its first step has left everything as it was.
    """
    if int(os.environ.get(_RESTART) or 0) > 0:
        return place(run_dir) == run_dir
    return is_restarted() and has_trained(run_dir)


def _rank(module: str, run_dir: Path, folder: str, variables: dict[str, str], terminal: _Terminal) -> None:
    """A rank, in a process that was forked for it. Returning from `main` is success; any failure ends the process."""
    os.setsid()  # a terminal's Ctrl-C goes to the launcher alone
    multiprocessing.set_start_method(None, force=True)  # what the rank starts begins as in any program
    elastic = {name: value for name, value in os.environ.items() if re.fullmatch(_ELASTIC, name)}
    os.environ.clear()
    os.environ.update({**variables, **elastic})
    os.chdir(folder)
    if (torch := sys.modules.get("torch")) is not None:  # which has read the fork server's variable
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    with contextlib.suppress(OSError):  # Linux: what `ps -e` and `top` call it
        Path("/proc/self/comm").write_text(f"moecompile_r{rank}"[:15], encoding="utf-8")
    _watch_launcher(run_dir, rank, world_size)
    logs.hold(run_dir, rank)
    try:
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
    # Once the launcher has heard of all ranks: no thread that a callback has left keeps the process.
    util.Finalize(None, leave, args=(0,), exitpriority=0)


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


def _launch_again(world_size: int, run_dir: Path, max_restarts: int, **how: Any) -> None:
    """Starts all ranks, and restarts them after each lost rank; the last failure is raised."""
    run_dir.mkdir(parents=True, exist_ok=True)
    for restart in range(max_restarts + 1):
        settle(run_dir)  # what the attempt before could not
        failures.clear(run_dir)
        try:
            with _environment({_RESTART: str(restart)}):
                return _launch_local(world_size, run_dir, **how)
        except RankFailure as error:
            if restart == max_restarts:
                raise
            kept = failures.keep(run_dir, restart)
            text = str(error).replace(str(failures.errors_dir(run_dir)), str(kept))
            print(f"{text}\nrestart {restart + 1} of {max_restarts}", file=sys.stderr, flush=True)
    return None


def _launch_local(world_size: int, run_dir: Path, *, module: str, timeout_s: float) -> None:
    if (failure := _elastic_failure(world_size, run_dir, module=module, timeout_s=timeout_s)) is not None:
        raise failure  # here, where no traceback holds the elastic agent


def _elastic_failure(world_size: int, run_dir: Path, *, module: str, timeout_s: float) -> MoecompileError | None:
    """Runs all ranks; what ended them early."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from moecompile.runtime.meeting import ONE_MACHINE  # registers it

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=world_size,
        run_id=uuid.uuid4().hex,
        rdzv_backend=ONE_MACHINE,
        rdzv_configs={"timeout": int(timeout_s)},
        local_addr="127.0.0.1",
        max_restarts=0,
        monitor_interval=0.1,
        start_method="forkserver",
        shutdown_timeout=int(GRACE_S),
        signals_to_handle=_OF_ELASTIC,
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),  # else it creates a folder in /tmp; output is inherited
    )
    job = (module, run_dir, os.getcwd(), dict(os.environ), _Terminal())
    with _quiet_elastic(), _asked_to_end() as asked, _without_main_module():
        waiting.done()
        try:
            elastic_launch(config, _rank)(*job)
        except ChildFailedError as error:
            exit_codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
            if asked and (len(asked) > 1 or not failures.any_recorded(run_dir)):
                return signals.Stopped(asked[0])
            return failures.first_error(run_dir, world_size, exit_codes)
        except SignalException as error:
            return signals.Stopped(asked[0] if asked else int(error.sigval))
        finally:
            gc.collect()  # semaphores of the elastic agent, or their tracker would complain
    if (stopped := failures.stopped(run_dir)) is None:
        return None
    failures.clear(run_dir)
    return signals.Stopped(asked[0] if asked else stopped.number, stopped.step, stopped.num_steps)


def _launch_variables(threads: int) -> dict[str, str]:
    """Environment variables of the ranks; those that the user has set are kept, except the number of threads."""
    variables = {
        **worker_variables(threads, one_machine=True),
        "PYTORCH_NVML_BASED_CUDA_CHECK": "1",  # a fork server that has initialized CUDA could not fork ranks
    }
    return {name: os.environ.get(name, value) for name, value in variables.items()} | {"OMP_NUM_THREADS": str(threads)}


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Sets `variables` in `os.environ`, which the elastic agent passes to the ranks, and restores it afterwards."""
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
def _quiet_elastic() -> Iterator[None]:
    """Keeps the elastic agent's log off the terminal: its failures are raised as errors."""
    loggers, silence = [logging.getLogger(f"torch.{name}") for name in _TALKING], logging.NullHandler()
    before = [logger.propagate for logger in loggers]
    for logger in loggers:
        logger.propagate = False
        logger.addHandler(silence)
    try:
        yield
    finally:
        for logger, propagate in zip(loggers, before, strict=True):
            logger.propagate = propagate
            logger.removeHandler(silence)


@contextlib.contextmanager
def _asked_to_end() -> Iterator[list[int]]:
    """While ranks run: SIGINT or SIGTERM lets them save and end, the second one kills them; SIGUSR1 is passed on.

    Ranks are in their own sessions, which do not receive the terminal's Ctrl-C. Yields the signals so far.
    """
    asked: list[int] = []
    others = set(multiprocessing.process._children)  # type: ignore[attr-defined]  # of the program around this call
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def answer(number: int, frame: object) -> None:
        if number != signals.WARNING:
            asked.append(number)
        sent = number if number == signals.WARNING else signal.SIGINT if len(asked) == 1 else signal.SIGKILL
        # Not active_children(), which would reap them.
        for process in multiprocessing.process._children - others:  # type: ignore[attr-defined]
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, sent)
        if len(asked) < 2:
            again = "" if number == signals.WARNING else "; the same again ends at once"
            text = f"\n{signal.Signals(number).name}: the step is finished and saved{again}\n"
            os.write(2, text.encode())

    before = {number: signal.getsignal(number) for number in _KEPT}
    for number in (*signals.ASKING, signals.WARNING):
        signal.signal(number, answer)
    try:
        yield asked
    finally:
        for number, handler in before.items():
            if handler is not None:  # None: not set by Python
                signal.signal(number, handler)


def _watch_launcher(run_dir: Path, rank: int, world_size: int) -> None:
    """Ends this rank when its launcher is gone, or `GRACE_S` after a SIGTERM because another rank failed."""
    launcher = multiprocessing.parent_process()
    assert launcher is not None

    def failed() -> bool:
        return failures.others_failed(run_dir, rank, world_size)

    def end(code: int) -> NoReturn:
        if launcher.is_alive() and failed():
            time.sleep(GRACE_S)  # this rank may still record a failure
        os._exit(code)

    signals.watch(failed=failed, leave=end, is_orphan=lambda: not launcher.is_alive(), counts=False)


def _process_group() -> Any:
    """`torch.distributed`, if `main` has imported it and left its process group open."""
    module = sys.modules.get("torch.distributed")
    return module if module is not None and module.is_initialized() else None
