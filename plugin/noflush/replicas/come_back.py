"""How a stage that has died comes back to its pipeline, which goes on meanwhile through another group's (`rerouting`).

Its new process (``python -m noflush.rejoin``) finds the group where the old one met its world, asks the stage before
for the stand-in, and that for the stage's state. Once it has that, and before one of the next calls, the stage before
says from which micro-batch on they are this stage's again.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from torch import Tensor
from torch.distributed import DistError, TCPStore  # type: ignore[attr-defined]

from noflush.replicas.door import KNOCK_S, PeerLine, Refused, knock
from noflush.replicas.rerouting import BEGIN, COME, READY
from noflush.replicas.transport import State
from noflush.stage.stage import Stage

_KEY = "noflush/group"
_AGAIN_S = 0.5


def announce(group: dict[str, Any]) -> None:
    """Leaves ``group`` where the ranks of its world met, for a stage that comes back; nothing where that is unknown."""
    store = _meeting_store(30.0)
    if store is not None:
        store.set(_KEY, json.dumps(group))


def find_group(seconds: float) -> dict[str, Any]:
    """What `announce` left. Raises ConnectionError."""
    try:
        store = _meeting_store(seconds)
        if store is not None and store.check([_KEY]):
            found: dict[str, Any] = json.loads(store.get(_KEY))
            return found
        why = "nothing is announced there" if store is not None else "MASTER_ADDR and MASTER_PORT are not set"
    except (DistError, RuntimeError) as error:
        why = str(error).splitlines()[0]
    raise ConnectionError(
        f"this rank cannot come back to its group, where ranks met, at {os.environ.get('MASTER_ADDR', '')}:"
        f"{os.environ.get('MASTER_PORT', '')}: {why}. Start it with the RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT "
        "of the one that died, while the group trains with async_pipeline.replicas.reroute"
    )


def _meeting_store(seconds: float) -> TCPStore | None:
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    if not host or not port:
        return None
    return TCPStore(host, int(port), is_master=False, wait_for_workers=False, timeout=timedelta(seconds=seconds))


class ComeBack:
    """Of one stage, in its new process.

    Args:
        stage: that has been built alone (`stage.alone`).
        key: of its group.
        doors: where the group's stages are asked.
        patience_s: how long it tries.

    Attributes:
        trained: samples that the group has trained on, once the stage has begun.
    """

    def __init__(self, stage: Stage, key: str, doors: Sequence[str], patience_s: float) -> None:
        self._stage, self._key, self._doors, self._patience_s = stage, key, doors, patience_s
        self._expected, self._begun = threading.Event(), threading.Event()
        self._first = self._calls = self.trained = 0
        self._line: PeerLine | None = None

    def ask(self) -> State:
        """The state of who stands in for this stage, taken between two of his updates.

        Raises ConnectionError where the group does not know that the stage is lost, or nobody answers.
        """
        deadline = time.monotonic() + self._patience_s
        question = {"kind": "come back", "key": self._key, "stage": self._stage.stage}
        while True:
            try:
                return self._ask(question)
            except (Refused, OSError) as why:
                if self._line is not None:
                    self._line.close()  # else this stage would be expected still
                    self._line = None
                self._expected.clear()
                if time.monotonic() > deadline:
                    raise ConnectionError(
                        f"stage {self._stage.stage} could not come back to its group in {self._patience_s:g} s: {why}"
                    ) from why
                time.sleep(_AGAIN_S)

    def _ask(self, question: dict[str, Any]) -> State:
        above = self._stage.runner.neighbours.above
        assert above is not None
        line, (_, words) = knock(self._doors[self._stage.stage - 1], question, KNOCK_S)

        def received(kind: str, number: int, tensors: Sequence[Tensor], words: Sequence[int]) -> None:
            if kind == COME:
                self._expected.set()
            elif kind == BEGIN:
                self._first, (self._calls, self.trained) = number, words
                above.expect(number)
                self._begun.set()
            else:
                above.bring(kind, number, tensors, words)

        line.use(received, above.look)
        line.begin()
        self._line = line
        if not self._expected.wait(self._patience_s):
            raise TimeoutError(f"the stage before made no call in {self._patience_s:g} s")
        return knock(words["stand-in"], {"kind": "state"}, self._patience_s)[1]

    def begin(self, specs: Sequence[list[int]]) -> int:
        """Takes the stage's work up, its state being there; returns how many calls the pipeline has made.

        Args:
            specs: of the activations that come and go.

        Raises ConnectionError.
        """
        stage, links, line = self._stage, self._stage.runner.neighbours, self._line
        assert links.above is not None
        assert line is not None
        line.send(READY, 0)
        if not self._begun.wait(self._patience_s):
            raise ConnectionError(
                f"stage {stage.stage} was given no micro-batch to begin with in {self._patience_s:g} s"
            )
        links.above.add_line(self._first, line)
        if (below := links.below) is not None:
            words = {"kind": "stand-in", "key": self._key, "stage": stage.stage, "first": self._first, "spec": specs[1]}
            try:
                down, _ = knock(self._doors[stage.stage + 1], words, KNOCK_S)
            except (Refused, OSError) as why:
                raise ConnectionError(f"stage {stage.stage} does not reach the next stage of its group: {why}") from why
            down.use(below.bring, below.look)
            down.begin()
            below.expect(self._first)
            below.add_line(self._first, down)
        self._stand(specs)
        return self._calls

    def _stand(self, specs: Sequence[list[int]]) -> None:
        stage, runner, calls = self._stage, self._stage.runner, self._calls
        stage.restart(calls, 0)
        runner.stand_at(
            {
                "calls": 0,
                "first_micro_batch": calls * stage.schedule.gas,
                "first_version": calls,
                "first_message": self._first,
                "batches_finished": calls,
                "agreed": True,
                "specs": (*specs, None)[:2],
            }
        )
        stage.tied.carriage.follow(stage.schedule, self._first)
        for inbox in (runner.neighbours.activations_in, runner.neighbours.gradients_in):
            if inbox is not None:
                inbox.renumber(self._first)
