"""Why a run breaks: every rank that ends by itself leaves its reason in torch.distributed's store.

A failed collective names an address, not a rank. A rank that was killed, or hangs, says nothing: so it is found.
"""

from __future__ import annotations

import time
from datetime import timedelta

from torch.distributed import DistError, distributed_c10d

from noflush.channels import PeerError

_KEY = "noflush/ended/{}"
_PATIENCE = 8.0
"""Seconds for the others to notice too."""
_LOST = "lost a peer"


def is_about_peers(error: BaseException) -> bool:
    """Whether ``error`` tells of another rank rather than of this one."""
    words = "gloo", "nccl", "connection", "socket", "timed out", "peer"
    backend = isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)
    return isinstance(error, (PeerError, DistError)) or backend


def last_words(error: BaseException, rank: int, world: int) -> dict[int, str]:
    """Says why this rank ends, and hears from the others: what is wrong, by rank.

    A rank's own fault is said at once. One that lost a peer waits a little for the others to speak; who then has not is
    gone. If the store cannot be reached, it is rank 0, which keeps it (where the launcher keeps it, the launcher).
    """
    mine = _LOST if is_about_peers(error) else f"failed: {type(error).__name__}: {error}".splitlines()[0]
    gone = "is gone: killed, or it hangs"
    try:
        store = distributed_c10d._get_default_store()
    except (RuntimeError, ValueError):  # the ranks have not met
        return {} if mine == _LOST else {rank: mine}
    found: dict[int, str] = {} if mine == _LOST else {rank: mine}
    try:
        store.set_timeout(timedelta(seconds=2))
        store.set(_KEY.format(rank), mine)
        silent = [other for other in range(world) if other != rank] if mine == _LOST else []
        deadline = time.monotonic() + _PATIENCE
        while silent and time.monotonic() < deadline:
            for other in [other for other in silent if store.check([_KEY.format(other)])]:
                silent.remove(other)
                reason = store.get(_KEY.format(other)).decode()
                if reason != _LOST:
                    found[other] = reason
            time.sleep(0.1)
    except RuntimeError:  # DistNetworkError and its kin
        return found or ({0: gone} if rank else {})
    return found | dict.fromkeys(silent, gone)
