"""Starts one process per rank, or runs in place where torchrun or SLURM has started them already.

The launcher and its ranks meet in the run directory alone. A rank is `python -m MODULE RUN_DIR`; its module has a
function `main(run_dir)` and ends with `rank_main(main)` under `if __name__ == "__main__"`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import itertools
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

from moecompile.errors import ConfigError, RankFailure, UserError
from moecompile.runtime import failures
from moecompile.runtime.ranks import Ranks, in_place_ranks, worker_variables

GRACE_S = 5.0
"""Seconds between asking a rank to end and ending it."""

AGREE_TIMEOUT_S = 300.0
"""Seconds in which ranks that a cluster starts must have found each other."""

PEER_GRACE_S = 1.0
"""Seconds that a rank which has lost a peer waits before it leaves, so that all others can tell what they saw."""

_LAUNCHER_PID = "MOECOMPILE_LAUNCHER_PID"
_RESTART = "MOECOMPILE_RESTART"
_ENDING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


def launch(
    world_size: int, run_dir: Path, *, module: str, threads: int, timeout_s: float, max_restarts: int = 0
) -> None:
    """Runs `module`'s `main(run_dir)` on `world_size` ranks and returns when all of them have succeeded.

    Where the environment already has ranks, this process is one of them and runs `main` itself; if that fails, the
    first failing rank raises and the others leave without a word.

    Args:
        module: what `python -m` runs. threads: OpenMP threads per rank. timeout_s: of the ranks' first meeting.
        max_restarts: how often all ranks are started again after one was lost; a mistake of the user's is not repeated.
            In place this is torchrun's business (its --max-restarts).

    Raises:
        UserError: what a rank raised, if it is the user's to mend.
        RankFailure: anything else, naming the rank and its traceback's last line.
        ConfigError: torchrun or SLURM started another number of ranks.
    """
    ranks = in_place_ranks()
    if ranks is None:
        _launch_again(world_size, run_dir, max_restarts, module=module, threads=threads, timeout_s=timeout_s)
    else:
        _run_in_place(world_size, run_dir, ranks, module=module, threads=threads)


def is_restart() -> bool:
    """Whether the launcher has started this rank again, after an attempt that lost a rank."""
    return int(os.environ.get(_RESTART) or os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0) > 0


def rank_main(main: Callable[[Path], Any]) -> NoReturn:
    """The whole life of a rank that `launch` started: `python -m MODULE RUN_DIR`.

    Ends with `os._exit`: a gloo thread may abort the interpreter's own shutdown, after success and after failure.
    """
    _watch_launcher(int(os.environ[_LAUNCHER_PID]))
    run_dir, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    if rank > 0:
        _redirect_output(run_dir / "logs" / f"rank_{rank}.log")
    try:
        main(run_dir)
        if (group := _process_group()) is not None:
            group.barrier()  # nobody's leaving breaks a connection that another rank still needs
    except KeyboardInterrupt:
        leave(128 + signal.SIGINT)
    except SystemExit as error:  # also Lightning's answer to SIGTERM; only returning from `main` is success
        leave(error.code if isinstance(error.code, int) and error.code else 128 + signal.SIGTERM)
    except BaseException as error:
        failure = failures.record(error, run_dir, rank)
        if failure.peer_lost:
            time.sleep(PEER_GRACE_S)
        leave(failure.exit_code)
    leave(0)


def agree_on_run_dir(ranks: Ranks, run_dir: Path) -> Path:
    """Rank 0's `run_dir`, for all ranks in place, before anything is written there.

    `launch` calls it by itself; a command line that wants the directory earlier calls it on every rank.
    """
    if ranks.rank == 0:
        failures.clear(run_dir)  # before any rank can fail in it
    return Path(_from_rank_0(ranks, str(run_dir.resolve())))


def leave(code: int) -> NoReturn:
    """Ends this process at once, with its output flushed. In place, the command line must end with it too."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def leave_silently(code: int) -> NoReturn:
    """Ends a rank in place whose error another rank tells about.

    torchrun ends all ranks when the first one ends; so it waits, until the one that speaks has ended.
    """
    time.sleep(GRACE_S)
    leave(code)


def _launch_again(world_size: int, run_dir: Path, max_restarts: int, **how: Any) -> None:
    """Starts all ranks, again after each lost rank; the last failure is raised."""
    run_dir.mkdir(parents=True, exist_ok=True)
    for restart in range(max_restarts + 1):
        failures.clear(run_dir)
        try:
            with _environment({_RESTART: str(restart)}):
                return _launch_local(world_size, run_dir, **how)
        except RankFailure as error:
            if restart == max_restarts:
                raise
            kept = failures.keep(run_dir, restart)
            told = str(error).replace(str(failures.errors_dir(run_dir)), str(kept))
            print(f"{told}\nrestart {restart + 1} of {max_restarts}", file=sys.stderr, flush=True)
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
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),  # otherwise it leaves a folder in /tmp; output is inherited
    )
    with _environment(_launch_variables(threads)), _quiet_elastic(), _own_signal_handlers():
        try:
            elastic_launch(config, sys.executable)("-m", module, str(run_dir))
        except ChildFailedError as error:
            exit_codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
            raise failures.first_error(run_dir, world_size, exit_codes) from None
        except SignalException as error:
            if error.sigval == signal.SIGINT:
                raise KeyboardInterrupt from None
            raise SystemExit(128 + error.sigval) from None


def _run_in_place(world_size: int, run_dir: Path, ranks: Ranks, *, module: str, threads: int) -> None:
    if world_size != ranks.world_size:
        if ranks.rank > 0:
            leave_silently(ConfigError.exit_code)
        nodes = ranks.world_size // ranks.local_world_size
        raise ConfigError(
            "mesh.num_nodes * mesh.ranks_per_node",
            world_size,
            f"{ranks.launcher} started {ranks.world_size} ranks, {ranks.local_world_size} on each node",
            f"Use mesh.num_nodes={nodes} mesh.ranks_per_node={ranks.local_world_size}, or start {world_size} ranks",
        )
    import torch

    for name, value in worker_variables(threads, one_machine=ranks.local_world_size == world_size).items():
        os.environ.setdefault(name, value)
    torch.set_num_threads(threads)  # OpenMP has read its variable long ago
    run_dir = agree_on_run_dir(ranks, run_dir)
    # A store of its own: in the launcher's, a second process group would find the addresses of the first one.
    os.environ["MASTER_PORT"] = _from_rank_0(ranks, str(_free_port()))
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
    try:
        importlib.import_module(module).main(run_dir)
        if (group := _process_group()) is not None:
            group.barrier()
            group.destroy_process_group()  # a multirun starts the next one in this process
    except Exception as error:
        failure = failures.record(error, run_dir, ranks.rank)
        if failure.peer_lost:
            time.sleep(PEER_GRACE_S)  # lets the rank that failed first have the word
        if not failures.claim(run_dir):
            leave_silently(failure.exit_code)
        raise failures.first_error(run_dir, world_size, {}) from error


def _launch_variables(threads: int) -> dict[str, str]:
    """What the ranks of this machine inherit; what the user has set stays, but for the number of threads."""
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
    """`os.environ` with `variables`, put back afterwards: the elastic agent hands all of it to the ranks."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def _quiet_elastic() -> Iterator[None]:
    """Keeps the elastic agent's log off the terminal: what it has to say is raised as an error."""
    logger, silence = logging.getLogger("torch.distributed.elastic"), logging.NullHandler()
    propagate, logger.propagate = logger.propagate, False
    logger.addHandler(silence)
    try:
        yield
    finally:
        logger.propagate = propagate
        logger.removeHandler(silence)


@contextlib.contextmanager
def _own_signal_handlers() -> Iterator[None]:
    """Puts the signal handlers back that the elastic agent replaces (in the main thread, the only one that can)."""
    before = {number: signal.getsignal(number) for number in _ENDING}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in before.items():
                if handler is not None:  # None: not set by Python
                    signal.signal(number, handler)


def _watch_launcher(pid: int) -> None:
    """Ends this rank when its launcher is gone, or `GRACE_S` after a signal that asked it to end.

    A rank that waits in a collective never reaches its Python signal handlers (Lightning installs one for SIGTERM), so
    that it would ignore the signal. The wake-up descriptor is written to even then.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)

    def watch() -> None:
        while os.getppid() == pid:
            if select.select([reader], [], [], 0.5)[0] and set(os.read(reader, 64)) & set(_ENDING):
                time.sleep(GRACE_S)
                break
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=watch, name="watch-launcher", daemon=True).start()


def _redirect_output(path: Path) -> None:
    """Sends standard output and error, those of C++ too, to `path`: rank 0 alone talks to the terminal."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb", buffering=0) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)


def _process_group() -> Any:
    """`torch.distributed`, if `main` imported it and left its process group open."""
    module = sys.modules.get("torch.distributed")
    return module if module is not None and module.is_initialized() else None


_messages = itertools.count()


def _from_rank_0(ranks: Ranks, value: str) -> str:
    """Rank 0's `value`; all ranks in place call it equally often."""
    os.environ.update(ranks.variables())
    store, key = _launcher_store(), f"moecompile/{next(_messages)}"
    if ranks.rank == 0:
        store.set(key, value)
    return str(store.get(key).decode())


@functools.cache
def _launcher_store() -> Any:
    """The store at the launcher's MASTER_ADDR and MASTER_PORT; kept, because rank 0 may be its server.

    Raises:
        UserError: somebody else listens there.
    """
    from torch.distributed import DistNetworkError
    from torch.distributed.rendezvous import rendezvous

    try:
        return next(rendezvous("env://", timeout=timedelta(seconds=AGREE_TIMEOUT_S)))[0]
    except DistNetworkError as error:
        if "EADDRINUSE" not in str(error):
            raise
        place = f"MASTER_PORT={os.environ['MASTER_PORT']}"
        raise UserError(
            f"{place}: another program uses this port of {os.environ['MASTER_ADDR']}. Set MASTER_PORT to a free one."
        ) from None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
