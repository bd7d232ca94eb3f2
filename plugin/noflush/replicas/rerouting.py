"""One stage's part in keeping a pipeline going without a stage: its door, its guests, and its way round the lost one.

::

    group A   stage s-1 ---x   (s has died)   x--- s+1        A's s-1 knocks at B's s, which knocks at A's s+1; then
                   \\                           /             activations and headers go down this way, gradients and
    group B   s-1 --- stage s, which serves both --- s+1      reports up it, until A's s is back (`come_back`)
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from noflush.order.actions import Op
from noflush.order.detours import Offer, ranked
from noflush.replicas.door import KNOCK_S, Door, PeerLine, Refused, knock
from noflush.replicas.empty_place import EmptyPlace
from noflush.replicas.guests import Guests
from noflush.replicas.labels import KeptLabels
from noflush.replicas.transport import State
from noflush.stage.link import Line, NoStandIn
from noflush.stage.messages import PayloadSpec
from noflush.stage.stage import Stage

COME, READY, BEGIN = "come", "ready", "begin"


class Rerouting:
    """Of one stage.

    Args:
        stage: this one.
        key: of its group.
        door: its own.
        doors: gives where every stage of the group is asked.
        state: gives this stage's state between two updates, for the same stage of another group that comes back.
        say: tells the user a line.
        patience_s: for how long one that asks for the state is kept waiting.

    Attributes:
        guests: whom this stage serves.
        offers: gives the groups that may stand in.
        open_place: makes the `EmptyPlace` of a stage.
        lost: called with the number of a stage that is lost.
        trained: gives the samples that the group has trained on.
    """

    def __init__(
        self, stage: Stage, key: str, door: Door, doors: Callable[[], Sequence[str]], state: Callable[[], State],
        say: Callable[[str], None], patience_s: float,
    ) -> None:  # fmt: skip
        self._stage, self._key, self._door, self._state, self._say = stage, key, door, state, say
        self._doors = doors
        self._patience_s = patience_s
        self.guests = Guests(stage, say)
        self.offers: Callable[[], Sequence[Offer]] = lambda: ()
        self.open_place: Callable[[int], EmptyPlace] | None = None
        self.lost: Callable[[int], None] = lambda number: None
        self.trained: Callable[[], int] = lambda: 0
        self._place: EmptyPlace | None = None
        self._stand_in: Offer | None = None
        self._coming: PeerLine | None = None
        self._expected: PeerLine | None = None
        self._came_back: PeerLine | None = None
        self._asked, self._given = threading.Event(), threading.Event()
        self._held: State | None = None
        door.answers.update(guest=self.guests.answer, state=self._give_state)
        door.answers["stand-in"] = self._accept
        door.answers["come back"] = self._welcome
        door.answers["alive"] = self._alive
        if stage.stage == 0:
            door.answers["labels"] = KeptLabels(stage).answer
        if (below := stage.runner.neighbours.below) is not None:
            below.find = self._find
        if (above := stage.runner.neighbours.above) is not None:
            above.is_found = self._is_found
        stage.runner.after_compute = self._after_compute
        stage.before_call = self._before_call

    def begin_round(self) -> None:
        """This stage begins a round of averaging: so does the lost one's place, unless the stage itself is coming."""
        if self._place is not None and self._coming is None:
            self._place.start()

    def close(self) -> None:
        """Serves nobody any more."""
        self._door.close()
        self.guests.close()
        for link in (self._stage.runner.neighbours.below, self._stage.runner.neighbours.above):
            if link is not None:
                link.close()
        self._give_up_place()

    # ---- the next stage is lost ----------------------------------------------------------------------------

    def _find(self, first: int, refused: set[str]) -> tuple[str, Line]:
        """As `LinkBelow.find`."""
        stage, lost = self._stage, self._stage.stage + 1
        _, outgoing = stage.runner.specs
        if outgoing is None:
            raise NoStandIn("training had not begun")
        doors = self._doors()
        question = {
            "kind": "guest",
            "key": self._key,
            "stage": lost,
            "first": first,
            "gas": stage.schedule.gas,
            "spec": outgoing.to_words(),
            "below": doors[lost + 1] if lost + 1 < len(doors) else None,
            "head": doors[0],
            "offset": stage.runner.number(0) - stage.runner.message(0),
            "phase": (stage.runner.message(0) - 1) % stage.schedule.gas,
        }
        answers = []
        for offer in ranked(self.offers(), refused):
            name = offer.key.rpartition("/")[0]
            try:
                line, _ = knock(offer.doors[lost], question, KNOCK_S)
            except (Refused, OSError, ValueError) as why:
                answers.append(f"{name}: {why}")
                continue
            self._line_up(line)
            self._stand_in = offer
            self._say(f"groups: stage {lost} is lost; that of {name} stands in from micro-batch {first} on")
            self._keep_place()
            self.lost(lost)
            return offer.key, line
        raise NoStandIn("; ".join(answers) or "there is no other group to stand in")

    def _line_up(self, line: PeerLine) -> None:
        below = self._stage.runner.neighbours.below
        assert below is not None
        line.use(below.bring, below.look)
        line.begin()

    # ---- it is back ----------------------------------------------------------------------------------------

    def _welcome(self, question: dict[str, Any], line: PeerLine) -> State:
        """The lost stage has a process again."""
        number, below = self._stage.stage + 1, self._stage.runner.neighbours.below
        if question["key"] != self._key or question["stage"] != number or below is None:
            raise Refused(f"this is stage {self._stage.stage} of group {self._key}")
        if self._stand_in is None:
            raise Refused(f"stage {number} is not known to be lost")
        if self._coming is not None and not self._coming.closed:
            raise Refused(f"another process is coming back as stage {number}")

        def received(kind: str, at: int, tensors: Sequence[Tensor], words: Sequence[int]) -> None:
            if kind == READY:
                self._came_back = line
            else:
                below.bring(kind, at, tensors, words)

        line.use(received, below.look)
        self._coming = line
        return {}, {"stand-in": self._stand_in.doors[number]}

    def _before_call(self) -> None:
        """Lets one in that comes back: first its place in the rounds must be free, then it must have its state."""
        if self._coming is not None and self._coming.closed:  # it has died again
            self._coming = self._expected = self._came_back = None
            self._keep_place()
        if self._coming is not self._expected and (self._place is None or self._place.idle):
            self._give_up_place()
            coming = self._expected = self._coming
            assert coming is not None
            coming.send(COME, 0)
        if self._came_back is not None:
            self._hand_over(self._came_back)

    def _hand_over(self, line: PeerLine) -> None:
        """From the next call on the micro-batches are the lost stage's own again."""
        self._coming = self._expected = self._came_back = self._stand_in = None
        below, first = self._stage.runner.neighbours.below, self._stage.runner.next_message
        assert below is not None
        line.send(BEGIN, first, words=[self._stage.calls, self.trained()])
        below.add_line(first, line)
        self._say(f"groups: stage {self._stage.stage + 1} is back, from micro-batch {first} on")

    def _keep_place(self) -> None:
        if self._place is None and self.open_place is not None:
            self._place = self.open_place(self._stage.stage + 1)

    def _give_up_place(self) -> None:
        if self._place is not None:
            self._place.close()
            self._place = None

    # ---- the stage before is lost, or back --------------------------------------------------------------------

    def _accept(self, question: dict[str, Any], line: PeerLine) -> State:
        """Somebody stands in for the stage before, or is it itself."""
        above, (incoming, _) = self._stage.runner.neighbours.above, self._stage.runner.specs
        if question["key"] != self._key or above is None or question["stage"] != self._stage.stage - 1:
            raise Refused(f"this is stage {self._stage.stage} of group {self._key}")
        if incoming is None or PayloadSpec.from_words(question["spec"]) != incoming:
            raise Refused(f"its activations are {PayloadSpec.from_words(question['spec'])} and not {incoming}")
        line.use(above.bring, above.look)
        return {}, {"wants": above.accept(question["first"], line)}

    def _is_found(self) -> bool:
        """As `LinkAbove.is_found`."""
        stage, doors = self._stage.stage, None
        if stage < 2:  # nobody stands in for the first stage
            return False
        try:
            doors = self._doors()
            # The stage before may be alive, and have found somebody for this one: their connection broke, not it.
            if knock(doors[stage - 1], {"kind": "alive"}, KNOCK_S)[1][1]["replaced"] == stage:
                return False
        except (Refused, OSError, RuntimeError):  # the group's store ends with its first stage
            if doors is None:
                return False
        try:
            knock(doors[stage - 2], {"kind": "alive"}, KNOCK_S)[0].close()
        except (Refused, OSError):
            return False
        return True

    def _alive(self, question: dict[str, Any], line: PeerLine) -> State:
        return {}, {"replaced": None if self._stand_in is None else self._stage.stage + 1}

    # ---- a stage of another group is to have this one's state ---------------------------------------------------

    def _give_state(self, question: dict[str, Any], line: PeerLine) -> State:
        self._given.clear()
        self._asked.set()
        if not self._given.wait(self._patience_s):
            raise Refused(f"no update was made here in {self._patience_s:g} s, after which it was to be given")
        held, self._held = self._held, None
        assert held is not None
        return held

    def _after_compute(self, op: Op) -> None:
        self.guests.after_compute(op)
        if op is Op.UPDATE and self._asked.is_set():
            self._asked.clear()
            tensors, plain = self._state()
            specs = [spec.to_words() for spec in self._stage.runner.specs if spec is not None]
            self._held = tensors, {**plain, "specs": specs}
            self._given.set()
