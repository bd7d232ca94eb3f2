"""A watch over the process that keeps torch.distributed's store: what others ask of it has no timeout that holds."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def keeper_watched(connect: Callable[[], Any], seconds: float, keeper: str) -> Iterator[None]:
    """While the block runs, this process ends if the store does not answer for ``seconds``.

    What torch asks of the store while groups are made would wait for a stopped keeper for ever. A time in which this
    process itself was stopped does not count.

    Args:
        connect: makes a client of the store that nobody else uses: a question waits until the one before is answered.
        seconds: the limit.
        keeper: who keeps it, for the message.
    """
    over = threading.Event()
    asked, answered = [0], [0]

    def ask() -> None:
        asked[0] += 1
        try:
            store = connect()
            while True:
                store.check(["noflush"])
                answered[0] = asked[0]
                if over.wait(1.0):
                    return
                asked[0] += 1
        except RuntimeError:  # it is gone: whoever else asks is told too
            over.set()

    def watch() -> None:
        unanswered = 0
        while not over.wait(1.0):
            unanswered = unanswered + 1 if asked[0] > answered[0] else 0
            if unanswered > seconds:
                sys.stderr.write(
                    f"noflush: {keeper} has been silent for {seconds:g} s: the store that it keeps takes questions and "
                    "does not answer; look at its log and node first\n"
                )
                sys.stderr.flush()
                os._exit(1)

    for task in (ask, watch):
        threading.Thread(target=task, daemon=True, name="noflush: the store's keeper").start()
    try:
        yield
    finally:
        over.set()
