"""Waiting elsewhere: what a stage waits for is awaited by a thread, so that its own may do something useful until then.

Where stages serve each other's pipelines (`replicas.guests`) they must go on to while they wait for their own messages,
which may depend on just that work.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any


class _Outcome:
    over = False
    value: Any = None
    error: BaseException | None = None


class Meanwhile:
    """One thread that waits.

    Args:
        work_until: called by the waiting stage with a function that says whether the wait is over; works until it is.
        wake: has ``work_until`` ask again.
    """

    def __init__(self, work_until: Callable[[Callable[[], bool]], None], wake: Callable[[], None]) -> None:
        self._work_until, self._wake = work_until, wake
        self._waits: queue.SimpleQueue[tuple[Callable[[], Any], _Outcome]] = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True, name="noflush: waits").start()

    def wait(self, blocking: Callable[[], Any]) -> Any:
        """What ``blocking()`` returns, or raises."""
        outcome = _Outcome()
        self._waits.put((blocking, outcome))
        self._work_until(lambda: outcome.over)
        if outcome.error is not None:
            raise outcome.error
        return outcome.value

    def _run(self) -> None:
        while True:
            blocking, outcome = self._waits.get()
            try:
                outcome.value = blocking()
            except BaseException as error:  # for whoever waits
                outcome.error = error
            outcome.over = True
            self._wake()
