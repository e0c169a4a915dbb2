"""The elastic agent's rendezvous where all ranks are on this machine: it meets itself.

Its c10d rendezvous looks at the stack for each of its records, which took three of the seconds before ranks began.
"""

from __future__ import annotations

from torch.distributed import HashStore
from torch.distributed.elastic.rendezvous import (
    RendezvousHandler,
    RendezvousInfo,
    RendezvousParameters,
    RendezvousStoreInfo,
    rendezvous_handler_registry,
)

ONE_MACHINE = "one_machine"


class _OneMachine(RendezvousHandler):
    use_agent_store = False  # ranks make a store at a free port: each process group needs a fresh one

    def __init__(self, run_id: str) -> None:
        self.run_id = run_id

    def get_backend(self) -> str:
        return ONE_MACHINE

    def next_rendezvous(self) -> RendezvousInfo:
        store = HashStore()
        return RendezvousInfo(store, 0, 1, RendezvousStoreInfo.build(0, store, "127.0.0.1"))

    def is_closed(self) -> bool:
        return False

    def set_closed(self) -> None:
        """Nobody else would come."""

    def num_nodes_waiting(self) -> int:
        return 0

    def get_run_id(self) -> str:
        return self.run_id

    def shutdown(self) -> bool:
        return True


def _create(parameters: RendezvousParameters) -> RendezvousHandler:
    return _OneMachine(parameters.run_id)


rendezvous_handler_registry.register(ONE_MACHINE, _create)
