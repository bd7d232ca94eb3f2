"""A neighbour of a stage, and what stands for it once it has died: lines to whoever does its work.

A *line* is a connection made elsewhere (`replicas.door`). A message has a number, and each goes by the newest line that
begins at or before that number: so those before a stage's return end at its stand-in, and those from then on go to the
stage itself.
"""

from __future__ import annotations

import sys
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from torch import Tensor

from noflush.failure.last_words import PeerError
from noflush.stage.peer import Peer, PeerGone

T = TypeVar("T")
ACTIVATION, GRADIENT, CONTROL = "activation", "gradient", "control"
_LOOKS_EVERY = 0.5
_ASKS_EVERY = 2.0
_TRIES_S = 15.0
"""Seconds in which those who failed are asked again, before there is nobody."""


class Line(Protocol):
    """A connection to one that stands in for a stage, or to a stage that has come back."""

    @property
    def closed(self) -> bool:
        """Whether nothing can come by it any more, but for what has arrived."""

    def send(self, kind: str, number: int, tensors: Sequence[Tensor] = (), words: Sequence[int] = ()) -> None:
        """Starts sending; the tensors must not be written until the message has been taken. Never raises."""

    def flush(self, seconds: float) -> None:
        """Waits until what was sent is on its way, for so long at most."""

    def close(self) -> None:
        """Ends it, once what was sent is on its way."""


class NoStandIn(RuntimeError):
    """Nobody can stand in; the message says why."""


Message = tuple[Sequence[Tensor], Sequence[int]]


class SendsByLines(Protocol):
    """A channel that can send again."""

    def send_kept(self, first: int, end: int, line: Line) -> None:
        """Sends all kept messages of numbers [first, end) by ``line``."""


class Link(ABC):
    """One neighbour of a stage, and what stands for it.

    Args:
        peer: the neighbour.
        direct: whether it can be reached directly, to begin with.

    Attributes:
        lock: held where lines or what was sent change: doors have threads of their own.
        gone: why there is no direct connection; None: there is one.
        keepers: the channels that send, in the order in which they send again.
    """

    def __init__(self, peer: Peer, direct: bool) -> None:
        self.peer, self.gone = peer, None if direct else _came_back(peer)
        self.lock = threading.RLock()
        self.keepers: list[SendsByLines] = []
        self._changed = threading.Condition(self.lock)
        self._lines: list[tuple[int, Line]] = []  # each with the number from which on it carries
        self._arrived: dict[tuple[str, int], Message] = {}
        self._wanted = {ACTIVATION: 0, GRADIENT: 0, CONTROL: 0}

    @property
    def direct(self) -> bool:
        """Whether messages go without a detour."""
        return self.gone is None and not self._lines

    def directly(self, action: Callable[[], T]) -> T | None:
        """What ``action`` returns, which needs the direct connection; None where there is none, or none any more."""
        if not self.direct:
            return None
        try:
            return action()
        except PeerGone as gone:
            self.gone = self.gone or gone
            return None

    def take_directly(self, kind: str, number: int, take: Callable[[], T]) -> T | None:
        """Message ``number``, as ``take`` gives it; None where it is to come by a line."""
        found = self.directly(take)
        with self.lock:
            # Whoever stands in by now was told that this one is still wanted, and has sent it.
            if found is None or not self.direct:
                return None
            self.took(kind, number)
            return found

    def wanted(self, kind: str) -> int:
        """Number of the next message of ``kind`` that has not been taken."""
        return self._wanted[kind]

    def expect(self, number: int) -> None:
        """The next messages to be taken have ``number``."""
        self._wanted = dict.fromkeys(self._wanted, number)

    def took(self, kind: str, number: int) -> None:
        """Message ``number`` has been taken."""
        with self.lock:
            self._wanted[kind] = number + 1
            for old in [key for key in self._arrived if key[0] == kind and key[1] <= number]:
                del self._arrived[old]

    def bring(self, kind: str, number: int, tensors: Sequence[Tensor], words: Sequence[int]) -> None:
        """A message has arrived by some line; one that was taken already is dropped."""
        with self.lock:
            if number >= self._wanted[kind]:
                self._arrived.setdefault((kind, number), (tensors, words))
            self._changed.notify_all()

    def look(self) -> None:
        """A line was closed."""
        with self.lock:
            self._changed.notify_all()

    def line_for(self, number: int) -> Line | None:
        """By which message ``number`` goes."""
        return next((line for first, line in reversed(self._lines) if first <= number), None)

    def add_line(self, first: int, line: Line) -> None:
        """Messages from ``first`` on go by ``line``, up to where a later line that is there begins.

        What was sent of them, and may not have arrived, goes again.
        """
        with self.lock:
            later = [(begin, old) for begin, old in self._lines if begin > first and not old.closed]
            earlier = [(begin, old) for begin, old in self._lines if begin < first and not old.closed]
            kept = {id(old) for _, old in (*earlier, *later)}
            superseded = [old for _, old in self._lines if id(old) not in kept]
            self._lines = [*earlier, (first, line), *later]
            end = later[0][0] if later else sys.maxsize
            for keeper in self.keepers:
                keeper.send_kept(first, end, line)
            self._changed.notify_all()
        for old in superseded:
            old.close()

    def flush(self) -> None:
        """Waits until what was sent is on its way: this process may be about to end."""
        for _, line in list(self._lines):
            line.flush(self.peer.timeout_s)

    def close(self) -> None:
        """Ends all lines."""
        with self.lock:
            lines, self._lines = self._lines, []
        for _, line in lines:
            line.close()

    def wait(self, kind: str, number: int, seconds: float, over: Callable[[], bool]) -> Message | None:
        """Message ``number``; None if it has not come in ``seconds``, or cannot come, as ``over`` says."""
        attention = self.peer.attention
        attention.waiting = f"waiting for {kind} {number}, round stage {self.peer.stage}", time.monotonic()
        try:
            found: Message | None = attention.wait(lambda: self._wait(kind, number, seconds, over))
        finally:
            attention.waiting = None
        return found

    def _wait(self, kind: str, number: int, seconds: float, over: Callable[[], bool]) -> Message | None:
        deadline = time.monotonic() + seconds
        with self.lock:
            while (kind, number) not in self._arrived:
                left = deadline - time.monotonic()
                if left <= 0 or over():
                    return None
                self._changed.wait(min(left, _LOOKS_EVERY))
            return self._arrived.pop((kind, number))

    def take(self, kind: str, number: int) -> Message:
        """Message ``number`` by a line. Raises PeerError, in bounded time."""
        message = self._await(kind, number)
        self.took(kind, number)
        return message

    @abstractmethod
    def _await(self, kind: str, number: int) -> Message:
        """`take`, but for the counting."""

    def given_up(self, why: str) -> PeerError:
        """The error where nobody stands in."""
        assert self.gone is not None
        error = self.gone.judged()
        return PeerError(f"{error} (no detour: {why})")


class LinkBelow(Link):
    """To the next stage. If that dies, this stage finds who stands in.

    Attributes:
        find: ``find(first, refused)`` gives a line to somebody who stands in from message ``first`` on, and his name;
            ``refused`` are names of those who have failed. Raises NoStandIn.
    """

    def __init__(self, peer: Peer, direct: bool) -> None:
        super().__init__(peer, direct)
        self.find: Callable[[int, set[str]], tuple[str, Line]] = _nobody
        self._names: dict[int, str] = {}  # of lines, by their identity
        self._refused: set[str] = set()

    def _await(self, kind: str, number: int) -> Message:
        while True:
            line = self.line_for(number)
            if line is not None:
                found = self.wait(kind, number, self.peer.timeout_s, lambda line=line: line.closed)  # type: ignore[misc]
                if found is not None:
                    self._refused.clear()
                    self._retire(number)
                    return found
                self._refused.add(self._names.pop(id(line), ""))
            self._go_round(line)

    def _go_round(self, failed: Line | None) -> None:
        """Finds somebody for all messages whose gradients have not come, and that go by no line that is there."""
        with self.lock:
            self._lines = [(begin, line) for begin, line in self._lines if line is not failed and not line.closed]
        if failed is not None:
            failed.close()
        first, deadline = self.wanted(GRADIENT), time.monotonic() + _TRIES_S
        while True:
            try:
                name, line = self.find(first, self._refused)
                break
            except NoStandIn as why:
                if not self._refused or time.monotonic() > deadline:
                    raise self.given_up(str(why)) from why
                self._refused.clear()  # who has failed may be there again
                time.sleep(1.0)
        self._names[id(line)] = name
        self.add_line(first, line)

    def _retire(self, number: int) -> None:
        """Ends lines whose last message has come."""
        with self.lock:
            done = [
                old for (_, old), (first, _) in zip(self._lines, self._lines[1:], strict=False) if first <= number + 1
            ]
            self._lines = self._lines[len(done) :]
        for line in done:
            line.close()


class LinkAbove(Link):
    """To the stage before. If that dies, somebody who stands in makes himself known (`accept`).

    Attributes:
        is_found: whether the stage above that, which finds somebody, is there to do so.
    """

    def __init__(self, peer: Peer, direct: bool) -> None:
        super().__init__(peer, direct)
        self.is_found: Callable[[], bool] = lambda: True

    def accept(self, first: int, line: Line) -> int:
        """``line`` stands in from message ``first`` on; returns the number of the activation that is wanted next."""
        with self.lock:
            self.add_line(first, line)
            return self.wanted(ACTIVATION)

    def _await(self, kind: str, number: int) -> Message:
        """Waits for what the stage above the lost one needs to notice and to find somebody."""
        patience = 2 * self.peer.timeout_s
        deadline = time.monotonic() + patience
        while (left := deadline - time.monotonic()) > 0:
            line = self.line_for(number)
            here = self.wait(kind, number, min(left, _ASKS_EVERY), lambda line=line: self.line_for(number) is not line)  # type: ignore[misc]
            if here is not None:
                return here
            if (line is None or line.closed) and not self.is_found():
                raise self.given_up(f"stage {self.peer.stage - 1}, which is to find somebody, has gone too")
        raise self.given_up(f"nobody has sent {kind} {number} in {patience:g} s")


def _came_back(peer: Peer) -> PeerGone:
    why = f"stage {peer.own_stage}, which came back without its world, has lost its connection to stage {peer.stage}"
    return PeerGone(why, lambda: PeerError(why))


def _nobody(first: int, refused: set[str]) -> tuple[str, Line]:
    raise NoStandIn("there are no other groups yet")
