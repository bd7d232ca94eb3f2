"""torchft's gloo group, which meets under keys that nobody has used before.

torchft has the members of a quorum meet under the quorum's number, in a store that outlives the lighthouse. One that is
started anew counts from 1 again: members would read where those of an older quorum listened, who may be gone.
"""

from __future__ import annotations

import os
import time
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import PrefixStore, ProcessGroup, Store  # type: ignore[attr-defined]
from torch.distributed import ProcessGroupGloo as Gloo
from torchft.process_group import ProcessGroupGloo

from noflush.replicas.listening import gloo_device

_POLL_S = 0.005


class FreshGloo(ProcessGroupGloo):  # type: ignore[misc]
    """A reconfigurable gloo group, whose members listen at the address that they are given.

    The first member chooses a word, and answers every member that says hello with a word of its own until all have
    taken it; what an older meeting has left is never an answer. `_create_pg` is called by torchft with the quorum's
    store.
    """

    def __init__(self, address: str, timeout: timedelta) -> None:
        super().__init__(timeout)
        self._address = address

    def _create_pg(self, store: Store, rank: int, world_size: int) -> Any:
        deadline = time.monotonic() + self._timeout.total_seconds()
        word = _lead(store, world_size, deadline) if rank == 0 else _follow(store, rank, deadline)
        met = PrefixStore(word, store)
        options = Gloo._Options()  # type: ignore[attr-defined]
        options._timeout, options._devices, options._threads = self._timeout, [gloo_device(self._address)], 2
        backend = Gloo(met, rank, world_size, options)
        backend._set_sequence_number_for_group()
        group = ProcessGroup(met, rank, world_size)
        group._set_default_backend(ProcessGroup.BackendType.GLOO)
        for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
            group._register_backend(torch.device(device), ProcessGroup.BackendType.GLOO, backend)
        return group


def _new_word() -> str:
    return os.urandom(8).hex()


def _lead(store: Store, world: int, deadline: float) -> str:
    word, missing, answered = _new_word(), set(range(1, world)), set()
    while missing:
        for rank in sorted(missing):
            if store.check([f"taken/{word}/{rank}"]):
                missing.discard(rank)
            elif store.check([f"hello/{rank}"]):
                theirs = store.get(f"hello/{rank}").decode()
                if theirs not in answered:
                    answered.add(theirs)
                    store.set(f"answer/{theirs}", word)
        _wait(deadline, f"members {sorted(missing)} of the new quorum")
    return word


def _follow(store: Store, rank: int, deadline: float) -> str:
    mine = _new_word()
    store.set(f"hello/{rank}", mine)
    while not store.check([f"answer/{mine}"]):
        _wait(deadline, "the first member of the new quorum")
    word = store.get(f"answer/{mine}").decode()
    store.set(f"taken/{word}/{rank}", "1")
    return word


def _wait(deadline: float, whom: str) -> None:
    if time.monotonic() > deadline:
        raise TimeoutError(f"{whom} did not come to meet the others")
    time.sleep(_POLL_S)
