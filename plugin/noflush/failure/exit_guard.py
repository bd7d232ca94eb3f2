"""A process that is to end does: whatever blocks on the way out, a store, a full pipe or somebody else's handler."""

from __future__ import annotations

import faulthandler
import os
import signal
import threading
from collections.abc import Callable

LIMIT = 10.0
"""Seconds from the end of a broken run to the end of its process."""
_MORE = 2.0


def end_within(seconds: float = LIMIT, status: int = 1) -> Callable[[], None]:
    """Ends this process with ``status`` in at most ``seconds``, unless it has ended by itself before.

    A thread does it. Where the interpreter itself is stuck, or its threads are stopped already, the kernel follows two
    seconds later with SIGALRM (called from the main thread; it replaces a timer that was set). Returns what calls it
    off.
    """
    called_off = threading.Event()
    by_thread = True

    def end() -> None:
        if not called_off.wait(seconds):
            os._exit(status)

    try:
        threading.Thread(target=end, daemon=True, name="noflush: end of the process").start()
    except RuntimeError:
        by_thread = False
        # Python 3.12 starts no thread once the interpreter ends. faulthandler's is none of Python's; its status is 1.
        nowhere = os.open(os.devnull, os.O_WRONLY)  # the last thing that this process opens
        faulthandler.dump_traceback_later(seconds, exit=True, file=nowhere)
    in_main = threading.current_thread() is threading.main_thread()
    if in_main:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.setitimer(signal.ITIMER_REAL, seconds + _MORE)

    def call_off() -> None:
        called_off.set()
        if not by_thread:
            faulthandler.cancel_dump_traceback_later()
        if in_main:
            signal.setitimer(signal.ITIMER_REAL, 0)

    return call_off
