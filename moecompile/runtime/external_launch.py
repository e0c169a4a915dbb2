"""Ranks that torchrun or SLURM started: rank 0 runs the command line, the others follow its commands.

Algorithm:
1. All ranks connect to the store at the launcher's MASTER_ADDR and MASTER_PORT (torchrun's own, or under SLURM one in
   rank 0's process), and publish their node.
2. Rank 0 composes the config. For each launch it sends a command with the run directory and the module; all ranks run
   its `main(run_dir)`. When the command line ends, the others end too, with its exit code.
3. If a rank fails, one rank reports the first cause: the one that first claims the report in the run directory. The
   others exit after it, without a message.

Before there is a run directory, the ranks of a machine know each other by files in its temporary folder:

    TMP/moecompile-UID-JOB/rank_N    locked while the process lives; removed when it exits regularly
    TMP/moecompile-UID-JOB/reported  a rank has reported the failure
"""

from __future__ import annotations

import functools
import importlib
import itertools
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

from moecompile import hub_kernels, waiting
from moecompile.errors import MoecompileError, RankFailure, UserError
from moecompile.named_code import VARIABLE
from moecompile.rundir import discard, is_discarded, output_dir
from moecompile.runtime import failures, logs, signals, slurm
from moecompile.runtime.ranks import Ranks, check_mesh, check_order, check_places, free_port, worker_variables

GRACE_S = 5.0
"""Seconds that a rank waits for another one, which may report the same failure, or end this rank."""

PEER_GRACE_S = 1.0
"""Seconds that a rank which has lost a peer waits, so that all other ranks can record their failures."""

MEET_TIMEOUT_S = 300.0
"""Timeout, seconds, for all ranks to connect to the store."""

RESOLVE_TIMEOUT_S = 8.0
"""Timeout, seconds, to resolve the master's host name."""

ANSWER_TIMEOUT_S = 30.0
"""Timeout, seconds, for an answer from the port once it takes connections. A store answers at once; `trainer.timeout_s`
is not known yet, because ranks meet before rank 0 composes the config."""

END_TIMEOUT_S = 30.0
"""Timeout, seconds, for the other ranks to read the last command."""

_OF_A_STEP = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
_CLAIM_S = 60.0
"""Seconds after which a claim belongs to an earlier job."""
_commands = itertools.count()


@dataclass
class _LaunchState:
    """The current run of this process."""

    run_dir: Path | None = None
    was_pending: bool = False
    ranks: Ranks | None = None
    terminal: int = 2  # descriptor of the terminal's stderr
    ended: bool = False  # other ranks have exited after a failure
    is_reporting: bool = False  # this process reports the failure


_state = _LaunchState()


def lead(ranks: Ranks, command_line: Callable[[], int]) -> NoReturn:
    """Rank 0: runs the command line, and ends all ranks with its exit code."""
    _hold(ranks)
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
        _claim(ranks)  # the command line has reported it
    if not _state.ended:
        _end_others(store, ranks, code)
    if (told := slurm.requeue_if_asked()) is not None:
        print(told, flush=True)
    leave(code)


def follow(ranks: Ranks) -> NoReturn:
    """The other ranks: run the commands of rank 0 until the last one."""
    _state.terminal = logs.hide()
    _hold(ranks)
    _watch(ranks)
    try:
        check_order(ranks)
        store = meet(ranks)
        while (command := _next_command(store)).module is not None:
            with suppress(signals.Stopped):  # rank 0 reports it and sends the exit code
                _run(command, ranks)
        store.add("moecompile/ended", 1)
    except Exception as error:
        if _state.run_dir is None:
            _report_early(error, ranks)
            leave(_code(error))
        cause = _failed(error, _state.run_dir, ranks)
        if cause is None:
            time.sleep(GRACE_S)
        else:
            os.write(_state.terminal, f"error: {cause}\n".encode())
            if cause.exit_code == UserError.exit_code:
                discard(_state.run_dir)  # rank 0 may be ended before it can
        leave(_code(cause or error))
    leave(command.exit_code)


def is_leading() -> bool:
    """Whether this process is rank 0 of ranks that torchrun or SLURM started."""
    return _state.ranks is not None


def check_started(num_nodes: int, ranks_per_node: int) -> None:
    """Checks that ranks which a launcher started fit a mesh, as far as their variables tell; `run_on_all` sees all.

    Raises:
        ConfigError: they do not.
    """
    ranks = _state.ranks
    if ranks is not None and ranks.world_size % ranks.local_world_size == 0:
        hosts = ranks.world_size // ranks.local_world_size
        check_mesh(num_nodes, ranks_per_node, hosts, ranks.local_world_size, ranks.launcher)


def run_on_all(world_size: int, run_dir: Path, *, module: str, threads: int, num_nodes: int) -> None:
    """Rank 0: runs `module`'s `main(run_dir)` on all ranks.

    Raises:
        UserError, ConfigError: the ranks do not fit the mesh, or a rank raised it.
        RankFailure: any other failure. Both have `reported` set if another rank has reported it.
    """
    ranks = _state.ranks
    assert ranks is not None
    if _state.ended:
        raise RankFailure("the other ranks have ended with an earlier job")
    store = meet(ranks)
    all_places = _places(store, ranks)
    check_places(all_places, ranks.launcher)
    hosts = len({node for node, _ in all_places})
    played = check_mesh(num_nodes, world_size // num_nodes, hosts, ranks.world_size // hosts, ranks.launcher)
    waiting.done()
    if played:
        print(played, flush=True)
    failures.clear(run_dir)
    command = Command(
        run_dir=str(run_dir.resolve()), module=module, threads=threads, port=free_port(), one_machine=hosts == 1,
        code=os.environ.get(VARIABLE, ""),
    )  # fmt: skip
    _give(store, command)
    try:
        _run(command, ranks)
    except signals.Stopped:
        raise
    except Exception as error:
        _state.ended = True
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
    if _state.ranks is not None:
        _release(_state.ranks, keep_claim=code != 0)
    os._exit(code)


def _run(command: Command, ranks: Ranks) -> None:
    import torch

    for name, value in worker_variables(command.threads, one_machine=command.one_machine).items():
        os.environ.setdefault(name, value)
    hub_kernels.switch_off(told=False)
    torch.set_num_threads(command.threads)  # OpenMP has already read its variable
    run_dir = Path(command.run_dir)
    # A store of its own: in the launcher's, a second process group would find the addresses of the first one.
    os.environ["MASTER_PORT"] = str(command.port)
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
    os.environ[VARIABLE] = command.code
    if not run_dir.is_dir():
        raise UserError(
            f"hydra.run.dir={run_dir}: is not there on {socket.gethostname()} (rank {ranks.rank}). All ranks must see "
            "the same run directory: use one on a shared file system."
        )
    _state.run_dir, _state.was_pending = run_dir, output_dir(run_dir) != run_dir
    logs.hold(run_dir, ranks.rank)
    try:
        importlib.import_module(command.module or "").main(run_dir)
    except SystemExit as error:
        raise RankFailure(f"the process wanted to end with exit code {error.code}") from error
    module = sys.modules.get("torch.distributed")
    if module is not None and module.is_initialized():
        module.barrier()
        module.destroy_process_group()  # the next job of a multirun starts one in this process
    _state.run_dir = None


def _failed(error: Exception, run_dir: Path, ranks: Ranks) -> MoecompileError | None:
    """Records the failure of this rank; returns the error to report, or None if another rank reports it."""
    folder = output_dir(run_dir)  # once another rank discards it, that would be the folder of the previous run
    if is_discarded(run_dir, was_pending=_state.was_pending):
        return None
    failure = failures.record(error, folder, ranks.rank)
    if failure.peer_lost:
        time.sleep(PEER_GRACE_S)  # so that the rank that failed first reports it
    if is_discarded(run_dir, was_pending=_state.was_pending) or not failures.claim(folder):
        return None
    _state.is_reporting = True
    return failures.first_error(folder, ranks.world_size, {})


# -- how ranks meet, and the commands of rank 0 ------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Command:
    """What the other ranks do next. module: None ends them with `exit_code`. port: of the process group's store.

    code: what the caller names (moecompile.named_code).
    """

    run_dir: str = ""
    code: str = ""
    module: str | None = None
    threads: int = 1
    port: int = 0
    one_machine: bool = True
    exit_code: int = 0


def _give(store: Any, command: Command) -> None:
    """Rank 0: publishes a command, which the others read with `_next_command`."""
    store.set(f"moecompile/command/{next(_commands)}", json.dumps(asdict(command)))


def _next_command(store: Any) -> Command:
    """The other ranks: waits for the next command.

    Raises:
        RankFailure: rank 0 is gone.
    """
    from torch.distributed import DistNetworkError, DistStoreError

    key = f"moecompile/command/{next(_commands)}"
    while True:
        try:
            store.wait([key], timedelta(seconds=60))
            break
        except DistNetworkError as error:
            raise RankFailure("rank 0 has ended without a message (killed by SIGKILL?)") from error
        except DistStoreError:  # rank 0 is busy without the other ranks
            continue
    return Command(**json.loads(store.get(key)))


def _end_others(store: Any, ranks: Ranks, code: int) -> None:
    """Sends the last command, and waits until all ranks have read it: under SLURM the store is in this process."""
    if ranks.world_size == 1:
        return
    from torch.distributed import DistError

    try:
        _give(store, Command(exit_code=code))
        deadline = time.monotonic() + END_TIMEOUT_S
        while store.add("moecompile/ended", 0) < ranks.world_size - 1 and time.monotonic() < deadline:
            time.sleep(0.02)
    except DistError:
        return


def _places(store: Any, ranks: Ranks) -> list[tuple[int, int]]:
    """(node, local rank) of every rank."""
    from torch.distributed import DistStoreError

    keys = [f"moecompile/place/{rank}" for rank in range(ranks.world_size)]
    try:
        store.wait(keys, timedelta(seconds=MEET_TIMEOUT_S))
    except DistStoreError:
        missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
        raise RankFailure(f"ranks {missing} of {ranks.world_size} have not come in {MEET_TIMEOUT_S:.0f} s") from None
    return [tuple(json.loads(store.get(key))) for key in keys]


@functools.cache
def meet(ranks: Ranks) -> Any:
    """The store at the launcher's MASTER_ADDR and MASTER_PORT; kept, because rank 0 may be its server.

    Raises:
        UserError: the master has no address, or another program uses the port.
    """
    _resolve(ranks.master_addr)
    from torch.distributed import DistNetworkError, PrefixStore
    from torch.distributed.rendezvous import rendezvous

    os.environ.update(ranks.variables())
    _check_answer(ranks)
    try:
        store = next(rendezvous("env://", timeout=timedelta(seconds=MEET_TIMEOUT_S)))[0]
    except DistNetworkError as error:
        port = f"MASTER_PORT={ranks.master_port}"
        if "EADDRINUSE" in str(error):
            raise UserError(
                f"{port}: another program uses this port of {ranks.master_addr}. Set MASTER_PORT to a free one."
            ) from None
        raise RankFailure(f"MASTER_ADDR={ranks.master_addr} {port}: rank 0 cannot be reached there ({error})") from None
    # torchrun's store may be that of the attempt before, with its commands.
    store = PrefixStore(f"moecompile/attempt/{os.environ.get('TORCHELASTIC_RESTART_COUNT') or 0}", store)
    store.set(f"moecompile/place/{ranks.rank}", json.dumps([ranks.node, ranks.local_rank]))
    return store


def _check_answer(ranks: Ranks) -> None:
    """Checks that what listens at the port is a store, for whose answer torch would wait without end.

    Until something listens there, nothing is said: the process that will may still be importing torch.

    Raises:
        UserError: it takes connections and does not answer.
    """
    if ranks.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True):
        return  # this process is going to listen there
    from torch.distributed import TCPStore

    where, answered = (ranks.master_addr, ranks.master_port), threading.Event()
    deadline = time.monotonic() + MEET_TIMEOUT_S
    while not _takes_connections(where):
        if time.monotonic() > deadline:
            return  # `rendezvous` says so
        time.sleep(0.2)

    def ask() -> None:
        with suppress(Exception):  # here too
            TCPStore(*where, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=ANSWER_TIMEOUT_S))
        answered.set()

    threading.Thread(target=ask, daemon=True).start()
    if not answered.wait(ANSWER_TIMEOUT_S):
        raise UserError(
            f"MASTER_PORT={ranks.master_port}: another program uses this port of {ranks.master_addr}; it takes "
            f"connections, and has not answered in {ANSWER_TIMEOUT_S:.0f} s. Set MASTER_PORT to a free one."
        )


def _takes_connections(where: tuple[str, int]) -> bool:
    try:
        socket.create_connection(where, timeout=10.0).close()
    except OSError:
        return False
    return True


def _resolve(host: str) -> None:
    """Resolves the master's host name; in a thread, because a resolver may try for minutes."""
    found: list[BaseException | None] = []

    def look_up() -> None:
        try:
            socket.getaddrinfo(host, None)
            found.append(None)
        except OSError as error:
            found.append(error)

    thread = threading.Thread(target=look_up, daemon=True)
    thread.start()
    thread.join(RESOLVE_TIMEOUT_S)
    if not found or found[0] is not None:
        reason = f"{found[0]}" if found else f"no answer in {RESOLVE_TIMEOUT_S:.0f} s"
        raise UserError(
            f"MASTER_ADDR={host}: has no address on {socket.gethostname()} ({reason}). "
            "Set it to a name or address of rank 0's machine."
        )


# -- reports ---------------------------------------------------------------------------------------------------------


def _watch(ranks: Ranks) -> None:
    _state.ranks = ranks

    def failed() -> bool:
        run_dir = _state.run_dir
        if run_dir is None:
            return any(rank != ranks.rank for rank in _gone(ranks))
        if is_discarded(run_dir, was_pending=_state.was_pending):
            return False
        return failures.others_failed(run_dir, ranks.rank, ranks.world_size)

    def end(code: int) -> NoReturn:
        if _state.is_reporting:
            time.sleep(GRACE_S)
        elif code == 128 + signal.SIGTERM and failed():
            _report_other_rank(ranks)
        else:
            _report_signal(code - 128, ranks)
        _release(ranks, keep_claim=True)
        os._exit(code)

    signals.watch(failed=failed, leave=end, is_orphan=lambda: False, counts=True)


def _report_other_rank(ranks: Ranks) -> None:
    """Reports the rank that has failed and ends this process, unless another rank has reported it."""
    run_dir = _state.run_dir
    cause: MoecompileError | None = None
    if run_dir is None and _claim(ranks):
        lost = next(rank for rank in _gone(ranks) if rank != ranks.rank)
        cause = failures.ended_silently(lost, ranks.world_size)
    elif run_dir is not None:
        folder = output_dir(run_dir)
        if not is_discarded(run_dir, was_pending=_state.was_pending) and failures.claim(folder):
            cause = failures.first_error(folder, ranks.world_size, {})
    if cause is not None:
        os.write(_state.terminal, f"error: {cause}\n".encode())
        os._exit(cause.exit_code)


def _report_signal(number: int, ranks: Ranks) -> None:
    """Reports a signal, which a launcher may have sent because a rank was killed before it locked its file."""
    if ranks.node > 0:
        return
    if ranks.rank > 0:
        time.sleep(PEER_GRACE_S)
    if _claim(ranks):
        other = (
            f" If you did not send it, another rank ended before it could report: see what {ranks.launcher} reports."
            if number == signal.SIGTERM and _state.run_dir is None
            else ""
        )
        name = signal.Signals(number).name
        os.write(_state.terminal, f"error: rank {ranks.rank} was ended at once by {name}.{other}\n".encode())


def _report_early(error: Exception, ranks: Ranks) -> None:
    """Reports an error before there is a run directory: rank 0 first, others if no rank on their machine has."""
    if ranks.rank > 0:
        time.sleep(GRACE_S)
    if _claim(ranks):
        told = f"error: {error}" if isinstance(error, MoecompileError) else "".join(traceback.format_exception(error))
        text = told.rstrip() + f" (rank {ranks.rank} of {ranks.world_size})" * (ranks.rank > 0)
        os.write(_state.terminal, f"{text}\n".encode())


def _code(error: BaseException) -> int:
    return error.exit_code if isinstance(error, MoecompileError) else 1


# -- the ranks of this machine ----------------------------------------------------------------------------------------


def _hold(ranks: Ranks) -> None:
    """Locks the file of this process, which shows that it lives."""
    path = _folder(ranks.master_port) / f"rank_{ranks.rank}"
    with suppress(OSError):  # a full disk: other ranks cannot see that this one lives
        path.parent.mkdir(mode=0o700, exist_ok=True)
        path.touch()
        logs.lock(path, -1 - ranks.rank)


def _gone(ranks: Ranks) -> list[int]:
    """Ranks that were started on this machine and have ended, but not regularly."""
    names = sorted(_folder(ranks.master_port).glob("rank_*"))
    return [int(path.name.removeprefix("rank_")) for path in names if logs.is_free(path)]


def _claim(ranks: Ranks) -> bool:
    """True for the first rank of this machine that calls it: that rank reports the failure."""
    path = _folder(ranks.master_port) / "reported"
    try:
        return logs.claim_file(path, for_s=_CLAIM_S)
    except OSError:  # the folder is gone or cannot be created: two reports are better than none
        return True


def _release(ranks: Ranks, *, keep_claim: bool) -> None:
    """Removes the file of this process, which exits. keep_claim: so that a later rank does not report again."""
    (_folder(ranks.master_port) / f"rank_{ranks.rank}").unlink(missing_ok=True)
    if ranks.local_rank == 0 and not keep_claim:
        shutil.rmtree(_folder(ranks.master_port), ignore_errors=True)


@functools.cache
def _folder(port: int) -> Path:
    """The folder of a job on this machine, the same for all ranks of a job step or of one launcher."""
    job = [os.environ[name] for name in _OF_A_STEP if name in os.environ]
    if not job:
        started = Path(f"/proc/{os.getppid()}/stat").read_text(encoding="utf-8").rsplit(")", 1)[1].split()[19]
        job = [str(os.getppid()), started]
    return Path(tempfile.gettempdir(), f"moecompile-{os.getuid()}-{'-'.join([*job, str(port)])}")
