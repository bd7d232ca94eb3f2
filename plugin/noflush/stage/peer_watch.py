"""A watch over neighbours that waits cannot notice: on an accelerator `wait` holds up a stream, and never raises.

Every pair of neighbours keeps a gloo group on which nothing but a beat travels, both ways, from a thread of its own. A
process that dies closes its connection, one that stands still falls silent. The rank that notices ends, with the stage
named, if it is in the middle of something that needs its neighbours, or as soon as it is: once all is done a neighbour
may have gone because its own is done too. The ranks that share a stage (replicas, slices) are watched in a chain.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from noflush.failure.exit_guard import end_within
from noflush.failure.last_words import PeerError
from noflush.stage.peer import Peer, lost

BEAT = 1.0
"""Seconds between two beats."""
GRACE = 5.0
"""Seconds a rank may still be on duty after a neighbour has gone: what was on its way may yet arrive."""


class PeerWatch:
    """The watch of one rank.

    Args:
        peers: those it needs, each with a gloo group that nothing else uses; a beat that does not come for its
            ``timeout_s`` is silence.
        mark: gives an event of what the device was told to do so far, with a method ``query``: until it is over the
            rank is on duty, wherever its CPU stands. None where the CPU does the work itself.
        ended: what is done with the error once it stands; by default it is printed, and the process ends.
    """

    def __init__(
        self,
        peers: Sequence[Peer],
        mark: Callable[[], Any] | None = None,
        ended: Callable[[PeerError], None] | None = None,
    ) -> None:
        self._peers = peers
        self.mark = mark
        self._ended = ended or _end
        self._since: float | None = None
        self._enqueued: Any = None
        self._depth = 0

    def start(self) -> None:
        """Begins to watch."""
        for peer in self._peers:
            threading.Thread(
                target=self._watch, args=(peer,), daemon=True, name=f"noflush: watch over stage {peer.stage}"
            ).start()

    @contextmanager
    def on_duty(self) -> Iterator[None]:
        """What is done within, by the CPU or later by its device, needs every neighbour."""
        self._depth += 1
        if self._depth == 1:
            self._enqueued, self._since = None, time.monotonic()
        try:
            yield
        finally:
            self._depth -= 1
            if not self._depth:
                if self.mark is not None and self._peers:
                    self._enqueued = self.mark()
                else:
                    self._since = None

    def _on_duty_since(self) -> float | None:
        if not self._depth and self._enqueued is not None and self._enqueued.query():
            self._since = self._enqueued = None
        return self._since

    def _watch(self, peer: Peer) -> None:
        beat, heard = torch.zeros(1), torch.zeros(1)
        patience = timedelta(seconds=peer.timeout_s)
        started = time.monotonic()
        try:
            while True:
                sending = dist.isend(beat, dst=peer.rank, group=peer.group)
                receiving = dist.irecv(heard, src=peer.rank, group=peer.group)
                assert sending is not None
                assert receiving is not None
                started = time.monotonic()
                receiving.wait(patience)
                sending.wait(patience)
                time.sleep(BEAT)
        except (RuntimeError, ValueError) as error:  # ValueError: the groups have been destroyed, all is over
            gone = time.monotonic()
            while (since := self._on_duty_since()) is None or time.monotonic() - max(since, gone) < GRACE:
                time.sleep(0.1)
            if isinstance(error, RuntimeError):
                self._ended(lost(peer, "working with", error, started))


def _end(error: PeerError) -> None:
    end_within()
    sys.stderr.write(f"noflush: {error}\n")
    sys.stderr.flush()
    os._exit(1)
