"""Starts one process per rank, or runs in place if torchrun or SLURM has started them already.

The launcher and its ranks share only the run directory. A rank is `python -m MODULE RUN_DIR`; its module has a
function `main(run_dir)` and ends with `rank_main(main)` under `if __name__ == "__main__"`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from moecompile import waiting
from moecompile.checkpoint.resume import has_trained, is_restarted
from moecompile.errors import RankFailure
from moecompile.rundir import place, settle
from moecompile.runtime import failures, logs, signals
from moecompile.runtime.in_place import GRACE_S, PEER_GRACE_S, is_leading, leave, run_on_all
from moecompile.runtime.ranks import check_mesh, worker_variables

_LAUNCHER_PID = "MOECOMPILE_LAUNCHER_PID"
_RESTART = "MOECOMPILE_RESTART"
_OF_ELASTIC = "SIGHUP,SIGQUIT"
"""Signals that the elastic agent handles; others end training after the current step."""
_KEPT = (*signals.ASKING, signals.WARNING, signal.SIGHUP, signal.SIGQUIT)


def launch(
    world_size: int, run_dir: Path, *, module: str, threads: int, timeout_s: float, max_restarts: int = 0,
    num_nodes: int = 1,
) -> None:  # fmt: skip
    """Runs `module`'s `main(run_dir)` on `world_size` ranks and returns when all of them have succeeded.

    If torchrun or SLURM has started ranks, this process is rank 0 and runs `main` itself.

    Args:
        module: what `python -m` runs. threads: OpenMP threads per rank. timeout_s: of the rendezvous.
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
        _launch_again(world_size, run_dir, max_restarts, module=module, threads=threads, timeout_s=timeout_s)


def is_restart(run_dir: Path) -> bool:
    """Whether this rank was restarted, after an attempt that lost a rank or in a job that was requeued, and an attempt
    before has trained in `run_dir`: what was refused or lost before its first step has left everything as it was.
    """
    if int(os.environ.get(_RESTART) or 0) > 0:
        return place(run_dir) == run_dir
    return is_restarted() and has_trained(run_dir)


def rank_main(main: Callable[[Path], Any]) -> NoReturn:
    """Runs a rank that `launch` started: `python -m MODULE RUN_DIR`.

    It ends with `os._exit`, because a gloo thread may abort the interpreter's shutdown, after success and failure.
    """
    run_dir, rank, world_size = Path(sys.argv[1]), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    _watch_launcher(int(os.environ[_LAUNCHER_PID]), run_dir, rank, world_size)
    logs.hold(run_dir, rank)
    try:
        main(run_dir)
        if (group := _process_group()) is not None:
            group.barrier()  # so that no exit breaks a connection that another rank needs
    except signals.Stopped as stopped:
        failures.record_stop(run_dir, stopped)
        leave(0)
    except SystemExit as error:  # only returning from `main` is success
        leave(error.code if isinstance(error.code, int) and error.code else 128 + signal.SIGTERM)
    except BaseException as error:
        failure = failures.record(error, run_dir, rank)
        if failure.peer_lost:
            time.sleep(PEER_GRACE_S)
        leave(failure.exit_code)
    leave(0)


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


def _launch_local(world_size: int, run_dir: Path, *, module: str, threads: int, timeout_s: float) -> None:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=world_size,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        rdzv_configs={"timeout": int(timeout_s)},
        local_addr="127.0.0.1",
        max_restarts=0,
        monitor_interval=0.1,
        shutdown_timeout=int(GRACE_S),
        signals_to_handle=_OF_ELASTIC,
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),  # else it creates a folder in /tmp; output is inherited
    )
    with _environment(_launch_variables(threads)), _quiet_elastic(), _asked_to_end(module) as asked:
        waiting.done()
        try:
            elastic_launch(config, sys.executable)("-m", module, str(run_dir))
        except ChildFailedError as error:
            exit_codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
            failed = failures.first_error(run_dir, world_size, exit_codes)
            if asked and (len(asked) > 1 or not failures.any_recorded(run_dir)):
                raise signals.Stopped(asked[0]) from None
            raise failed from None
        except SignalException as error:
            raise signals.Stopped(asked[0] if asked else int(error.sigval)) from None
        if (stopped := failures.stopped(run_dir)) is not None:
            failures.clear(run_dir)
            raise signals.Stopped(asked[0] if asked else stopped.number, stopped.step, stopped.num_steps)


def _launch_variables(threads: int) -> dict[str, str]:
    """Environment variables of the ranks; those that the user has set are kept, except the number of threads."""
    variables = worker_variables(threads, one_machine=True)
    kept = {name: os.environ[name] for name in variables if name in os.environ and name != "OMP_NUM_THREADS"}
    return {
        **variables,
        **kept,
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),  # a rank imports what its launcher can
        _LAUNCHER_PID: str(os.getpid()),
    }


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
def _quiet_elastic() -> Iterator[None]:
    """Keeps the elastic agent's log off the terminal: its failures are raised as errors."""
    logger, silence = logging.getLogger("torch.distributed.elastic"), logging.NullHandler()
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(silence)
    try:
        yield
    finally:
        logger.propagate = propagate
        logger.removeHandler(silence)


@contextlib.contextmanager
def _asked_to_end(module: str) -> Iterator[list[int]]:
    """While ranks run: SIGINT or SIGTERM lets them save and end, the second one kills them; SIGUSR1 is passed on.

    Ranks are in their own sessions, which do not receive the terminal's Ctrl-C. Yields the signals so far.
    """
    asked: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def answer(number: int, frame: object) -> None:
        if number != signals.WARNING:
            asked.append(number)
        sent = number if number == signals.WARNING else signal.SIGINT if len(asked) == 1 else signal.SIGKILL
        for pid in _ranks_of_this_process(module):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, sent)
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


def _ranks_of_this_process(module: str) -> list[int]:
    """Process ids of children that run `module`."""
    pids = []
    for path in Path("/proc/self/task").glob("*/children"):
        for pid in path.read_text(encoding="utf-8").split():
            with contextlib.suppress(OSError):
                if module.encode() in Path("/proc", pid, "cmdline").read_bytes().split(b"\0"):
                    pids.append(int(pid))
    return pids


def _watch_launcher(pid: int, run_dir: Path, rank: int, world_size: int) -> None:
    """Ends this rank when its launcher is gone, or `GRACE_S` after a SIGTERM because another rank failed."""

    def failed() -> bool:
        return failures.others_failed(run_dir, rank, world_size)

    def end(code: int) -> NoReturn:
        if os.getppid() == pid and failed():
            time.sleep(GRACE_S)  # this rank may still record a failure
        os._exit(code)

    signals.watch(failed=failed, leave=end, is_orphan=lambda: os.getppid() != pid, counts=False)


def _process_group() -> Any:
    """`torch.distributed`, if `main` has imported it and left its process group open."""
    module = sys.modules.get("torch.distributed")
    return module if module is not None and module.is_initialized() else None
