"""Who is missing when a run breaks: every rank that ends by itself says so in torch.distributed's store.

A failed collective names an address, not a rank. A rank that was killed, or hangs, says nothing: so it is found.
"""

from __future__ import annotations

import time
from datetime import timedelta

from torch.distributed import distributed_c10d

_KEY = "noflush/ended/{}"
_PATIENCE = 8.0
"""Seconds for the others to notice too."""


def missing_ranks(rank: int, world: int) -> list[int]:
    """Ranks that have not said in time that they end; this one says it now.

    If the store cannot be reached, rank 0: it keeps it (where the launcher keeps it, the launcher is gone).
    """
    try:
        store = distributed_c10d._get_default_store()
    except (RuntimeError, ValueError):
        return []  # the ranks have not met
    try:
        store.set_timeout(timedelta(seconds=2))
        store.set(_KEY.format(rank), "")
        silent = [other for other in range(world) if other != rank]
        deadline = time.monotonic() + _PATIENCE
        while silent and time.monotonic() < deadline:
            silent = [other for other in silent if not store.check([_KEY.format(other)])]
            time.sleep(0.1)
    except RuntimeError:  # DistNetworkError and its kin
        return [0] if rank else []
    return silent
