"""Whether the ranks' memory fits where they run. `shortage` is pure."""

from __future__ import annotations

import os

from noflush.launch.ranks import uses_cuda
from tests.bench import record
from tests.bench.gpu_parts import machine

OF_PROCESS = 0.6e9
"""Bytes that a rank takes beside tensors: on a GPU its context and communicators."""


def shortage(way, needed, devices, what):
    """Why stages of ``needed`` bytes have no room; None if they have, or nobody knows.

    Args:
        way: of gpu_parts.ways.
        devices: bytes of every GPU, or of the machine for gloo; ranks are spread over them in order.
        what: whose memory it is, in words.
    """
    if not devices or way == "partitions":
        return None
    share = [0.0] * len(devices)
    for rank, count in enumerate(needed):
        share[device_of(way, rank, len(needed), len(devices))] += count + OF_PROCESS
    for number, (taken, there) in enumerate(zip(share, devices, strict=True)):
        if taken > there:
            where = "this machine" if way == "gloo" else f"GPU {number}"
            return (
                f"{what}: its ranks on {where} need {taken / 1e9:.1f} GB at least, and there are {there / 1e9:.1f} GB: "
                "use more or larger GPUs, or a cluster"
            )
    return None


def device_of(way, rank, world, devices):
    """The GPU of ``rank``, by its number: its own, or a block of neighbouring ranks share one."""
    if way == "devices":
        return rank
    return rank * devices // world if way in ("multi-rank", "host id") else 0


def devices_of(way):
    """Bytes of every GPU, asked without taking a context on one; of the machine for gloo."""
    if way == "gloo":
        return [float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))]
    lines = machine.nvidia_smi("--query-gpu=memory.total", "--format=csv,noheader,nounits").splitlines()
    return [float(line) * 2**20 for line in lines if line.strip().isdigit()]


def hardware():
    """The GPUs by name and memory, or the CPU's model and cores."""
    if not uses_cuda(os.environ):
        return record.hardware()
    lines = machine.nvidia_smi("--query-gpu=name,memory.total", "--format=csv,noheader").splitlines()
    return f"{len(lines)} x {lines[0]}" if lines else record.hardware()
