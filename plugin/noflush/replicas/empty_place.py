"""The place of a lost stage in the rounds of its group, kept by the stage before it.

torchft's replica is a whole group: without one of its stages none of the others would take part in a round. So while a
stage is lost somebody says in its name that there is nothing to average, which counts for nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from noflush.replicas.rounds import RunsRounds

_AGAIN_S = 1.0


class EmptyPlace:
    """Of one lost stage.

    Args:
        make_rounds: of the lost stage.
        words: what it would tell, of no samples.
    """

    def __init__(self, make_rounds: Callable[[], RunsRounds], words: Callable[[], dict[str, Any]]) -> None:
        self._make, self._words = make_rounds, words
        self._rounds: RunsRounds | None = None
        self._under_way = False
        self._over = threading.Event()
        # It meets the group's manager, for which training does not wait.
        threading.Thread(target=self._open, daemon=True, name="noflush: a lost stage's place").start()

    def _open(self) -> None:
        while not self._over.is_set():
            try:
                rounds = self._make()
            except Exception:  # whatever it is: it may be away for a moment
                self._over.wait(_AGAIN_S)
                continue
            rounds.settle(living=True, resumed=True)
            self._rounds = rounds
            break
        self._over.wait()
        if self._rounds is not None:
            self._rounds.close()

    @property
    def idle(self) -> bool:
        """Whether no round is under way, so that the stage itself may take its place again."""
        if self._rounds is not None and self._under_way and self._rounds.poll() is not None:
            self._under_way = False
        return not self._under_way

    def start(self) -> None:
        """Takes part in the round that the group's other stages begin, unless one is under way still."""
        if self._rounds is not None and self.idle:
            self._rounds.start(0, self._words(), None)
            self._under_way = True

    def close(self) -> None:
        """Gives the place up; idle."""
        self._over.set()
