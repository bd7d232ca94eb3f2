"""A process that has come back to its pipeline without its world: torch's is of fixed ranks, and one of them has died.

DeepSpeed builds its engine by collectives over a world. This process has one that pretends: every rank is there, and
says what this one says. All that it has of the others comes by lines (`detour`).
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist


def enter(rank: int, world: int) -> None:
    """Has torch.distributed pretend to be rank ``rank`` of ``world``; before anything else initializes it."""
    # torch's own tests and dry runs have no other name for it.
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
    make = dist.new_group

    def pretend(*args: Any, **words: Any) -> Any:
        """A group of the same kind, whatever backend is asked for: another's would wait for its members."""
        return make(*args[:2], **{**words, "backend": None, "pg_options": None})

    dist.new_group = pretend


def is_alone() -> bool:
    """Whether this process is such a one."""
    return dist.is_initialized() and dist.get_backend() == "fake"
