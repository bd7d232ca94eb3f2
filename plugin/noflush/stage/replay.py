"""Puts back into the pipeline what a checkpoint says was in flight: `order.replay`'s order, carried out.

Messages are those of the run, but that activations come without tied weights, of which every stage has its own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from noflush.order.actions import Op
from noflush.order.posting import Posting
from noflush.order.replay import gradients_on_the_way, in_flight, replay_order
from noflush.stage.channels import Neighbours
from noflush.stage.messages import Payload
from noflush.stage.runner import StageRunner
from noflush.stage.tied import TiedWeights

Sent = tuple[int, list[Tensor], int | None]
"""A gradient message: micro-batch of the segment, tensors as they travel, and which of them is a report, if any."""


def sent_and_not_taken(runner: StageRunner) -> list[Sent]:
    """Gradient messages that the stage above has not taken; they stay where they are."""
    found: list[Sent] = []
    outbox, (incoming, _) = runner.neighbours.gradients_out, runner.specs
    for m in gradients_on_the_way(runner.schedule, runner.stage, runner.calls):
        assert outbox is not None
        assert incoming is not None
        tensors = dict(outbox.untaken(runner.message(m)))[runner.message(m)]
        found.append((m, tensors, len(incoming.gradients()) if runner.ends_batch(m) else None))
    return found


def empty_links(links: Neighbours, stage: int, agree_on: Callable[[Any], list[Any]]) -> None:
    """On a drained pipeline: sends what is awaited already, for nothing, so that messages can be numbered anew.

    ``agree_on`` gives every stage's object; on all stages.
    """
    for outbox in (links.activations_out, links.gradients_out):
        if outbox is not None:
            outbox.retire(outbox.newest)
    awaited = agree_on(links.activations_in.posted_specs() if links.activations_in else [])
    if links.activations_out is not None:
        for specs in awaited[stage + 1]:
            nothing = [torch.zeros(shape, dtype=dtype) for shape, dtype in specs]
            links.activations_out.send_again(links.activations_out.newest + 1, nothing)
    if links.activations_in is not None:
        while links.activations_in.posted:
            links.activations_in.take(links.activations_in.next_to_post - links.activations_in.posted)
    agree_on(None)
    if links.activations_out is not None:
        links.activations_out.retire(links.activations_out.newest)
    if links.control_out is not None:
        links.control_out.retire(sys.maxsize)


def replay(
    runner: StageRunner, tied: TiedWeights, posting: Posting, sent: list[Sent],
    forward: Callable[[int, int, Payload | None], Payload],
) -> None:  # fmt: skip
    """Puts back what was in flight at a stage whose runner stands where it stood, and whose links are empty.

    Args:
        runner, tied, posting: the stage's.
        sent: what `sent_and_not_taken` gave.
        forward: ``forward(number, buffer, received)`` runs the forward of micro-batch ``number`` of the run again.
    """
    links = runner.neighbours
    following = runner.message(in_flight(runner.schedule, runner.stage, runner.calls).start)
    for inbox in (links.activations_in, links.gradients_in):
        if inbox is not None:
            inbox.renumber(following)
    kept = {m: tensors for m, tensors, _ in sent}
    received: Payload | None = None
    outputs: Payload = ()
    for _, op, m in replay_order(runner.schedule, posting, runner.stage, runner.calls):
        if op is Op.FORWARD:
            runner.ring.bind_for_backward(runner.number(m))
            tied.bind_again(runner.number(m))
            outputs = forward(runner.number(m), runner.buffer(m), received)
        elif op is Op.POST_ACTIVATION:
            assert links.activations_in is not None
            links.activations_in.post(runner.activation_specs())
        elif op is Op.RECV_ACTIVATION:
            assert links.activations_in is not None
            received = runner.received(links.activations_in.take(runner.message(m)))
        elif op is Op.SEND_ACTIVATION:
            assert links.activations_out is not None
            links.activations_out.send(
                runner.message(m), runner.coded(divmod(runner.number(m), runner.schedule.gas), outputs)
            )
        elif op is Op.POST_GRAD:
            runner.post_gradients(m)
        else:
            assert op is Op.SEND_GRAD
            assert links.gradients_out is not None
            links.gradients_out.send_again(runner.message(m), kept[m])
    runner.ring.bind_newest()
