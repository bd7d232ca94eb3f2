"""How a call gets its micro-batches: all K before the first forward, agreed along the pipeline.

Only the first and last stages read data; the stages between learn from a header that travels down the pipeline
whether the call goes ahead. So an iterator that ends in the middle of a call stops every stage before any has
computed: what was pulled is kept for the next call, and `drain()` still works.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist

from noflush.failure.last_words import PeerError
from noflush.stage.channels import ControlIn, ControlOut
from noflush.stage.figures import StageFigures, read_figures
from noflush.stage.prefetch import Prefetch


class DataExhausted(StopIteration):
    """The data iterator ended before a call had its K micro-batches. Raised on every stage, nothing lost."""


@dataclass(frozen=True)
class Notices:
    """What travels down the pipeline with a call's header besides the header itself.

    Attributes:
        overflows: batches that some stage so far skipped for gradients that are not finite, newly learnt.
        stopped_by: the stage for whose sake the first one ends the run, and its updates skipped in a row; or None.
        stop_requested: whether a rank of the first stage knows that somebody asked for a stop.
        figures: of the stages so far, in order.
    """

    overflows: tuple[int, ...] = ()
    stopped_by: tuple[int, int] | None = None
    stop_requested: bool = False
    figures: tuple[StageFigures, ...] = ()

    def words(self) -> list[int]:
        """Whole numbers that a header can carry."""
        stage, skipped = self.stopped_by or (0, 0)
        figures = [word for of_stage in self.figures for word in of_stage.words()]
        return [stage, skipped, int(self.stop_requested), len(figures), *figures, *self.overflows]

    @classmethod
    def read(cls, words: Sequence[int]) -> Notices:
        """The notices that `words` stand for."""
        stage, skipped, stop, count, *rest = words
        stopped_by = (stage, skipped) if skipped else None
        return cls(tuple(rest[count:]), stopped_by, bool(stop), read_figures(rest[:count]))


_NONE = Notices()


class Intake:
    """One rank's micro-batches.

    Args:
        gas: K, micro-batches a call.
        reads: whether this stage reads data (the first and the last do).
        pull: the next micro-batch of this rank's iterator; raises StopIteration at its end.
        prefetch: brings micro-batches to the device while the call runs.
        control_in, control_out: links to the stages before and after.
        replicas: gloo group of the first stage's data-parallel replicas, which must stop together; or None.
    """

    def __init__(
        self,
        gas: int,
        reads: bool,
        pull: Callable[[], Any],
        prefetch: Prefetch,
        control_in: ControlIn | None,
        control_out: ControlOut | None,
        replicas: dist.ProcessGroup | None,
    ) -> None:
        self._gas = gas
        self._reads = reads
        self._pull = pull
        self._prefetch = prefetch
        self._in = control_in
        self._out = control_out
        self._replicas = replicas
        self._pending: deque[Any] = deque()
        self._overflows: tuple[int, ...] = ()

    def next(self) -> Any:
        """The next micro-batch of the call under way."""
        return self._prefetch.take(self._pending.popleft())

    def set_gas(self, gas: int) -> None:
        """From the next call on a call has ``gas`` micro-batches."""
        self._gas = gas

    def clear(self) -> None:
        """Forgets micro-batches that were kept after `DataExhausted`."""
        self._pending.clear()

    def take_overflows(self) -> tuple[int, ...]:
        """Overflows that were told in calls that raised, and that nobody has heard yet."""
        heard, self._overflows = self._overflows, ()
        return heard

    def open_call(self, call: int, message: int, mine: Notices = _NONE) -> Notices:
        """Pulls K micro-batches and agrees on it with the other stages.

        ``call`` is the number of the `train_batch` call (for errors), ``message`` the activation it starts with.
        Returns the notices of this stage and all before it, those of calls that raised included. Where they stop the
        run, nothing was pulled.
        Raises DataExhausted on every stage if there are fewer, PeerError if first and last stage disagree.
        """
        notices = mine
        if self._in is None:
            if mine.stopped_by is None:
                self._fill(self._gas)
            pulled = len(self._pending)
            ready, stop = self._agree(pulled, mine.stop_requested)
            notices = replace(mine, stop_requested=stop)
        else:
            pulled, ready, *words = self._in.take()
            told = Notices.read(words)
            notices = replace(
                told, overflows=(*told.overflows, *mine.overflows), figures=(*told.figures, *mine.figures)
            )
        if self._out is not None:
            self._out.send([pulled, ready, *notices.words()], before=message)
        self._overflows += notices.overflows
        if notices.stopped_by:
            return notices
        if self._out is None and self._in is not None:
            self._fill(pulled)
            if len(self._pending) != pulled:
                raise PeerError(
                    f"call {call}: the last stage's data iterator ended after {len(self._pending)} micro-batches, "
                    f"the first stage's gave {pulled}; pass the same data to train_batch() on both"
                )
        if not ready:
            raise DataExhausted(
                f"the data iterator ended in call {call} after {pulled} of {self._gas} micro-batches "
                "(gradient_accumulation_steps). They are kept: call train_batch() with a new iterator to go on, or "
                "drain() to finish what is in flight"
            )
        return replace(notices, overflows=self.take_overflows())

    def _fill(self, count: int) -> None:
        while self._reads and len(self._pending) < count:
            try:
                self._pending.append(self._prefetch.start(self._pull()))
            except StopIteration:
                return

    def _agree(self, pulled: int, stop: bool) -> tuple[int, bool]:
        """Whether every replica has its micro-batches, and whether one knows of a request to stop."""
        going_on = torch.tensor([int(pulled == self._gas), int(not stop)])
        if self._replicas is not None:
            dist.all_reduce(going_on, op=dist.ReduceOp.MIN, group=self._replicas)
        ready, unasked = going_on.tolist()
        return ready, not unasked
