"""How many of NCCL's communicators a rank opens on GPUs, and about what they hold there. Pure.

torch opens one for every process group that is used. Their buffers are NCCL's own: torch's figures of memory do not
count them.
"""

from __future__ import annotations

from dataclasses import dataclass

_BUFFER = 4 * 2**20
"""Bytes that a connection buffers on one channel: NCCL_BUFFSIZE's default."""
_CHANNELS = 16
"""Channels of a communicator between GPUs of one machine; NCCL takes up to 32 over NVLink, and few over a network."""
LINK_BYTES_ESTIMATE = _CHANNELS * _BUFFER
"""Of a communicator between two stages, whose messages go one way. An estimate; ``make bench-gpu`` measures it."""
GROUP_BYTES_ESTIMATE = 2 * _CHANNELS * _BUFFER
"""Of a communicator for collectives, in whose ring each rank receives and sends. An estimate as well."""


@dataclass(frozen=True)
class Communicators:
    """One rank's.

    Attributes:
        links: with the stages above and below: activations down and gradients up have one each.
        groups: of more than one rank: the world, the pipeline, the replicas of a stage, the slices of a tensor.
    """

    links: int
    groups: int

    @property
    def count(self) -> int:
        """All of them."""
        return self.links + self.groups

    @property
    def bytes_estimate(self) -> int:
        """What their buffers hold on the device, roughly."""
        return self.links * LINK_BYTES_ESTIMATE + self.groups * GROUP_BYTES_ESTIMATE


def communicators(stage: int, stages: int, data: int = 1, tensor: int = 1) -> Communicators:
    """Those of a rank of ``stage``, with ``data`` replicas and ``tensor`` slices."""
    neighbours = (stage > 0) + (stage < stages - 1)
    groups = sum(size > 1 for size in (stages * data * tensor, stages, data, tensor))
    return Communicators(2 * neighbours, groups)
