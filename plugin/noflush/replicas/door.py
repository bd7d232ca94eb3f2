"""Where a stage is reached by those of other groups, and the connections that come of it.

A connection begins with a question and its answer; after that, where both ends want it, messages of training go by it
in either direction. All that travels are safetensors and JSON, so a peer cannot run code here. The framing is
`multiprocessing.connection`'s, of bytes alone.
"""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from noflush.replicas.transport import State, from_bytes, to_bytes

BEAT_S = 1.0
"""Between two signs of life of a line on which nothing else goes."""
SILENT_S = 8.0
"""After which a line without them is closed: its process stands still, or its host is gone."""
KNOCK_S = 5.0
"""In which a door is to answer."""
_BEAT, _POLL_S = "beat", 0.005
Received = Callable[[str, int, Sequence[Tensor], Sequence[int]], None]


class Refused(RuntimeError):
    """The other end said no; the message is its reason."""


class PeerLine:
    """One connection. What is sent goes in order, by a thread of its own, once the line has begun."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._outgoing: queue.Queue[tuple[dict[str, Any], Sequence[Tensor]] | None] = queue.Queue()
        self._received: Received = lambda kind, number, tensors, words: None
        self._over: Callable[[], None] = lambda: None
        self._closed = threading.Event()
        self._heard = time.monotonic()
        self._used = False

    @property
    def closed(self) -> bool:
        """As `detour.Line`."""
        return self._closed.is_set()

    @property
    def used(self) -> bool:
        """Whether there is to be more than a question and an answer."""
        return self._used

    def use(self, received: Received, over: Callable[[], None] = lambda: None) -> None:
        """Once it begins, what comes is handed to ``received``, and ``over`` is called when it has ended."""
        self._used, self._received, self._over = True, received, over

    def begin(self) -> None:
        """Question and answer are over."""
        self._heard = time.monotonic()
        for task in (self._read, self._write, self._watch):
            threading.Thread(target=task, daemon=True, name="noflush: line").start()

    def send(self, kind: str, number: int, tensors: Sequence[Tensor] = (), words: Sequence[int] = ()) -> None:
        """As `detour.Line`."""
        self._outgoing.put(({"kind": kind, "number": number, "words": list(words)}, tensors))

    def close(self) -> None:
        """As `detour.Line`; what was to be sent goes first, if the other end takes it."""
        self._outgoing.put(None)
        if not self._used:
            self._connection.close()

    def flush(self, seconds: float) -> None:
        """As `detour.Line`."""
        deadline = time.monotonic() + seconds
        while self._outgoing.unfinished_tasks and not self.closed and time.monotonic() < deadline:
            time.sleep(_POLL_S)

    def ask(self, question: dict[str, Any], seconds: float) -> State:
        """Sends a question and waits for its answer. Before `begin`.

        Raises Refused, or OSError where there is none.
        """
        self._connection.send_bytes(to_bytes(({}, question)))
        if not self._connection.poll(seconds):
            raise TimeoutError(f"no answer in {seconds:g} s")
        tensors, plain = from_bytes(self._connection.recv_bytes())
        if "refused" in plain:
            raise Refused(plain["refused"])
        return tensors, plain

    def end(self) -> None:
        """At once."""
        if not self._closed.is_set():
            self._closed.set()
            self._outgoing.put(None)
            self._over()

    def _read(self) -> None:
        try:
            while True:
                tensors, plain = from_bytes(self._connection.recv_bytes())
                self._heard = time.monotonic()
                if plain["kind"] != _BEAT:
                    found = [tensors[str(i)] for i in range(len(tensors))]
                    self._received(plain["kind"], plain["number"], found, plain["words"])
        except (EOFError, OSError, ValueError, KeyError, SafetensorError):
            self.end()

    def _write(self) -> None:
        try:
            while not self._closed.is_set():
                try:
                    item = self._outgoing.get(timeout=BEAT_S)
                except queue.Empty:
                    item = ({"kind": _BEAT, "number": 0, "words": []}, ())
                if item is None:
                    break
                plain, tensors = item
                self._connection.send_bytes(to_bytes((self._apart(tensors), plain)))
                if plain["kind"] != _BEAT:
                    self._outgoing.task_done()
        except OSError:
            pass
        self.end()
        self._shut()

    @staticmethod
    def _apart(tensors: Sequence[Tensor]) -> dict[str, Tensor]:
        """By number; safetensors takes no two of one storage."""
        return {str(i): t.detach().cpu().clone() for i, t in enumerate(tensors)}

    def _watch(self) -> None:
        while not self._closed.wait(BEAT_S):
            if time.monotonic() - self._heard > SILENT_S:
                self.end()
                self._shut()

    def _shut(self) -> None:
        """Has a thread that is reading or writing come back; closing alone would leave it there."""
        try:
            held = socket.socket(fileno=self._connection.fileno())
        except (OSError, ValueError):
            return
        with contextlib.suppress(OSError):
            held.shutdown(socket.SHUT_RDWR)
        held.detach()


def knock(door: str, question: dict[str, Any], seconds: float) -> tuple[PeerLine, State]:
    """Asks at ``door`` (``host:port``); the line, which is still to `begin`, and the answer.

    Raises OSError where nobody answers in ``seconds``, Refused where the answer is no.
    """
    host, _, port = door.rpartition(":")
    open_socket = socket.create_connection((host, int(port)), timeout=seconds)
    open_socket.settimeout(None)
    open_socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection = Connection(open_socket.detach())
    line = PeerLine(connection)
    try:
        return line, line.ask(question, seconds)
    except BaseException:
        connection.close()
        raise


Answer = Callable[[dict[str, Any], PeerLine], State]
"""Given a question and the line it came by, the answer; it may `use` the line, whose messages go after the answer."""


class Door:
    """Where one stage is asked.

    Args:
        bind: the address that it listens at.

    Attributes:
        address: ``host:port``.
        answers: by kind of question.
    """

    def __init__(self, bind: str) -> None:
        self.answers: dict[str, Answer] = {}
        self._server = socket.create_server((bind, 0), backlog=16)
        self.address = f"{bind}:{self._server.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True, name="noflush: door").start()

    def close(self) -> None:
        """Nobody is answered any more; lines stay."""
        with contextlib.suppress(OSError):
            self._server.shutdown(socket.SHUT_RDWR)  # the thread that accepts would hold it open
        self._server.close()

    def _serve(self) -> None:
        while True:
            try:
                came, _ = self._server.accept()
            except OSError:
                return
            came.settimeout(None)
            came.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection = Connection(came.detach())
            threading.Thread(target=self._answer, args=(connection,), daemon=True, name="noflush: asked").start()

    def _answer(self, connection: Connection) -> None:
        line = PeerLine(connection)
        try:
            if not connection.poll(SILENT_S):
                return
            _, question = from_bytes(connection.recv_bytes())
            try:
                if question["kind"] not in self.answers:
                    raise Refused(f"nobody here answers {question['kind']!r}")
                tensors, plain = self.answers[question["kind"]](question, line)
            except (Refused, OSError, ValueError) as error:
                tensors, plain = {}, {"refused": str(error)}
            connection.send_bytes(to_bytes((tensors, plain)))
            if line.used:
                line.begin()
            else:
                connection.close()
        except (EOFError, OSError, ValueError, KeyError, SafetensorError):  # no question
            line.end()
