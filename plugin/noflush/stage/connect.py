"""Makes a stage's channels: between the ranks of its world, or, for one that has come back without, by lines alone."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from noflush.stage.channels import ControlIn, ControlOut, Inbox, Neighbours, Outbox
from noflush.stage.detour import DetourControlIn, DetourControlOut, DetourInbox, DetourOutbox
from noflush.stage.groups import without_splits
from noflush.stage.link import ACTIVATION, GRADIENT, Link, LinkAbove, LinkBelow
from noflush.stage.peer import Attention, Peer


def connect(
    pipelines: Sequence[Sequence[int]],
    rank: int,
    device: torch.device,
    timeout_s: float,
    replaceable: Collection[int] = (),
) -> Neighbours:
    """Makes the groups of every pipeline (all ranks must call this alike) and this rank's channels.

    Args:
        pipelines: global ranks of each pipeline's stages, in stage order; the same on every rank.
        rank: this process.
        device: where activations and gradients live.
        timeout_s: how long a wait may last.
        replaceable: stages round which messages are to go if they die.
    """
    neighbours, over_gloo = Neighbours(), dist.get_backend() == "gloo"
    patience, attention = timedelta(seconds=timeout_s), Attention(timeout_s)
    neighbours.attention = attention
    far = partial(Peer, own_rank=rank, timeout_s=timeout_s, attention=attention)
    with without_splits():
        for ranks in pipelines:
            for s in range(len(ranks) - 1):
                pair = [ranks[s], ranks[s + 1]]
                down = dist.new_group(pair, timeout=patience)
                up = dist.new_group(pair, timeout=patience)
                control = dist.new_group(pair, timeout=patience, backend="gloo")
                watch = None if over_gloo else dist.new_group(pair, timeout=patience, backend="gloo")
                if rank == pair[0]:
                    can_go = s + 1 in replaceable
                    below = partial(far, rank=pair[1], stage=s + 1, own_stage=s, replaceable=can_go)
                    link = LinkBelow(below(down), direct=True) if can_go else None
                    _open_below(neighbours, below(down), below(up), below(control), device, link)
                    neighbours.watched += () if over_gloo else (below(watch, attention=Attention(timeout_s)),)
                elif rank == pair[1]:
                    can_go = s in replaceable
                    above = partial(far, rank=pair[0], stage=s, own_stage=s + 1, replaceable=can_go)
                    upward = LinkAbove(above(down), direct=True) if can_go else None
                    _open_above(neighbours, above(down), above(up), above(control), device, upward)
                    neighbours.watched += () if over_gloo else (above(watch, attention=Attention(timeout_s)),)
        if not over_gloo:
            neighbours.watched += _chained(pipelines, rank, timeout_s)
    if device.type != "cpu":
        neighbours.warm_up()
    return neighbours


def connect_alone(stage: int, stages: int, device: torch.device, timeout_s: float) -> Neighbours:
    """Channels of a stage that has no world with its neighbours: every message goes by a line."""
    nothing: Any = None
    attention = Attention(timeout_s)
    neighbours = Neighbours(attention=attention)
    far = partial(
        Peer, nothing, own_rank=stage, own_stage=stage, timeout_s=timeout_s, attention=attention, replaceable=True
    )
    below, above = far(rank=stage + 1, stage=stage + 1), far(rank=stage - 1, stage=stage - 1)
    if stage + 1 < stages:
        _open_below(neighbours, below, below, below, device, LinkBelow(below, direct=False))
    _open_above(neighbours, above, above, above, device, LinkAbove(above, direct=False))
    return neighbours


def _open_below(
    neighbours: Neighbours, down: Peer, up: Peer, control: Peer, device: torch.device, link: LinkBelow | None
) -> None:
    neighbours.below = link
    neighbours.activations_out = _outbox(down, ACTIVATION, device, link)
    neighbours.gradients_in = _inbox(up, GRADIENT, device, link)
    neighbours.control_out = ControlOut(control) if link is None else DetourControlOut(control, link)


def _open_above(
    neighbours: Neighbours, down: Peer, up: Peer, control: Peer, device: torch.device, link: LinkAbove | None
) -> None:
    neighbours.above = link
    neighbours.activations_in = _inbox(down, ACTIVATION, device, link)
    neighbours.gradients_out = _outbox(up, GRADIENT, device, link)
    neighbours.control_in = ControlIn(control) if link is None else DetourControlIn(control, link)


def _outbox(peer: Peer, kind: str, device: torch.device, link: Link | None) -> Outbox:
    return Outbox(peer, kind, device) if link is None else DetourOutbox(peer, kind, device, link)


def _inbox(peer: Peer, kind: str, device: torch.device, link: Link | None) -> Inbox:
    return Inbox(peer, kind, device) if link is None else DetourInbox(peer, kind, device, link)


def _chained(pipelines: Sequence[Sequence[int]], rank: int, timeout_s: float) -> tuple[Peer, ...]:
    """Groups between successive ranks that share a stage, of all stages; this rank's ends of them."""
    ends: list[Peer] = []
    for stage, column in enumerate(zip(*pipelines, strict=True)):
        for one, other in itertools.pairwise(column):
            group = dist.new_group([one, other], timeout=timedelta(seconds=timeout_s), backend="gloo")
            if rank in (one, other):
                far = other if rank == one else one
                ends.append(Peer(group, far, stage, rank, stage, timeout_s, Attention(timeout_s)))
    return tuple(ends)
