"""Slow links within one machine: messages that wait before they are sent, each direction of a link by itself.

`delayed` is for one rank: in the place of ``torch.distributed.isend`` a thread a process group sends each message when
a link of so much latency and rate would have delivered it. Whatever is received meanwhile is not held up.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time

import torch.distributed as dist


class DelayedWork:
    """The work of a send that is still to be made."""

    def __init__(self):
        self._made = threading.Event()
        self._work = None

    def make(self, work):
        self._work = work
        self._made.set()

    def wait(self, timeout=None):
        assert self._made.wait(None if timeout is None else timeout.total_seconds())
        return self._work.wait() if timeout is None else self._work.wait(timeout)


class _Direction:
    def __init__(self, send, latency_s, bytes_per_s):
        self._send, self._latency, self._rate = send, latency_s, bytes_per_s
        self._free = 0.0
        self._queue = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()

    def put(self, tensor, **where):
        self._free = max(self._free, time.monotonic()) + tensor.numel() * tensor.element_size() / self._rate
        work = DelayedWork()
        self._queue.put((self._free + self._latency, tensor, where, work))
        return work

    def _run(self):
        while True:
            due, tensor, where, work = self._queue.get()
            time.sleep(max(0.0, due - time.monotonic()))
            work.make(self._send(tensor, **where))


@contextlib.contextmanager
def delayed(latency_s, bytes_per_s=1e12):
    """Within, this rank's `dist.isend` is late by ``latency_s``, and sends no faster than ``bytes_per_s`` a group."""
    send, directions = dist.isend, {}

    def isend(tensor, dst, group, tag=0):
        if group not in directions:
            directions[group] = _Direction(send, latency_s, bytes_per_s)
        return directions[group].put(tensor, dst=dst, group=group, tag=tag)

    dist.isend = isend
    try:
        yield
    finally:
        dist.isend = send
