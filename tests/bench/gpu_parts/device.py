"""What only a GPU can tell of code: where it waits, what it allocates. On a CPU the code runs all the same."""

from __future__ import annotations

import collections
import contextlib
import warnings

import torch

WAITS = "called a synchronizing CUDA operation"


def of(dry):
    """The device to run on."""
    return torch.device("cpu") if dry else torch.device("cuda", torch.cuda.current_device())


def settle(device):
    """Waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def forbidding_waits(device):
    """Raises where the host waits for the GPU."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextlib.contextmanager
def noting_waits(device):
    """Yields a Counter that has afterwards how often the host waited for the GPU, by file and line."""
    found = collections.Counter()
    if device.type != "cuda":
        yield found
        return
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")
    found.update(f"{w.filename}:{w.lineno}" for w in caught if WAITS in str(w.message))


class Allocations:
    """What the caching allocator has done since it was made; nothing is known on a CPU."""

    def __init__(self, device):
        self._cuda = device.type == "cuda"
        self._before = torch.cuda.memory_stats(device) if self._cuda else {}
        self._device = device

    def since(self):
        """Blocks given out and still held, memory asked of the driver, and retries after running out."""
        if not self._cuda:
            return {}
        now = torch.cuda.memory_stats(self._device)
        kinds = {
            "blocks_given_out": "allocation.all.allocated",
            "blocks_still_held": "allocation.all.current",
            "segments_from_driver": "segment.all.allocated",
            "retries": "num_alloc_retries",
        }
        return {name: now.get(key, 0) - self._before.get(key, 0) for name, key in kinds.items()}
