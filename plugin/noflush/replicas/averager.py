"""One stage's part in the averaging over groups, between its updates. It never waits.

After an update a stage copies a slice of its true weights and has a round begin; after a later one, when the round has
ended, the newest version is corrected by what came of it, before any micro-batch uses that version. Micro-batches in
flight keep theirs.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from noflush.order.averaging import Exchange, Part, due, schedule_behind, slice_of, smoothing
from noflush.order.detours import Offer
from noflush.order.shared_order import SharedOrder
from noflush.replicas import state
from noflush.replicas.correction import correction
from noflush.replicas.mean_gradients import MeanGradients
from noflush.replicas.rounds import Failed, Round, RunsRounds
from noflush.replicas.settings import ReplicasConfig
from noflush.replicas.transport import State
from noflush.replicas.true_weights import TrueWeights
from noflush.stage.stage import Stage
from noflush.stage.update import FusedUpdate

_KEPT = 10_000


@dataclass(frozen=True)
class _Sent:
    """A slice on its way: which round it was taken for, the update after which, where the learning rate's schedule
    stood, what these weights had learnt from by then, where it lies and what it was."""

    number: int
    update: int
    position: float | None
    contributed: int
    start: int
    part: Tensor


class Averager:
    """Of one stage.

    Args:
        stage: whose weights they are.
        config: the block's.
        key: of the group: its name, a slash, and what no other has.
        samples: gives how many an update is made of.
        schedule: gives the learning rate's schedule, or None.
        step_schedule: has it go on by an update.
        step: what that adds to the schedule's position.
        order: the order of data that groups share, at the stage that decides for the group; None elsewhere.
        make_rounds: given how long round number n's slice is.

    Attributes:
        exchanges: the newest 10 000 averages that were applied.
        groups: how many groups took part in the newest round; 1: this one is alone, or the round came to nothing.
        failures: rounds that came to nothing, in a row.
        trained_by: samples that each group had trained on, by its key, when it was last heard of.
        doors: gives where each stage of this group is asked, if others may go round one that is lost.
        guest_samples: gives how many samples of other groups' this stage has trained on.
        round_begun: called when a round has been begun.
        born_of: the group whose state this stage went on from, and after how many updates; None: it began itself.
    """

    def __init__(
        self,
        stage: Stage,
        config: ReplicasConfig,
        key: str,
        samples: Callable[[], int],
        schedule: Callable[[], Any],
        step_schedule: Callable[[], None],
        step: Callable[[], float],
        order: SharedOrder | None,
        make_rounds: Callable[[Callable[[int], int]], RunsRounds],
    ) -> None:
        self._stage, self._config, self._key, self._samples = stage, config, key, samples
        self._schedule, self._step_schedule, self._step, self._order = schedule, step_schedule, step, order
        self._true = TrueWeights(stage.weights, stage.ring)
        self._rates: dict[int, Tensor] = {}
        self._visits: Counter[int] = Counter()
        self._sent: _Sent | None = None
        self._dropped = False
        self._number = self._started = 0
        self._started_s = 0.0
        self._trained = self._counted = 0
        self._told_of: tuple[float, int] | None = None
        self._others: dict[str, dict[str, Any]] = {}
        self.doors: Callable[[], Sequence[str]] = lambda: ()
        self.guest_samples: Callable[[], int] = lambda: 0
        self.round_begun: Callable[[], None] = lambda: None
        self.exchanges: deque[Exchange] = deque(maxlen=_KEPT)
        self.trained_by: dict[str, int] = {}
        self.born_of: tuple[str, int] | None = None
        self.groups, self.failures = 1, 0
        self._told_groups = 1
        self._rounds = make_rounds(self._slice_length)

    def _slice_length(self, number: int) -> int:
        if self._config.mode == "sync":
            return sum(layout.numel for layout in self._stage.weights.layouts)
        return slice_of(number, self._true.elements, self._config.fraction)[1]

    # ---- joining -----------------------------------------------------------------------------------------

    def ask(self, resumed: bool) -> tuple[Round | Failed, State | None]:
        """Takes part in a round before training; returns what came of it, and a living peer's state if there is one.

        Waits, and serves peers that start at the same time.

        Args:
            resumed: whether this group's own weights are worth more than those of one that has none.
        """
        self._rounds.settle(living=False, resumed=resumed)
        self._rounds.start(0, self._words(waits=True), None)
        result = None
        while result is None:
            self._rounds.serve(self.state_for_peer)
            result = self._rounds.poll(0.02)
        return result, self._rounds.received

    def begin(self, first: Round) -> None:
        """From here on the stage's updates are averaged, ``first`` being the round that `ask` ended well with."""
        self._number = first.number if self._rounds.received is None else first.number + 1
        self._heard(first)
        self._rounds.settle(living=True, resumed=True)
        self.restart()
        self._stage.update_done = lambda: self._rounds.serve(self.state_for_peer)
        if self._config.mode == "async":
            self._stage.after_update = self.updated
            return
        self._stage.after_update = self._count
        update = self._stage.update
        assert isinstance(update, FusedUpdate), "a host refuses others"
        update.over_groups = MeanGradients(self._rounds, self._words, self._heard, self._failed, self.state_for_peer)

    def restart(self) -> None:
        """The stage stands elsewhere, by a checkpoint or a peer's state: what was sent and learnt before is void."""
        self._dropped = self._dropped or self._sent is not None
        self._sent = None
        self._rates.clear()
        self._visits.clear()
        self._started, self._started_s = self._stage.ring.newest, time.monotonic()
        self._counted = self._contributed

    def come_back(self, trained: int) -> None:
        """Begins as one that its group has lost, and that has trained on ``trained`` samples.

        The first round begins with the next update: the group's other stages may be waiting.
        """
        self._trained = trained
        self.begin(Round(0, ({"key": self._key, "trained": trained},), None))
        self._started -= self._config.average_every

    # ---- training ----------------------------------------------------------------------------------------

    def updated(self) -> None:
        """After every update of the stage: hears, and sends."""
        self._count()
        if (self._sent is not None or self._dropped) and (result := self._rounds.poll()) is not None:
            sent, self._sent = self._sent, None
            if self._dropped or sent is None:
                self._dropped = False
            elif isinstance(result, Round):
                self._apply(result, sent)
            else:
                self._failed(result)
        update = self._stage.ring.newest
        if self._sent is None and not self._dropped and self._is_due(update):
            start, length = slice_of(self._number, self._true.elements, self._config.fraction)
            part, position = self._true.read(start, length), state.position_of(self._schedule())
            self._sent = _Sent(self._number, update, position, self._contributed, start, part)
            self._rounds.start(self._number, self._words(), part)
            self.round_begun()
            self._started, self._started_s = update, time.monotonic()

    def _count(self) -> None:
        self._trained += self._samples()

    @property
    def _contributed(self) -> int:
        """Samples that these weights have learnt from: guests' too, which their own group counts as trained on."""
        return self._trained + self.guest_samples()

    def _is_due(self, update: int) -> bool:
        # Newcomers wait for a round: where updates take long, one comes before its time.
        waited = time.monotonic() - self._started_s > self._config.timeout_s / 3
        return due(update, self._started, self._config.average_every) or waited

    def _words(self, waits: bool = False) -> dict[str, Any]:
        words: dict[str, Any] = {
            "samples": float(self._contributed - self._counted),
            "key": self._key,
            "trained": self._trained,
            "update": self._stage.ring.newest,
            "position": state.position_of(self._schedule()),
        }
        if self._order is not None:
            words["order"] = self._order.words(waits)
        if doors := self.doors():
            words |= {"doors": list(doors), "rate": self._rate()}
        return words

    def _rate(self) -> float | None:
        """Samples a second since it was last asked; None where nothing has been measured yet."""
        before, now = self._told_of, (time.monotonic(), self._trained)
        self._told_of = now
        if before is None or now[0] == before[0] or now[1] == before[1]:
            return None
        return (now[1] - before[1]) / (now[0] - before[0])

    def offers(self) -> list[Offer]:
        """The other groups as of the newest round that they took part in, for the stages of one that loses its own."""
        return [Offer(key, tuple(one["doors"]), one["rate"]) for key, one in self._others.items() if "doors" in one]

    @property
    def trained(self) -> int:
        """Samples that this group has trained on."""
        return self._trained

    def words_of_lost(self) -> dict[str, Any]:
        """What is told in the name of a stage that is lost: of no samples, and where the schedule stands."""
        return {
            "samples": 0.0,
            "key": self._key,
            "trained": self._trained,
            "update": self._stage.ring.newest,
            "position": state.position_of(self._schedule()),
        }

    def _apply(self, result: Round, sent: _Sent) -> None:
        self._heard(result)
        self._number = result.number + 1
        self._counted = sent.contributed
        update, length = self._stage.ring.newest, sent.part.numel()
        if result.average is None or result.number != sent.number:
            return
        now = self._true.read(sent.start, length)
        change, rate = correction(
            self._config.drift, sent.part, result.average, now, self._rates.get(sent.start), update - sent.update,
            smoothing(self._visits[sent.start]),
        )  # fmt: skip
        self._visits[sent.start] += 1
        if rate is not None:
            self._rates[sent.start] = rate
        self._true.shift(sent.start, change)
        parts = tuple(Part(one["key"], one["update"], one["samples"]) for one in result.told)
        behind = self._catch_up(sent, result)
        self.exchanges.append(Exchange(result.number, sent.start, length, sent.update, update, parts, behind))

    def _catch_up(self, sent: _Sent, result: Round) -> int:
        others = [(one["samples"], one["position"]) for one in result.told]
        if sent.position is None or any(position is None for _, position in others):
            return 0
        behind = schedule_behind(sent.position, others, self._step())
        for _ in range(behind):
            self._step_schedule()
        return behind

    @property
    def samples_of_all(self) -> int:
        """Samples that all groups have trained on, those that are gone too, as of what was last heard of each."""
        return sum((self.trained_by | {self._key: self._trained}).values())

    def _heard(self, result: Round) -> None:
        self.failures = 0
        self.trained_by.update({one["key"]: one["trained"] for one in result.told})
        if others := {one["key"]: one for one in result.told if one["key"] != self._key}:
            self._others = others
        if self._order is not None:
            self._order.agree([one["order"] for one in result.told])
        if len(result.told) != self._told_groups and self._stage.stage == 0:
            names = ", ".join(one["key"].rpartition("/")[0] for one in result.told)
            twice = self._order.drawn_twice if self._order is not None else 0
            self._stage.work.say(
                f"groups: {len(result.told)} ({names}), after update {self._stage.ring.newest}"
                + f"; {twice} micro-batches so far that another may have drawn too" * bool(twice)
            )
        self.groups = self._told_groups = len(result.told)

    def _failed(self, failure: Failed) -> None:
        self.failures, self.groups = self.failures + 1, 1
        self._told_groups = 0  # the next that ends well says so
        if self.failures == 1 and self._stage.stage == 0:
            self._stage.work.say(
                f"groups: round {self._number} was given up: {_in_short(failure.why)}; training goes on"
            )

    # ---- others' joining ---------------------------------------------------------------------------------

    def state_for_peer(self) -> State:
        """What a newcomer is given, between two updates."""
        tensors, plain = state.take(self._stage, self._true, self._schedule())
        return tensors, {**plain, "key": self._key, "trained_by": self.trained_by}

    def take_over(self, found: State) -> None:
        """Goes on from a peer's state, on a drained stage; the numbers of calls are the engine's to set."""
        state.put(self._stage, self._true, self._schedule(), found)
        self.born(found)

    def born(self, found: State) -> None:
        """This stage goes on from a peer's state."""
        self.born_of = found[1]["key"], found[1]["updates"]
        self.trained_by = dict(found[1]["trained_by"])

    def close(self) -> None:
        """Leaves the other groups."""
        self._rounds.close()


def _in_short(why: str) -> str:
    """Gloo's errors, without where in its source they are raised and what to do with its logs."""
    return why.rpartition("] ")[2].partition(". ")[0] if why.startswith("[/") else why
