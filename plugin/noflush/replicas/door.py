"""Where a stage is reached by those of other groups, and the connections that come of it.

A connection begins with a question and its answer; after that, where both ends want it, messages of training go by it
in either direction. A message is its length, and safetensors with JSON: a peer cannot run code here.
"""

from __future__ import annotations

import contextlib
import queue
import socket
import struct
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from safetensors import SafetensorError
from torch import Tensor

from noflush.replicas.transport import State, from_bytes, to_bytes

BEAT_S = 1.0
"""Between two signs of life of a line on which nothing else goes."""
SILENT_S = 20.0
"""In which a line on which nothing at all arrives is closed: its process stands still, or its host is gone."""
KNOCK_S = 5.0
"""In which a door is to answer."""
_BEAT, _POLL_S, _PART, _MOST = "beat", 0.005, 1 << 20, 1 << 40
Received = Callable[[str, int, Sequence[Tensor], Sequence[int]], None]


class Refused(RuntimeError):
    """The other end said no; the message is its reason."""


class PeerLine:
    """One connection. What is sent goes in order, by a thread of its own, once the line has begun."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._outgoing: queue.Queue[tuple[dict[str, Any], Sequence[Tensor]] | None] = queue.Queue()
        self._received: Received = lambda kind, number, tensors, words: None
        self._over: Callable[[], None] = lambda: None
        self._closed = threading.Event()
        self._heard = time.monotonic()
        self._used = False

    @property
    def closed(self) -> bool:
        """As `link.Line`."""
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
        """As `link.Line`."""
        self._outgoing.put(({"kind": kind, "number": number, "words": list(words)}, tensors))

    def close(self) -> None:
        """As `link.Line`; what was to be sent goes first, if the other end takes it."""
        self._outgoing.put(None)
        if not self._used:
            self._connection.close()

    def flush(self, seconds: float) -> None:
        """As `link.Line`."""
        deadline = time.monotonic() + seconds
        while self._outgoing.unfinished_tasks and not self.closed and time.monotonic() < deadline:
            time.sleep(_POLL_S)

    def ask(self, question: dict[str, Any], seconds: float) -> State:
        """Sends a question and waits for its answer. Before `begin`.

        Raises Refused, or OSError where there is none.
        """
        self._connection.settimeout(seconds)
        try:
            self.put(({}, question))
            tensors, plain = self.get()
        except (SafetensorError, ValueError, KeyError) as error:
            raise OSError(f"an answer that is none: {error}") from error
        self._connection.settimeout(None)
        if "refused" in plain:
            raise Refused(plain["refused"])
        return tensors, plain

    def put(self, state: State) -> None:
        """Sends it. Raises OSError."""
        data = to_bytes(state)
        self._connection.sendall(struct.pack("<Q", len(data)))
        self._connection.sendall(data)

    def get(self) -> State:
        """What comes next. Raises OSError; ValueError or safetensors' error for what is no message."""
        (length,) = struct.unpack("<Q", self._read_bytes(8))
        if length > _MOST:
            raise ValueError(f"a message of {length} bytes")
        return from_bytes(self._read_bytes(length))

    def _read_bytes(self, length: int) -> bytes:
        found = bytearray()
        while len(found) < length:
            part = self._connection.recv(min(length - len(found), _PART))
            if not part:
                raise ConnectionError("the other end has closed the connection")
            self._heard = time.monotonic()  # on a slow link one message may take long
            found += part
        return bytes(found)

    def end(self) -> None:
        """At once."""
        if not self._closed.is_set():
            self._closed.set()
            self._outgoing.put(None)
            self._over()

    def _read(self) -> None:
        try:
            while True:
                tensors, plain = self.get()
                if plain["kind"] != _BEAT:
                    found = [tensors[str(i)] for i in range(len(tensors))]
                    self._received(plain["kind"], plain["number"], found, plain["words"])
        except (OSError, ValueError, KeyError, SafetensorError):
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
                self.put((self._apart(tensors), plain))
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
        with contextlib.suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)


def knock(door: str, question: dict[str, Any], seconds: float) -> tuple[PeerLine, State]:
    """Asks at ``door`` (``host:port``); the line, which is still to `begin`, and the answer.

    Raises OSError where nobody answers in ``seconds``, Refused where the answer is no.
    """
    host, _, port = door.rpartition(":")
    connection = socket.create_connection((host, int(port)), timeout=seconds)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
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
            came.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            threading.Thread(target=self._answer, args=(came,), daemon=True, name="noflush: asked").start()

    def _answer(self, connection: socket.socket) -> None:
        line = PeerLine(connection)
        connection.settimeout(SILENT_S)
        try:
            _, question = line.get()
            try:
                if question["kind"] not in self.answers:
                    raise Refused(f"nobody here answers {question['kind']!r}")
                tensors, plain = self.answers[question["kind"]](question, line)
            except Exception as error:  # whatever it is, who asks shall not wait for it
                tensors, plain = {}, {"refused": str(error) or type(error).__name__}
            line.put((tensors, plain))
            connection.settimeout(None)
            if line.used and "refused" not in plain:
                line.begin()
            else:
                connection.close()
        except (OSError, ValueError, KeyError, SafetensorError):  # no question
            line.end()
            connection.close()
