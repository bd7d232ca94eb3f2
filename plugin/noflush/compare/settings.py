"""What a comparison trains and for how long, and what tells one trial from another. Pure."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from noflush.compare.contestants import Contestant
from noflush.methods.table import METHODS

Part = Literal["search", "report"]
LEAST_UPDATES = 10
"""Of the shortest run: fewer say nothing of a learning rate."""
SEARCH_SEED = 0
"""Of the search; the reported seeds count from 1."""


@dataclass(frozen=True)
class Task:
    """What is trained on what, the same for every contestant.

    Attributes:
        width, heads, sequence: of the GPT; one block a stage, or ``depth`` in all.
        batch: sequences a micro-batch.
        gas: K, micro-batches an update.
        vocabulary: ids.
        text, data: a file of text, or of token ids; both None for the standard library's source.
        digest: of the text's content.
        weight_decay: of every contestant whose own parameters do not say.
        clip: largest norm of a stage's gradients; 0 clips nothing.
    """

    width: int = 64
    heads: int = 4
    sequence: int = 64
    depth: int | None = None
    batch: int = 8
    gas: int = 1
    vocabulary: int = 256
    text: str | None = None
    data: str | None = None
    digest: str = ""
    weight_decay: float = 0.01
    clip: float = 1.0

    def __post_init__(self) -> None:
        sizes = {name: getattr(self, name) for name in ("width", "heads", "sequence", "batch", "gas")}
        for name, value in sizes.items():
            if value < 1:
                raise ValueError(f"--{name} {value}: it must be 1 or more")
        if self.width % self.heads:
            raise ValueError(f"--width {self.width} does not divide by --heads {self.heads}; give a multiple")
        if self.weight_decay < 0 or self.clip < 0:
            raise ValueError(f"--weight-decay {self.weight_decay}, --clip {self.clip}: both must be 0 or more")

    @property
    def tokens_per_update(self) -> int:
        """Of one batch of all its micro-batches."""
        return self.batch * self.gas * self.sequence

    @property
    def bound(self) -> float:
        """The loss in nats above which a run has diverged: a nat more than of a model that knows nothing."""
        return math.log(self.vocabulary) + 1

    def blocks(self, stages: int) -> int:
        """Transformer blocks at so many stages."""
        return self.depth or stages

    def params_of(self, contestant: Contestant, lr: float) -> dict[str, Any]:
        """Every hyper-parameter of a contestant's optimizer at learning rate ``lr``."""
        row = METHODS[contestant.optimizer]
        common = {"weight_decay": self.weight_decay} if "weight_decay" in row.params else {}
        return row.values({**common, **contestant.params, "lr": lr})


@dataclass(frozen=True)
class Trial:
    """One training: a contestant at P ``stages`` from ``seed`` at ``lr``, judged on a ``part`` of the held-out text."""

    contestant: Contestant
    stages: int
    seed: int
    lr: float
    updates: int
    part: Part

    def key(self, task: Task) -> str:
        """All that decides its numbers, as JSON; names do not, nor where a file lies."""
        of_task = asdict(task)
        for name in ("text", "data", "weight_decay"):
            del of_task[name]
        schedule: dict[str, str] = {"schedule": self.contestant.schedule}
        if not self.contestant.synchronous:
            schedule["weights"] = self.contestant.weights
        return json.dumps(
            {
                **of_task,
                **schedule,
                "depth": task.blocks(self.stages),
                "optimizer": self.contestant.optimizer,
                "params": task.params_of(self.contestant, self.lr),
                "stages": self.stages,
                "seed": self.seed,
                "updates": self.updates,
                "part": self.part,
            },
            sort_keys=True,
        )

    def work(self, task: Task) -> int:
        """What it costs, in passes of a micro-batch through a block."""
        return self.updates * task.gas * (task.blocks(self.stages) + 1)


@dataclass(frozen=True)
class Record:
    """What a trial found.

    Attributes:
        curve: (tokens, validation loss in nats) from 0 on, on the same few batches throughout; the last one is at the
            end of the training.
        loss: on many batches at the end; infinite if it diverged.
        seconds: it took.
        step_ms: of one update of all stages, the median.
        pass_ms: of forward and backward of a batch through all stages, the median.
        skipped: updates that a stage skipped, as its gradients were not finite.
    """

    curve: tuple[tuple[int, float], ...]
    loss: float
    seconds: float
    step_ms: float
    pass_ms: float
    skipped: int = 0
