"""What a stage is given to do, and what a user may choose."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from noflush.methods.flat import Outcome
from noflush.order.posting import Posting
from noflush.order.wire_format import AS_IN_MODEL, Wire
from noflush.stage.messages import Payload


class Work(Protocol):
    """What is computed at a stage. ``buffer`` numbers a place for one micro-batch in flight."""

    def pull(self) -> Any:
        """The next micro-batch of this rank's data: (inputs, labels). Raises StopIteration at its end."""

    def forward(self, buffer: int, received: Payload | None, batch: Any) -> Payload:
        """Runs forward on what the stage before sent (None at the first stage); returns the outputs.

        ``batch``: the micro-batch, at the first and last stages; else None.
        """

    def backward(self, buffer: int, gradients: list[Tensor] | None) -> None:
        """Backpropagates ``gradients`` of the differentiable outputs (None at the last stage: its loss)."""

    def input_gradients(self, buffer: int) -> list[Tensor]:
        """Gradients of the differentiable tensors received; frees the buffer."""

    def batch_losses(self) -> Tensor:
        """At the last stage, after a batch: its losses, summed over micro-batches and divided by K, the mean over
        replicas: float64 [n]."""

    def take_losses(self) -> Any:
        """At the last stage: what of `batch_losses` is there so far; from now on there is nothing."""

    def put_losses(self, losses: Any) -> None:
        """Puts back what `take_losses` gave; None: nothing."""

    def random_state(self) -> Any:
        """What layers draw their random numbers from now: tensors and plain values."""

    def set_random_state(self, state: Any) -> None:
        """Puts back what `random_state` gave."""

    def replaying(self) -> AbstractContextManager[None]:
        """Within, forwards are those of a run that goes on from a checkpoint: they train, and nothing else is moved."""

    def updated(self, outcome: Outcome) -> None:
        """An update was made."""

    def heard(self, step: int, report: Tensor) -> None:
        """The losses of call ``step`` (from 1) are known here: ``report`` [n and more]."""

    def reserve(self, buffers: int) -> None:
        """From now on so many micro-batches may be in flight here at once."""

    def say(self, line: str) -> None:
        """Tells the user ``line``; every rank is given it."""

    def save_stopped(self, folder: str, tag: str) -> None:
        """Saves a checkpoint of a run that is about to end."""


@dataclass(frozen=True)
class StageOptions:
    """What a user may choose, as the block's fields of these names say it.

    ``losses``: how many a batch has; ``one_norm``: whether all stages share one gradient norm, which needs a flush;
    ``late_norm``: whether updates are clipped by the newest norm of all stages that is known without waiting
    (`clipping.known_batch`); ``posting``: when receives are posted (None: as the backend wants it); ``auto_depth``:
    whether the depth is measured and chosen; ``reroute``: whether messages go round a neighbour that dies.
    """

    trace_dir: str | None = None
    peer_timeout_s: float = 1800.0
    max_skipped_updates: int = 100
    stop_dir: str | None = None
    losses: int = 1
    one_norm: bool = False
    late_norm: bool = False
    posting: Posting | None = None
    wire: Wire = AS_IN_MODEL
    auto_depth: bool = False
    reroute: bool = False


DEFAULTS = StageOptions()
