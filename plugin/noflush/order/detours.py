"""Which group's stage stands in for one that is lost, and what its neighbours must keep for that. Pure.

Stage s of group A has died. Stage s - 1 sends its micro-batches to stage s of another group, which sends their
activations on to A's stage s + 1, whose gradients come back the same way. In flight at the lost stage were the
micro-batches that s - 1 has sent on and has no gradient of: s - 1 still has their activations, for they are forgotten
with their gradients, and s + 1 keeps the gradients that s - 1 may not have got. So nothing is lost, and none is trained
on twice at any stage that lives.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Offer:
    """A group whose stages may stand in.

    Attributes:
        key: of the group.
        doors: where each of its stages listens, ``host:port``.
        rate: micro-batches a second that it was last measured at; None of a newcomer.
    """

    key: str
    doors: tuple[str, ...]
    rate: float | None


def ranked(offers: Sequence[Offer], refused: Collection[str] = ()) -> list[Offer]:
    """In the order in which they are asked: the fastest first, newcomers last, by key where nothing else says.

    A newcomer's pipeline is filling, and its rate is not known; that such go to the queue's tail is what Node0 learnt
    from training over the internet.

    Args:
        refused: keys of those that have failed already.
    """
    left = [offer for offer in offers if offer.key not in refused]
    return sorted(left, key=lambda offer: (offer.rate is None, -(offer.rate or 0.0), offer.key))


def replaceable(stages: int, tied: Collection[Sequence[int]] = ()) -> tuple[int, ...]:
    """The stages for which another group's may stand in.

    Not the first: it draws the group's samples, and keeps the store and torchft's manager by which the group is one.
    And none that uses a weight together with other stages, for its own group's would be needed.

    Args:
        tied: of every tied weight the stages that use it.
    """
    users = {stage for stages_of_tie in tied for stage in stages_of_tie}
    return tuple(stage for stage in range(1, stages) if stage not in users)


def scale_with_guests(own: int, guests: int) -> float:
    """What gradients of ``own`` micro-batches, each divided by ``own``, are divided by with ``guests`` more added.

    So an update takes the mean over all that it was given, and its learning rate stays what it was.
    """
    return (own + guests) / own


@dataclass(frozen=True)
class Served:
    """One piece of work that a stage has done for another group, for whoever does the same again.

    Attributes:
        kind: ``F``, forward with the newest weights, whose output went on; or ``B``, forward and backward with them.
        key: of the group.
        micro_batch: of that group, by its messages' number.
        after: how many forwards, backwards and updates of its own the stage had done.
    """

    kind: str
    key: str
    micro_batch: int
    after: int
