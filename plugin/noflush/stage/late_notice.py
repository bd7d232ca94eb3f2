"""A line for people, long before a wait times out: what a stage waits for, from whom, and since when.

On gloo, and for the small messages everywhere, a wait holds up the CPU; a thread looks at it from the side. What an
accelerator's stream waits for nobody can see (`peer_watch` notices there who is gone).
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable

from noflush.stage.peer import Attention

FIRST_S = 60.0
"""Seconds after which a wait is told of; then after twice as many, and so on."""
SHARE = 0.1
"""Or after this share of the time after which it is given up, if that is sooner."""


class LateNotice:
    """Tells of waits that take long.

    Args:
        attention: of this rank, which knows what it waits for.
        own: who this is, for people.
        timeout_s: when a wait is given up.
        say: takes a line; by default it goes to stderr.
    """

    def __init__(
        self, attention: Attention, own: str, timeout_s: float, say: Callable[[str], None] | None = None
    ) -> None:
        self._attention = attention
        self._own = own
        self._timeout_s = timeout_s
        self._first = min(FIRST_S, SHARE * timeout_s)
        self._say = say or _to_stderr
        self._told: tuple[float, float] = (0.0, 0.0)  # a wait by its beginning, and when it is told of next

    def start(self) -> None:
        """Begins to look, until the process ends."""
        threading.Thread(target=self._watch, daemon=True, name="noflush: long waits").start()

    def _watch(self) -> None:
        while True:
            time.sleep(self._first / 4)
            self.look()

    def look(self) -> None:
        """Tells of the wait that is going on, if it is time."""
        waiting = self._attention.waiting
        if waiting is None:
            return
        what, since = waiting
        if self._told[0] != since:
            self._told = (since, self._first)
        seconds = time.monotonic() - since
        if seconds >= self._told[1]:
            self._told = (since, 2 * self._told[1])
            self._say(
                f"noflush: {self._own} is {what} for {seconds:.0f} s now; it gives up after {self._timeout_s:g} s"
            )


def _to_stderr(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()
