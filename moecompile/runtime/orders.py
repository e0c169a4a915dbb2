"""How ranks that torchrun or SLURM started connect to each other, and the orders of rank 0 to the others.

Both use the store at MASTER_ADDR and MASTER_PORT: torchrun's own, or under SLURM one in rank 0's process.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import random
import socket
import threading
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

from moecompile.errors import RankFailure, UserError
from moecompile.runtime.ranks import Ranks

MEET_TIMEOUT_S = 300.0
"""Timeout, seconds, for all ranks to connect to the store."""

RESOLVE_TIMEOUT_S = 8.0
"""Timeout, seconds, to resolve the master's host name."""

ANSWER_TIMEOUT_S = 30.0
"""Timeout, seconds, for an answer from the port once it takes connections. A store answers at once; `trainer.timeout_s`
is not known yet, because ranks meet before rank 0 composes the config."""

END_TIMEOUT_S = 30.0
"""Timeout, seconds, for the other ranks to read the last order."""

FREE_PORTS = (30_000, 32_768)
"""Ports for process groups: below the ephemeral ones of Linux, above those that SLURM's ranks derive."""

_TRIED_PORTS = 64
_orders = itertools.count()


@dataclass(frozen=True, kw_only=True)
class Order:
    """An order of rank 0 to the others. module: None ends them with `exit_code`. port: of the process group's store.

    code: what the caller names (moecompile.named_code).
    """

    run_dir: str = ""
    code: str = ""
    module: str | None = None
    threads: int = 1
    port: int = 0
    one_machine: bool = True
    exit_code: int = 0


def give(store: Any, order: Order) -> None:
    """Rank 0: publishes an order, which the others read with `next_order`."""
    store.set(f"moecompile/order/{next(_orders)}", json.dumps(asdict(order)))


def next_order(store: Any) -> Order:
    """The other ranks: waits for the next order.

    Raises:
        RankFailure: rank 0 is gone.
    """
    from torch.distributed import DistNetworkError, DistStoreError

    key = f"moecompile/order/{next(_orders)}"
    while True:
        try:
            store.wait([key], timedelta(seconds=60))
            break
        except DistNetworkError as error:
            raise RankFailure("rank 0 has ended without a message (killed by SIGKILL?)") from error
        except DistStoreError:  # rank 0 is busy without the other ranks
            continue
    return Order(**json.loads(store.get(key)))


def end_others(store: Any, ranks: Ranks, code: int) -> None:
    """Sends the last order, and waits until all ranks have read it: under SLURM the store is in this process."""
    if ranks.world_size == 1:
        return
    from torch.distributed import DistError

    try:
        give(store, Order(exit_code=code))
        deadline = time.monotonic() + END_TIMEOUT_S
        while store.add("moecompile/ended", 0) < ranks.world_size - 1 and time.monotonic() < deadline:
            time.sleep(0.02)
    except DistError:
        return


def places(store: Any, ranks: Ranks) -> list[tuple[int, int]]:
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
    # torchrun's store may be that of the attempt before, with its orders.
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
        with contextlib.suppress(Exception):  # here too
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


def free_port() -> int:
    """An unused port of this machine, if there is one below those that the kernel gives to connections.

    It is opened later, by another process; meanwhile only a program that wants this very port can take it.

    Raises:
        UserError: no port can be opened.
    """
    system = random.SystemRandom()  # no seed of the run: two runs would try the same ports
    for port in (*(system.randrange(*FREE_PORTS) for _ in range(_TRIED_PORTS)), 0):  # 0: as the kernel chooses
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return int(probe.getsockname()[1])
    low, high = FREE_PORTS
    raise UserError(
        f"no port of {socket.gethostname()} can be opened. Let programs listen on ports {low} to {high - 1}."
    )
