"""When each stage computes and talks: the no-flush 1F1B schedule and its synchronous twin.

Pure: no torch, no host. The engine executes the actions made here one by one, in order.

Words: ``stage`` s of ``stages`` P; ``gas`` K micro-batches an optimizer update; ``lag`` L, how many more
forwards than backwards a stage has done in the steady state. A *segment* is the time from a full pipeline
start to a drain; micro-batches, updates and calls are counted from the start of the segment here, and the
engine adds the segment's offset. For P = 3, K = 1 (forward of m is ``Fm``, a call is one column)::

    call      0      1      2         3         4
    stage 0   F0     F1     F2 B0 U0  F3 B1 U1  F4 B2 U2
    stage 1   F0     F1 B0  F2 B1     F3 B2     F4 B3       (each B followed by its U)
    stage 2   F0 B0  F1 B1  F2 B2     F3 B3     F4 B4

Nothing drains between calls, and whatever a stage needs in call t its peers produce in calls <= t, so a
barrier between calls is safe. The order is PipeDream's 1F1B (Narayanan et al., SOSP 2019), with the exact delay of each
micro-batch where Ajanthan et al. (arXiv 2505.01099) count a nominal one a stage.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Literal

ScheduleName = Literal["1f1b_no_flush", "1f1b_flush"]
WeightPolicy = Literal["stash", "latest", "2bw"]


class Op(str, Enum):
    """What an action does. The value is its spelling in text."""

    FORWARD = "F"
    BACKWARD = "B"
    UPDATE = "U"
    SEND_ACTIVATION = "SA"
    RECV_ACTIVATION = "RA"
    SEND_GRAD = "SG"
    RECV_GRAD = "RG"
    POST_ACTIVATION = "PA"
    POST_GRAD = "PG"


POSTS = frozenset({Op.POST_ACTIVATION, Op.POST_GRAD})
COMPUTE = frozenset({Op.FORWARD, Op.BACKWARD, Op.UPDATE})
_ACTION = re.compile(r"^(\d+)(SA|RA|PA|SG|RG|PG|F|B|U)(\d+)$")


@dataclass(frozen=True)
class Action:
    """One step of one stage; ``index`` is a micro-batch, or for UPDATE the number of the update (from 0).

    Round-trips to text: ``str(Action(2, Op.FORWARD, 7)) == "2F7"``.
    """

    stage: int
    op: Op
    index: int

    def __str__(self) -> str:
        return f"{self.stage}{self.op.value}{self.index}"

    @classmethod
    def parse(cls, text: str) -> Action:
        """The action that ``text`` spells. Raises ValueError with the spelling expected."""
        found = _ACTION.match(text)
        if found is None:
            raise ValueError(
                f"{text!r} is not an action: expected <stage><F|B|U|SA|RA|PA|SG|RG|PG><index>, as in '2F7'"
            )
        stage, op, index = found.groups()
        return cls(int(stage), Op(op), int(index))


MOST_IN_FLIGHT = 4096
"""Largest ``extra_in_flight``; deeper than any link needs, and its delay no training survives."""
MOST_PASSES = 500_000
"""Passes of a micro-batch through a stage that are proven before the first step, seconds of work."""


def ceil_div(a: int, b: int) -> int:
    """The smallest integer not below a / b."""
    return -(-a // b)


@dataclass(frozen=True)
class Schedule:
    """A pipeline's whole plan of work; every question about order, lag or version is answered here.

    Attributes:
        stages: P, number of pipeline stages, at least 1.
        gas: K, micro-batches an optimizer update (DeepSpeed's gradient_accumulation_steps), at least 1.
        name: ``1f1b_no_flush`` or its synchronous twin ``1f1b_flush``.
        weights: which version a forward uses and whether its backward sees the same (``stash``, ``latest``,
            ``2bw``). The twin has one version and no delay whatever is said here.
        extra_in_flight: e, micro-batches in flight at stage 0 beyond P; tapers to none at the last stage.

    Raises:
        ValueError: a value out of range, a combination that cannot work, or an order too long to be proven.
    """

    stages: int
    gas: int
    name: ScheduleName = "1f1b_no_flush"
    weights: WeightPolicy = "stash"
    extra_in_flight: int = 0

    def __post_init__(self) -> None:
        if self.stages < 1 or self.gas < 1 or not 0 <= self.extra_in_flight <= MOST_IN_FLIGHT:
            raise ValueError(
                f"stages={self.stages}, gas={self.gas}, extra_in_flight={self.extra_in_flight}: "
                f"need stages >= 1, gas >= 1, extra_in_flight from 0 to {MOST_IN_FLIGHT}"
            )
        passes = self.stages * self.gas * self.calls_to_prove
        if passes > MOST_PASSES:
            raise ValueError(
                f"stages={self.stages}, gas={self.gas}, extra_in_flight={self.extra_in_flight}: to prove their order "
                f"free of deadlock takes {passes:,} passes of a micro-batch through a stage, and the bound is "
                f"{MOST_PASSES:,}; use fewer stages, a smaller gradient_accumulation_steps (larger micro-batches), or "
                "less in flight"
            )
        if self.flushes and self.extra_in_flight:
            raise ValueError(
                f"extra_in_flight={self.extra_in_flight} with schedule '1f1b_flush': a flushing pipeline has "
                "nothing in flight between calls; set extra_in_flight to 0 or schedule to '1f1b_no_flush'"
            )
        if not self.flushes and self.weights == "2bw" and self.gas < self.lag(0):
            raise ValueError(
                f"weights '2bw' with gradient_accumulation_steps={self.gas} and a lag of {self.lag(0)} at stage 0: "
                f"version t-1 does not exist yet when batch t starts; raise gradient_accumulation_steps to "
                f"{self.lag(0)} or more, or use weights 'stash'"
            )

    @property
    def flushes(self) -> bool:
        """True for the synchronous twin, which drains in every call."""
        return self.name == "1f1b_flush"

    @property
    def calls_to_prove(self) -> int:
        """Calls after which stage 0 has held as many weight versions as it ever will, twice over."""
        return 2 * ceil_div(self.lag(0), self.gas) + 2

    def lag(self, stage: int) -> int:
        """Micro-batches by which this stage's backwards trail its forwards between calls.

        ``L = P-1-s + ceil(e (P-1-s) / (P-1))``; 0 for the twin. Never increases with the stage.
        """
        if self.flushes:
            return 0
        depth = self.stages - 1 - stage
        extra = ceil_div(self.extra_in_flight * depth, self.stages - 1) if self.stages > 1 else 0
        return depth + extra

    def lag_in_call(self, stage: int) -> int:
        """By how much backwards trail forwards while a call runs; the twin lags here and catches up at its end."""
        return min(self.stages - 1 - stage, self.gas) if self.flushes else self.lag(stage)

    def in_flight(self, stage: int) -> int:
        """Most micro-batches whose activations this stage holds at once."""
        if self.flushes:
            return min(self.stages - 1 - stage, self.gas - 1) + 1
        return self.lag(stage) + 1

    def version(self, stage: int, micro_batch: int) -> int:
        """Weight version (number of updates since the segment began) that ``F(micro_batch)`` uses."""
        if self.flushes:
            return micro_batch // self.gas
        if self.weights == "2bw":
            return max(0, micro_batch // self.gas - 1)
        return max(0, micro_batch - self.lag(stage)) // self.gas

    def delay(self, stage: int, micro_batch: int) -> int:
        """Updates made between this micro-batch's forward weights and the update its gradient goes into."""
        return micro_batch // self.gas - self.version(stage, micro_batch)

    def mean_delay(self, stage: int) -> float:
        """The delay averaged over one steady batch, in updates (L / K for ``stash`` and ``latest``)."""
        first = 2 * self.gas * ceil_div(self.lag(stage) + 1, self.gas)
        return sum(self.delay(stage, m) for m in range(first, first + self.gas)) / self.gas

    def max_delay(self, stage: int) -> int:
        """The largest delay of any micro-batch once the pipeline is full, in updates."""
        first = 2 * self.gas * ceil_div(self.lag(stage) + 1, self.gas)
        return max(self.delay(stage, m) for m in range(first, first + self.gas))

    def versions_alive(self, stage: int) -> int:
        """Weight versions this stage must keep at once, the newest included."""
        if self.flushes or self.weights == "latest":
            return 1
        if self.weights == "2bw":
            return 2
        return ceil_div(self.lag(stage), self.gas) + 1

    def loss_lag(self, stage: int) -> int:
        """Calls after which this stage learns the loss of a batch (it travels back with the gradients)."""
        return ceil_div(self.lag(stage), self.gas)

    def call(self, stage: int, call: int) -> list[Action]:
        """Compute actions of one ``train_batch()``: K forwards, the backwards that are due, the updates."""
        first, last = call * self.gas, (call + 1) * self.gas
        inner_lag = self.lag_in_call(stage)
        oldest = first if self.flushes else 0
        actions: list[Action] = []
        for m in range(first, last):
            actions.append(Action(stage, Op.FORWARD, m))
            if m - inner_lag >= oldest:
                actions.extend(self._backward(stage, m - inner_lag))
        if self.flushes:
            for m in range(last - inner_lag, last):
                actions.extend(self._backward(stage, m))
        return actions

    def drain(self, stage: int, calls: int) -> list[Action]:
        """Compute actions that finish what is in flight after ``calls`` calls; then the segment is over."""
        total = calls * self.gas
        first = max(0, total - self.lag(stage))
        return [action for m in range(first, total) for action in self._backward(stage, m)]

    def _backward(self, stage: int, micro_batch: int) -> Iterator[Action]:
        yield Action(stage, Op.BACKWARD, micro_batch)
        if (micro_batch + 1) % self.gas == 0:
            yield Action(stage, Op.UPDATE, micro_batch // self.gas)


def with_communication(stages: int, actions: Sequence[Action]) -> list[Action]:
    """Adds to one stage's compute order the messages it needs: each receive just before, each send just after.

    Activations go to the next stage, gradients to the previous one; both ends number messages by
    micro-batch, so sender and receiver see one order per link and direction.
    """
    out: list[Action] = []
    for action in actions:
        s, m = action.stage, action.index
        if action.op is Op.FORWARD:
            out += [Action(s, Op.RECV_ACTIVATION, m)] if s > 0 else []
            out.append(action)
            out += [Action(s, Op.SEND_ACTIVATION, m)] if s < stages - 1 else []
        elif action.op is Op.BACKWARD:
            out += [Action(s, Op.RECV_GRAD, m)] if s < stages - 1 else []
            out.append(action)
            out += [Action(s, Op.SEND_GRAD, m)] if s > 0 else []
        else:
            out.append(action)
    return out
