"""What the links to the neighbours take, measured on a drained pipeline, and what all ranks make of it together.

Latency link by link, by messages of a few bytes there and back. Bandwidth on all links at once and both ways, as in
training, by messages of training's own size: what one of them takes is the time between two arrivals, which needs no
clock in common. Of what is measured several times the median counts.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from noflush.order.link_traffic import LinkTraffic
from noflush.order.timing import Cost, Link
from noflush.stage.channels import Neighbours
from noflush.stage.peer import Peer, wait_for

_ROUND_TRIPS = 7
_MESSAGES = 8
_TAG = 1  # gloo may have receives of coming activations posted, which must not take these


@dataclass(frozen=True)
class Measured:
    """What one rank has measured, in seconds; 0 where there is no such link.

    Attributes:
        stage: whose.
        cost: of a micro-batch.
        latency: of the link to the next stage, one way.
        down: between two activations that arrive from the stage before.
        up: between two gradients that arrive from the next one.
    """

    stage: int
    cost: Cost
    latency: float
    down: float
    up: float


def measure(
    neighbours: Neighbours,
    above: LinkTraffic | None,
    below: LinkTraffic | None,
    device: torch.device,
    stage: int,
    cost: Cost,
    together: bool,
) -> Measured:
    """Measures the links of ``stage``; on all ranks, with nothing in flight. A collective of the world.

    Args:
        above, below: bytes of a message to and from the stage before, and the next one; None where there is none.
        device: where messages lie.
        stage, cost: to be told with it.
        together: whether all links are measured at once and both ways; an accelerator, which may do one thing at a
            time, has them measured in turn.
    """
    latency = _latency(neighbours, device)
    dist.barrier()  # so that all links are busy together
    down, up = (_together if together else _in_turn)(neighbours, above, below, device)
    return Measured(stage, cost, latency, down, up)


def gather(mine: Measured, stages: int) -> tuple[list[Cost], list[Link]]:
    """Costs by stage and links, of all ranks' figures the slowest. A collective of the world, the same on all ranks."""
    told: list[Measured | None] = [None] * dist.get_world_size()
    dist.all_gather_object(told, mine)
    return merge([figures for figures in told if figures is not None], stages)


def merge(told: Sequence[Measured], stages: int) -> tuple[list[Cost], list[Link]]:
    """As `gather`, of the figures of all ranks."""
    by_stage = [[figures for figures in told if figures.stage == s] for s in range(stages)]
    costs = [
        Cost(
            max(f.cost.forward for f in of_stage),
            max(f.cost.backward for f in of_stage),
            max(f.cost.update for f in of_stage),
        )
        for of_stage in by_stage
    ]
    links = [
        Link(
            max(f.latency for f in by_stage[s]),
            down=max(f.down for f in by_stage[s + 1]),
            up=max(f.up for f in by_stage[s]),
        )
        for s in range(stages - 1)
    ]
    return costs, links


def _latency(neighbours: Neighbours, device: torch.device) -> float:
    word = torch.zeros(1, device=device)
    # Link by link down the pipeline: a stage answers the one before it, and then asks the next one.
    if neighbours.activations_in is not None and neighbours.gradients_out is not None:
        for _ in range(_ROUND_TRIPS):
            _wait(_receive(word, neighbours.activations_in.peer), neighbours.activations_in.peer, device)
            _wait(_send(word, neighbours.gradients_out.peer), neighbours.gradients_out.peer, device)
    took = []
    if neighbours.activations_out is not None and neighbours.gradients_in is not None:
        for _ in range(_ROUND_TRIPS):
            start = time.perf_counter()
            _wait(_send(word, neighbours.activations_out.peer), neighbours.activations_out.peer, device)
            _wait(_receive(word, neighbours.gradients_in.peer), neighbours.gradients_in.peer, device)
            took.append((time.perf_counter() - start) / 2)
    return statistics.median(took) if took else 0.0


def _together(
    neighbours: Neighbours, above: LinkTraffic | None, below: LinkTraffic | None, device: torch.device
) -> tuple[float, float]:
    """Between two arrivals from the stage before and from the next one, all links busy both ways."""
    coming: list[tuple[Peer, int]] = []
    going: list[tuple[Peer, int]] = []
    if above is not None and neighbours.activations_in is not None and neighbours.gradients_out is not None:
        coming.append((neighbours.activations_in.peer, above.down))
        going.append((neighbours.gradients_out.peer, above.up))
    if below is not None and neighbours.activations_out is not None and neighbours.gradients_in is not None:
        coming.append((neighbours.gradients_in.peer, below.up))
        going.append((neighbours.activations_out.peer, below.down))
    received = [[_receive(_bytes(count, device), peer) for peer, count in coming] for _ in range(_MESSAGES)]
    sent = [[_send(_bytes(count, device), peer) for peer, count in going] for _ in range(_MESSAGES)]
    marks: list[list[float]] = [[] for _ in coming]
    for works in received:
        for (peer, _), work, arrivals in zip(coming, works, marks, strict=True):
            _wait(work, peer, device)
            arrivals.append(time.perf_counter())
    for works in sent:
        for (peer, _), work in zip(going, works, strict=True):
            _wait(work, peer, device)
    gaps = [_typical_gap(arrivals) for arrivals in marks]
    down = gaps.pop(0) if above is not None else 0.0
    return down, gaps.pop(0) if below is not None else 0.0


def _in_turn(
    neighbours: Neighbours, above: LinkTraffic | None, below: LinkTraffic | None, device: torch.device
) -> tuple[float, float]:
    """The same one direction after the other, and a message at a time: what the strictest accelerator can do too."""
    took = []
    ways = (
        (neighbours.activations_in, above.down if above else 0, neighbours.activations_out, below.down if below else 0),
        (neighbours.gradients_in, below.up if below else 0, neighbours.gradients_out, above.up if above else 0),
    )
    for inbox, coming, outbox, going in ways:
        arrivals = []
        for _ in range(_MESSAGES):
            if inbox is not None:
                _wait(_receive(_bytes(coming, device), inbox.peer), inbox.peer, device)
                arrivals.append(time.perf_counter())
            if outbox is not None:
                _wait(_send(_bytes(going, device), outbox.peer), outbox.peer, device)
        took.append(_typical_gap(arrivals))
    down, up = took
    return down, up


def _typical_gap(arrivals: Sequence[float]) -> float:
    return statistics.median(b - a for a, b in itertools.pairwise(arrivals)) if arrivals else 0.0


def _bytes(count: int, device: torch.device) -> Tensor:
    return torch.zeros(max(1, count), dtype=torch.uint8, device=device)


def _send(tensor: Tensor, peer: Peer) -> dist.Work:
    work = dist.isend(tensor, dst=peer.rank, group=peer.group, tag=_TAG)
    assert work is not None
    return work


def _receive(tensor: Tensor, peer: Peer) -> dist.Work:
    work = dist.irecv(tensor, src=peer.rank, group=peer.group, tag=_TAG)
    assert work is not None
    return work


def _wait(work: dist.Work, peer: Peer, device: torch.device) -> None:
    wait_for(work, peer, "measuring the link to")
    if device.type == "cuda":  # there a wait is for the stream alone
        torch.cuda.synchronize(device)
