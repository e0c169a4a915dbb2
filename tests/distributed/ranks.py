"""Ranks that stay: a test that draws its cases one by one asks them again and again, without a launch each time."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from typing import Any

import torch.distributed as dist

from tests.distributed.harness import run_distributed_test

_STOP = b"stop"


class Ranks:
    """`world_size` processes that wait for questions; `ask(fn, *args)` runs `fn(rank, *args)` on each.

    A question and the answers travel through a store, so every rank sees the same case, and a rank that fails answers
    with its error. Ranks must fail together or not at all: what waits for a peer that has failed ends with the timeout.
    """

    def __init__(self, world_size: int, timeout_s: float) -> None:
        self.world_size, self._asked = world_size, 0
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._thread = threading.Thread(
            target=run_distributed_test, args=(_serve, world_size, self._store.port), kwargs={"timeout_s": timeout_s}
        )
        self._thread.start()

    def ask(self, fn: Callable[..., Any], *args: Any) -> list[Any]:
        """What each rank returns.

        Raises:
            BaseException: what the first rank that failed raised.
        """
        number, self._asked = self._asked, self._asked + 1
        self._store.set(f"question/{number}", pickle.dumps((fn, args)))
        answers = [pickle.loads(self._store.get(f"answer/{number}/{rank}")) for rank in range(self.world_size)]
        for succeeded, value in answers:
            if not succeeded:
                raise value
        return [value for _, value in answers]

    def close(self) -> None:
        """Ends the processes."""
        self._store.set(f"question/{self._asked}", _STOP)
        self._thread.join()


def _serve(rank: int, world_size: int, port: int) -> None:
    store, number = dist.TCPStore("127.0.0.1", port, is_master=False), 0
    while (question := store.get(f"question/{number}")) != _STOP:
        fn, args = pickle.loads(question)
        try:
            answer = (True, fn(rank, *args))
        except Exception as error:
            answer = (False, error)
        store.set(f"answer/{number}/{rank}", pickle.dumps(answer))
        number += 1
