"""The far end of a channel, waiting for it, and whose fault it is when the wait fails."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any

import torch.distributed as dist

from noflush.failure import last_words
from noflush.failure.blame import Words
from noflush.failure.last_words import PeerError


class PeerGone(PeerError):
    """A neighbour whose connection is closed, and for which another may stand in.

    Attributes:
        judged: gives the error for people if nobody does; says so to the others first.
    """

    def __init__(self, what: str, judged: Callable[[], PeerError]) -> None:
        super().__init__(what)
        self.judged = judged


class Attention:
    """How long this rank has not listened to its neighbours, which wait ``timeout_s`` for it.

    ``waiting``: what it is waiting for, and since when (`time.monotonic`); None if for nothing. ``wait``: carries out a
    wait, given as a function that blocks (`meanwhile.Meanwhile.wait` does something else until then).
    """

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._last = time.monotonic()
        self._away = self._back = -math.inf
        self.waiting: tuple[str, float] | None = None
        self.wait: Callable[[Callable[[], Any]], Any] = lambda blocking: blocking()

    def turn(self) -> float:
        """A wait begins; returns the time."""
        now = time.monotonic()
        if now - self._last > self._timeout_s:
            self._away, self._back = now - self._last, now
        return now

    def met(self) -> None:
        """A wait has ended well."""
        self._last = time.monotonic()

    def absence(self) -> float:
        """Seconds of the newest absence that was too long, if it was just now; else 0.

        What had arrived before neighbours gave up can still be read after it, so "just now" is no single wait.
        """
        return self._away if time.monotonic() - self._back < self._timeout_s else 0.0


@dataclass(frozen=True)
class Peer:
    """The far end of a channel: its stage and global rank, and those at this end (for errors).

    ``replaceable``: whether another may stand in for it if it dies.
    """

    group: dist.ProcessGroup
    rank: int
    stage: int
    own_rank: int
    own_stage: int
    timeout_s: float
    attention: Attention
    replaceable: bool = False


def wait_for(work: dist.Work, peer: Peer, what: str) -> None:
    """Waits until ``work`` is done; on an accelerator has the stream wait. Raises PeerError, which names ``what``."""
    start = peer.attention.turn()
    peer.attention.waiting = f"{what} stage {peer.stage} (rank {peer.rank})", start
    try:
        if dist.get_backend(peer.group) == "gloo":
            peer.attention.wait(partial(work.wait, timedelta(seconds=peer.timeout_s)))
        else:
            work.wait()  # orders the device's stream; NCCL's own watchdog holds the group's timeout
    except RuntimeError as error:
        raise lost(peer, what, error, start) from error
    finally:
        peer.attention.waiting = None
    peer.attention.met()


def lost(peer: Peer, what: str, error: RuntimeError, start: float) -> PeerError:
    """The error of a connection that failed: says so to the others first, and says whose fault it is.

    Of a peer that can be replaced and whose connection is closed: a `PeerGone`, and nobody hears of it yet.
    """
    judged = partial(_judged, peer, what, error, start)
    if peer.replaceable and not last_words.ran_out(error):
        return PeerGone(f"{what} stage {peer.stage} (rank {peer.rank}): {first_line(error)}", judged)
    return judged()


def _judged(peer: Peer, what: str, error: RuntimeError, start: float) -> PeerError:
    silent, absent = last_words.ran_out(error), peer.attention.absence()
    waited = time.monotonic() - start
    own = Words(
        peer.own_rank,
        lost=peer.rank,
        how="silent" if silent else "closed",
        seconds=waited if silent else absent,
        absent=absent > 0,
    )
    verdict = last_words.leave(own)
    saw = f"It sent nothing for {peer.timeout_s:g} s (async_pipeline.peer_timeout_s). " if silent else ""
    where = "" if verdict.accused is None else "there and "
    return PeerError(
        f"stage {peer.own_stage} gave up {what} stage {peer.stage} (rank {peer.rank}): {first_line(error)}. {saw}"
        f"{verdict.sentence[0].upper()}{verdict.sentence[1:]}. Look {where}in its log first, then resume from the "
        "newest checkpoint"
    )


def first_line(error: Exception) -> str:
    """What an error says, or what it is."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
