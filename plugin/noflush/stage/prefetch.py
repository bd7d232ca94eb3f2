"""A call's micro-batches on their way to the device, all of them as the call opens, beside what it computes.

A blocking copy in the middle of a call would hold up the CPU, and with it all that it has not enqueued yet.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class Prefetch:
    """Copies what a stage reads of (inputs, labels) to its device, on a stream of its own; on a CPU hands batches on.

    Args:
        device: the stage's.
        inputs, labels: whether it reads them.
    """

    def __init__(self, device: torch.device, inputs: bool = True, labels: bool = True) -> None:
        self._device = device
        self._reads = inputs, labels
        on_gpu = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if on_gpu else None  # type: ignore[no-untyped-call]

    def start(self, batch: Any) -> tuple[Any, Any]:
        """Starts the copy; returns what `take` takes."""
        if self._stream is None:
            return batch, None
        with torch.cuda.stream(self._stream):
            moved = self._read_part(batch)
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record(self._stream)
        return moved, arrived

    def take(self, started: tuple[Any, Any]) -> Any:
        """The batch; what is enqueued from now on comes after its copy. Waits for nothing itself."""
        batch, arrived = started
        if arrived is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(arrived)
            self._reads_on(stream, batch)
        return batch

    def _read_part(self, batch: Any) -> Any:
        if not isinstance(batch, (tuple, list)):  # refused when it is taken
            return batch
        reads = (*self._reads, *[False] * len(batch))
        return tuple(self.moved(part) if read else part for part, read in zip(batch, reads, strict=False))

    def moved(self, value: Any) -> Any:
        """``value`` with every tensor in it on the device, or on its way there."""
        if isinstance(value, Tensor):
            if value.device == self._device:
                return value
            if self._stream is not None and value.device.type == "cpu":
                # Only a copy from pinned memory does not hold up the CPU. Its own: who pulls may fill his buffer anew.
                value = torch.empty_like(value, pin_memory=True).copy_(value)
            return value.to(self._device, non_blocking=True)
        return _map(self.moved, value)

    def _reads_on(self, stream: Any, value: Any) -> Any:
        if isinstance(value, Tensor):
            if value.device.type == "cuda":
                value.record_stream(stream)  # allocated for one stream, read on another
            return value
        return _map(lambda part: self._reads_on(stream, part), value)


def copied(value: Any) -> Any:
    """``value`` with copies, where they are, of all tensors in it: whoever made it may fill it anew."""
    return value.clone() if isinstance(value, Tensor) else _map(copied, value)


def _map(function: Any, value: Any) -> Any:
    """``value`` with ``function`` applied to what is inside it; what is no container stays."""
    if isinstance(value, dict):
        return {key: function(item) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(function, value))
    if isinstance(value, (tuple, list)):
        return type(value)(map(function, value))
    return value
