"""What a rank prints when its run breaks: whose fault it is, where to look first, and how to go on."""

from __future__ import annotations

from noflush.failure.blame import Verdict
from noflush.launch.arguments.settings import Checkpoints
from noflush.stage.checkpoint import newest_complete


def lines(verdict: Verdict, rank: int, stage: int, world: int, iteration: int, checkpoints: Checkpoints) -> list[str]:
    """The lines, for stderr.

    Args:
        verdict: what is known of the cause.
        rank, stage, world: of this process.
        iteration: the last one it finished.
        checkpoints: where the run saves and loads.
    """
    cause = f"noflush: {verdict.sentence}"
    if verdict.accused not in (None, rank):
        cause += "; look at its log and node first"
    ends = f"noflush: stage {stage} (rank {rank} of {world}) ends after iteration {iteration}; {advice(checkpoints)}"
    return [cause, ends]


def advice(checkpoints: Checkpoints) -> str:
    """How to go on: only what is there is named."""
    for folder in (checkpoints.save, checkpoints.load):
        tag = newest_complete(folder) if folder else None
        if tag is not None:
            return f"to go on from the newest complete checkpoint, {tag}, start again with --load {folder}"
    if checkpoints.save:
        return f"no checkpoint is complete in {checkpoints.save} yet: start again as before"
    return "nothing was saved: give --save, and --save-interval, to lose less next time"
