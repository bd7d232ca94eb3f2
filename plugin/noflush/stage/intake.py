"""How a call gets its micro-batches: all K before the first forward, agreed along the pipeline.

Only the first and last stages read data; the stages between learn from a header that travels down the pipeline
whether the call goes ahead. So an iterator that ends in the middle of a call stops every stage before any has
computed: what was pulled is kept for the next call, and `drain()` still works.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from noflush.failure.last_words import PeerError
from noflush.stage.channels import ControlIn, ControlOut
from noflush.stage.messages import Header, Notices
from noflush.stage.prefetch import Prefetch


class DataExhausted(StopIteration):
    """The data iterator ended before a call had its K micro-batches. Raised on every stage, nothing lost."""


class Intake:
    """One rank's micro-batches, and its part in opening a call.

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
        self.reads = reads
        self._pull = pull
        self._prefetch = prefetch
        self._in = control_in
        self._out = control_out
        self._replicas = replicas
        self._pending: deque[Any] = deque()
        self._skipped: tuple[int, ...] = ()
        self._call = self._message = 0
        self._header = Header(0, False)

    def next(self) -> Any:
        """The next micro-batch of the call under way."""
        return self._prefetch.take(self._pending.popleft())

    def set_gas(self, gas: int) -> None:
        """From the next call on a call has ``gas`` micro-batches."""
        self._gas = gas

    def clear(self) -> None:
        """Forgets micro-batches that were kept after `DataExhausted`."""
        self._pending.clear()

    @property
    def skipped(self) -> tuple[int, ...]:
        """Skipped batches that were told in calls that raised, and that nobody has heard yet."""
        return self._skipped

    def take_skipped(self) -> tuple[int, ...]:
        """`skipped`, which are heard now."""
        heard, self._skipped = self._skipped, ()
        return heard

    def resume(self, skipped: tuple[int, ...]) -> None:
        """``skipped`` of a checkpoint are still to be heard."""
        self._skipped = skipped

    def again(self, batch: Any) -> Any:
        """A micro-batch that `next` gave in the run that wrote a checkpoint, brought to the device anew."""
        return self._prefetch.take(self._prefetch.start(batch))

    def begin(self, call: int, message: int, mine: Notices) -> None:
        """A call is about to be opened: the steps that `control.opening_order` names follow, and then `settle`.

        Args:
            call: the number of the `train_batch` call (for errors).
            message: the number of the activation message it starts with.
            mine: what this stage has to tell.
        """
        self._call, self._message = call, message
        self._header = Header(0, False, mine)

    def receive_header(self, call: int) -> None:
        """Takes the header of the stage before, and adds what this one has to tell."""
        assert self._in is not None
        told, mine = Header.read(self._in.take(self._message)), self._header.notices
        notices = replace(
            told.notices,
            skipped=(*told.notices.skipped, *mine.skipped),
            figures=(*told.notices.figures, *mine.figures),
        )
        self._header = replace(told, notices=notices)

    def send_header(self, call: int) -> None:
        """Hands the header on."""
        assert self._out is not None
        self._out.send(self._header.words(), before=self._message)

    def open(self, call: int) -> None:
        """Pulls K micro-batches (the first stage), or as many as the header says (the last); none if the run stops.

        Raises PeerError if the two disagree.
        """
        notices = self._header.notices
        if self._in is None:
            if notices.stopped_by is None:
                self._fill(self._gas)
            ready, stop = self._agree(len(self._pending), notices.stop_requested)
            self._header = Header(len(self._pending), ready, replace(notices, stop_requested=stop))
        elif self._out is None and notices.stopped_by is None:
            self._fill(self._header.pulled)
            if len(self._pending) != self._header.pulled:
                raise PeerError(
                    f"call {self._call}: the last stage's data iterator ended after {len(self._pending)} micro-batches,"
                    f" the first stage's gave {self._header.pulled}; pass the same data to train_batch() on both"
                )

    def settle(self) -> Notices:
        """What this stage and all before it have to tell, also that of calls that raised.

        Raises DataExhausted on every stage if there are fewer than K micro-batches.
        """
        notices = self._header.notices
        self._skipped += notices.skipped
        if notices.stopped_by is None and not self._header.ready:
            raise DataExhausted(
                f"the data iterator ended in call {self._call} after {self._header.pulled} of {self._gas} "
                "micro-batches (gradient_accumulation_steps). They are kept: call train_batch() with a new iterator to "
                "go on, or drain() to finish what is in flight"
            )
        return notices if notices.stopped_by else replace(notices, skipped=self.take_skipped())

    def _fill(self, count: int) -> None:
        while self.reads and len(self._pending) < count:
            try:
                self._pending.append(self._prefetch.start(self._pull()))
            except StopIteration:
                return

    def _agree(self, pulled: int, stop: bool) -> tuple[bool, bool]:
        """Whether every replica has its micro-batches, and whether one knows of a request to stop."""
        going_on = torch.tensor([int(pulled == self._gas), int(not stop)])
        if self._replicas is not None:
            dist.all_reduce(going_on, op=dist.ReduceOp.MIN, group=self._replicas)
        ready, unasked = going_on.tolist()
        return bool(ready), not unasked
