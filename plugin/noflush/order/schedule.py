"""A pipeline's plan of work, and every question about its lags, delays and weight versions.

Pure. `one_f_one_b` makes each stage's order of compute out of it, `posting` adds when receives are posted.

Words: ``stage`` s of ``stages`` P; ``gas`` K micro-batches an optimizer update; ``lag`` L, how many more
forwards than backwards a stage has done in the steady state. A *segment* is the time from a full pipeline
start to a drain; micro-batches, updates and calls are counted from the start of the segment here, and the
runner adds the segment's offset.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from noflush.order.policies import POLICIES, Policy, PolicyName, ceil_div

ScheduleName = Literal["1f1b_no_flush", "1f1b_flush"]


MOST_IN_FLIGHT = 4096
"""Largest ``extra_in_flight``; deeper than any link needs, and its delay no training survives."""
MOST_PASSES = 500_000
"""Passes of a micro-batch through a stage that are proven before the first step, seconds of work."""


@dataclass(frozen=True)
class Schedule:
    """A pipeline's whole plan of work; every question about order, lag or version is answered here.

    Attributes:
        stages: P, number of pipeline stages, at least 1.
        gas: K, micro-batches an optimizer update (DeepSpeed's gradient_accumulation_steps), at least 1.
        name: ``1f1b_no_flush`` or its synchronous twin ``1f1b_flush``.
        weights: name of the policy in `policies.POLICIES`: which version a forward uses, and what its backward sees.
            The twin has one version and no delay whatever is said here.
        extra_in_flight: e, micro-batches in flight at stage 0 beyond P; tapers to none at the last stage.
        aligned: whether every stage keeps the version with the number of stage 0's newest, so that between calls the
            whole model can be evaluated at one version.

    Raises:
        ValueError: a value out of range, a combination that cannot work, or an order too long to be proven.
    """

    stages: int
    gas: int
    name: ScheduleName = "1f1b_no_flush"
    weights: PolicyName = "stash"
    extra_in_flight: int = 0
    aligned: bool = False

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
        if self.aligned and self.backward_sees_live_weights:
            raise ValueError(
                f"weights {self.weights!r} with eval_weights 'aligned': a stage keeps its newest weights alone, and "
                "none as old as stage 0's; use weights 'stash', or eval_weights 'newest'"
            )
        if not self.flushes and (fault := self.policy.fault(self.lag(0), self.gas)):
            raise ValueError(f"weights {self.weights!r} with {fault}")

    @property
    def flushes(self) -> bool:
        """True for the synchronous twin, which drains in every call."""
        return self.name == "1f1b_flush"

    @property
    def policy(self) -> Policy:
        """What ``weights`` names."""
        return POLICIES[self.weights]

    @property
    def backward_sees_live_weights(self) -> bool:
        """Whether weights may move between a micro-batch's forward and its backward."""
        return self.policy.live and not self.flushes

    @property
    def calls_to_prove(self) -> int:
        """Calls after which stage 0 has held as many weight versions as it ever will, twice over."""
        return 2 * ceil_div(self.lag(0), self.gas) + 2

    @property
    def calls_until_alike(self) -> int:
        """Calls that fill the pipeline at every stage, and two more that are alike: what holds for them repeats."""
        return ceil_div(self.lag(0), self.gas) + 2

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
        return self.policy.version(micro_batch, self.lag(stage), self.gas)

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
        needed = 1 if self.flushes else self.policy.slots(self.lag(stage), self.gas)
        # By so many updates it is ahead of stage 0 between calls.
        ahead = self.loss_lag(0) - self.loss_lag(stage)
        return max(needed, ahead + 1) if self.aligned else needed

    def aligned_version(self, calls: int) -> int:
        """The newest version that every stage has made after ``calls`` calls: stage 0's newest."""
        return max(0, calls - self.loss_lag(0))

    def loss_lag(self, stage: int) -> int:
        """Calls after which this stage learns the loss of a batch (it travels back with the gradients)."""
        return ceil_div(self.lag(stage), self.gas)
