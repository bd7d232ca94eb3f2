"""Signals that tell a run to save and end. Listened to from the first second, before the imports that take many."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable
from types import FrameType


class Signals:
    """Remembers the first of ``numbers`` that came; their default action is off from now on.

    Attributes:
        first: its name, or None.
    """

    def __init__(self, numbers: Iterable[int]) -> None:
        self.first: str | None = None
        self._tell: Callable[[], None] | None = None
        for number in numbers:
            signal.signal(number, self._hear)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.first = self.first or signal.Signals(number).name
        if self._tell is not None:
            self._tell()

    def then(self, tell: Callable[[], None]) -> None:
        """Calls ``tell`` at every signal, and at once if one came already."""
        self._tell = tell
        if self.first is not None:
            tell()


def signal_number(name: str) -> signal.Signals | None:
    """``SIGTERM``, ``TERM`` or ``15``; None if there is no such signal."""
    if name.isdigit():
        return next((s for s in signal.Signals if s.value == int(name)), None)
    return getattr(signal.Signals, name if name.startswith("SIG") else f"SIG{name}", None)


def exit_signals(name: str) -> tuple[int, ...]:
    """What ``--exit-signal-handler`` listens to: ``--exit-signal``, and SIGUSR1, SLURM's usual warning.

    Raises ValueError for a signal that does not exist.
    """
    number = signal_number(name)
    if number in (None, signal.SIGKILL, signal.SIGSTOP):
        raise ValueError(f"--exit-signal {name}: no signal that a program can hear; use SIGTERM, SIGUSR1, ...")
    assert number is not None
    return tuple(sorted({int(number), int(signal.SIGUSR1)}))


def listen(words: list[str]) -> Signals:
    """Listens as the arguments say, before they are parsed."""
    if "--exit-signal-handler" not in words:
        return Signals(())
    name = "SIGTERM"
    for at, word in enumerate(words):
        if word.split("=")[0] == "--exit-signal":
            name = word.partition("=")[2] or "".join(words[at + 1 : at + 2])
    try:
        return Signals(exit_signals(name))
    except ValueError:
        return Signals(())  # it is told with the other faults


def leave_to_parent() -> None:
    """For a helper process: whoever started it decides when it ends."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
