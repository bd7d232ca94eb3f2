"""Log lines whose losses are on their way to the host: said in the iteration after theirs, so that nothing waits."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from noflush.stage.late_reader import LateReader


class LateLines:
    """Lines in the order of their iterations, each said once."""

    def __init__(self) -> None:
        self._losses = LateReader()
        self._lines: deque[Callable[[Tensor], None]] = deque()

    def put(self, iteration: int, losses: Sequence[Tensor], line: Callable[[Tensor], None]) -> None:
        """``line`` will be called with ``losses`` (0-dim, of one device) as a float32 vector on the host."""
        self._losses.put(iteration, 0, torch.stack(list(losses)).float())
        self._lines.append(line)

    def say(self, before: int) -> None:
        """Says the lines of iterations below ``before``; waits for a device that has not computed their losses."""
        for _, losses in self._losses.take(before):
            self._lines.popleft()(torch.tensor(losses, dtype=torch.float32))
