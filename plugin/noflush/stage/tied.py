"""Weights that several stages use, without a flush: the first of them owns such a weight and computes its updates.

The owner keeps master and moments and makes the versions; the other stages only read. Nothing is sent apart: a new
version goes down the pipeline with the activations of the first micro-batch that uses it, and a reader's gradient of a
batch goes up with that batch's last one; the stages in between hand both on. So a reader computes F(m) and B(m) with
the very version that the owner computes F(m) with, a gradient is there when the owner's own batch is, and the order
that was proven free of deadlock is the order. Norm, clipping and reduction over replicas are the owner's.

A drain, and an evaluation, give readers the owner's newest weights, by a broadcast: nothing is in flight then, or
nothing that could wait for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import Parameter

from noflush.order.posting import kept_posted
from noflush.order.schedule import Schedule
from noflush.stage.groups import without_splits
from noflush.stage.messages import TensorSpec
from noflush.stage.versions import point


@dataclass(frozen=True)
class Tie:
    """One weight that several stages use; the same on every rank.

    Attributes:
        name: for people.
        stages: that use it, rising; the first one owns it.
        shape, dtype: of the weight.
        sums: in what readers add up a batch's gradients and send them; None: in ``dtype``.
    """

    name: str
    stages: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    sums: torch.dtype | None = None

    @property
    def owner(self) -> int:
        """The stage that updates it."""
        return self.stages[0]

    def crosses(self, link: int) -> bool:
        """Whether it passes from stage ``link`` to the next."""
        return self.owner <= link < self.stages[-1]

    @property
    def spec(self) -> TensorSpec:
        """As it travels down."""
        return TensorSpec(self.shape, self.dtype, False)

    @property
    def gradient_spec(self) -> TensorSpec:
        """Of a batch's gradient, which travels up."""
        return TensorSpec(self.shape, self.sums or self.dtype, False)


def phase(schedule: Schedule, tie: Tie) -> int:
    """Which micro-batches of a batch bring a new version: those m with m % K equal to this."""
    first = next(m for m in range(1, 3 * (schedule.lag(0) + schedule.gas) + 2) if schedule.version(tie.owner, m))
    return first % schedule.gas


class Carriage:
    """On which activation messages versions travel; every stage works it out alike. Pure.

    By a message's number and K alone: a receive may be posted while the micro-batches before it are still to be
    drained, and the next segment then numbers them anew. A message that has nothing new to bring brings what there is.
    After K has changed, messages whose receives some stage may have posted before keep to the old K; no version is new
    that early.
    """

    def __init__(self, ties: Sequence[Tie]) -> None:
        self._ties = tuple(ties)
        self._rules: list[tuple[int, int, tuple[int, ...]]] = []  # (from which message on, K, each tie's first)
        self._posted = self._kept = 0

    def follow(self, schedule: Schedule, first_message: int) -> None:
        """From here on ``schedule``, whose segment begins with message number ``first_message``."""
        gas = schedule.gas
        rule = gas, tuple((first_message + phase(schedule, tie)) % gas for tie in self._ties)
        if not self._rules or self._rules[-1][1:] != rule:
            self._rules.append((self._posted, *rule))
        self._kept = max((kept_posted(schedule, link) for link in range(schedule.stages - 1)), default=0)

    def sent(self, messages: int) -> None:
        """So many messages have been sent in all: receives beyond them may be posted already."""
        self._posted = max(self._posted, messages + self._kept)

    def snapshot(self) -> dict[str, Any]:
        """What `resume` takes."""
        return {"rules": list(self._rules), "posted": self._posted, "kept": self._kept}

    def resume(self, snapshot: dict[str, Any]) -> None:
        """Puts a `snapshot` back."""
        self._rules = [(first, gas, tuple(firsts)) for first, gas, firsts in snapshot["rules"]]
        self._posted, self._kept = snapshot["posted"], snapshot["kept"]

    def carries(self, message: int, tie: int) -> bool:
        """Whether message number ``message`` brings the weight of tie number ``tie``."""
        _, gas, firsts = next(rule for rule in reversed(self._rules) if rule[0] <= message)
        return message % gas == firsts[tie]


class TiedWeights:
    """The tied weights that concern one stage.

    Args:
        ties: of the whole pipeline.
        stage: this one.
        params: its own, by number of the tie.
        pipelines: global ranks of every pipeline's stages; all ranks make theirs at the same time.
        rank: this process.
    """

    def __init__(
        self, ties: Sequence[Tie], stage: int, params: Mapping[int, Parameter], pipelines: Sequence[Sequence[int]],
        rank: int,
    ) -> None:  # fmt: skip
        self.ties = tuple(ties)
        self.carriage = Carriage(ties)
        self._stage = stage
        self._params = dict(params)
        self._newest: dict[int, Tensor] = {}  # what came down last, of what this stage reads or hands on
        self._in_flight: dict[int, dict[int, Tensor]] = {}  # of each micro-batch what its forward read
        self._sums: dict[int, Tensor] = {}  # of this batch's gradients, of what this stage reads
        self._from_below: dict[int, Tensor] = {}
        self._groups: dict[int, Any] = {}
        self._sources: dict[int, int] = {}
        with without_splits():
            for number, tie in enumerate(self.ties):
                for ranks in pipelines:
                    users = [ranks[s] for s in tie.stages]
                    group = dist.new_group(users)
                    if rank in users:
                        self._groups[number], self._sources[number] = group, users[0]
        self.refresh()

    def reads(self, number: int) -> bool:
        """Whether this stage reads a tie's weight that another owns."""
        return number in self._params and self.ties[number].owner != self._stage

    # ---- down: versions ------------------------------------------------------------------------------------

    def specs_down(self, message: int) -> list[TensorSpec]:
        """Of what activation message number ``message`` brings this stage besides."""
        return [self.ties[i].spec for i in self._carried(self._stage - 1, message)]

    def to_send_down(self, message: int) -> list[Tensor]:
        """What this stage sends on with an activation; the owner's parameters are bound to what its forward used."""
        found = []
        for i in self._carried(self._stage, message):
            # A copy: the slot may be written anew before the message is gone.
            owns = self.ties[i].owner == self._stage
            found.append(self._params[i].detach().clone() if owns else self._newest[i])
        return found

    def take_down(self, message: int, tensors: Sequence[Tensor]) -> None:
        """What came with an activation."""
        for i, tensor in zip(self._carried(self._stage - 1, message), tensors, strict=True):
            self._newest[i] = tensor

    def _carried(self, link: int, message: int) -> list[int]:
        return [i for i, tie in enumerate(self.ties) if tie.crosses(link) and self.carriage.carries(message, i)]

    # ---- at work -------------------------------------------------------------------------------------------

    def bind(self, micro_batch: int) -> None:
        """For a forward: points the parameters at what came last, and keeps it for the backward."""
        self._in_flight[micro_batch] = {i: self._newest[i] for i in self._params if self.reads(i)}
        self.bind_again(micro_batch)

    def bind_again(self, micro_batch: int) -> None:
        """For a backward: points the parameters at what its forward read."""
        for i, tensor in self._in_flight[micro_batch].items():
            point(self._params[i], tensor)

    def release(self, micro_batch: int) -> None:
        """The backward is done: takes the gradients that it left."""
        for i in self._in_flight.pop(micro_batch):
            gradient, self._params[i].grad = self._params[i].grad, None
            if gradient is not None:
                gradient = gradient.to(self.ties[i].gradient_spec.dtype)
                self._sums[i] = self._sums[i].add_(gradient) if i in self._sums else gradient

    # ---- up: gradients -------------------------------------------------------------------------------------

    def specs_up(self) -> list[TensorSpec]:
        """Of what a batch's last gradient message brings this stage besides."""
        return [tie.gradient_spec for tie in self.ties if tie.crosses(self._stage)]

    def take_up(self, tensors: Sequence[Tensor]) -> None:
        """What came with a batch's last gradient."""
        numbers = [i for i, tie in enumerate(self.ties) if tie.crosses(self._stage)]
        self._from_below = dict(zip(numbers, tensors, strict=True))

    def to_send_up(self) -> list[Tensor]:
        """What goes up with a batch's last gradient: that from below and this stage's own."""
        found = []
        for i, tie in enumerate(self.ties):
            if not tie.crosses(self._stage - 1):
                continue
            parts = [sums.pop(i) for sums in (self._from_below, self._sums) if i in sums]
            if not parts:
                parts = [torch.zeros_like(self._params[i], dtype=tie.gradient_spec.dtype)]
            found.append(parts[0] if len(parts) == 1 else parts[0] + parts[1])
        return found

    def owed(self) -> Iterator[tuple[Parameter, Tensor]]:
        """What readers add to the gradients of weights that this stage owns, once a batch is done."""
        for i, tie in enumerate(self.ties):
            if tie.owner == self._stage and i in self._from_below:
                yield self._params[i], self._from_below.pop(i)

    # ---- for checkpoints -----------------------------------------------------------------------------------

    def snapshot(self) -> dict[str, Any]:
        """What `resume` takes."""
        return {
            "newest": dict(self._newest),
            "in_flight": {m: dict(read) for m, read in self._in_flight.items()},
            "sums": dict(self._sums),
            "carriage": self.carriage.snapshot(),
        }

    def resume(self, snapshot: dict[str, Any], device: torch.device) -> None:
        """Puts a `snapshot` back, after `refresh`; ``device``: the stage's."""
        self._newest = {i: t.to(device) for i, t in snapshot["newest"].items()}
        self._sums = {i: t.to(device) for i, t in snapshot["sums"].items()}
        self._in_flight = {m: {i: t.to(device) for i, t in read.items()} for m, read in snapshot["in_flight"].items()}
        self.carriage.resume(snapshot["carriage"])

    # ---- between calls -------------------------------------------------------------------------------------

    @torch.no_grad()
    def refresh(self) -> None:
        """On a drained pipeline: every reader gets the owner's weights. Collective."""
        for i, param in self._params.items():
            if self.reads(i):
                point(param, torch.empty_like(param))
            dist.broadcast(param.data, self._sources[i], group=self._groups[i])
            self._newest[i] = param.data

    @contextmanager
    def showing(self) -> Iterator[None]:
        """Within, readers' parameters are the owner's as they are now; micro-batches stay in flight. Collective."""
        before = {i: param.data for i, param in self._params.items() if self.reads(i)}
        with torch.no_grad():
            for i, param in self._params.items():
                if self.reads(i):
                    point(param, torch.empty_like(param))
                dist.broadcast(param.data, self._sources[i], group=self._groups[i])
        try:
            yield
        finally:
            for i, data in before.items():
                point(self._params[i], data)
