"""The file beside DeepSpeed's in which a rank's part of what is in flight is saved, and how all ranks agree to load it.

A checkpoint without these files, of stock DeepSpeed or of a drained pipeline say, is gone on from as well: the pipeline
fills anew then.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch.distributed as dist

from noflush.stage import snapshot
from noflush.stage.checkpoint import CheckpointError

logger = logging.getLogger("noflush")


def path_of(folder: str | Path, replica: int, part: int) -> Path:
    """Where data-parallel ``replica`` of model-parallel ``part`` (DeepSpeed's ``mp_rank``) has its own."""
    return Path(folder) / f"in_flight_dp_rank_{replica:02d}_mp_rank_{part:02d}.pt"


def save(engine: Any, folder: str | Path) -> None:
    """Saves this rank's part into the checkpoint ``folder``; nothing when drained.

    Replicas hold the same weights: the first one's file has them.
    """
    path = path_of(folder, _replica(engine), _part(engine))
    if not engine.pipeline_stage.runner.calls:
        path.unlink(missing_ok=True)  # of an older checkpoint of the same name
        return
    found = snapshot.take(engine.pipeline_stage, with_versions=not _replica(engine)) | {"micro_batches": _kind(engine)}
    # What is written in the background is copied on its way there.
    engine.saves.save_own(found if engine.saves.background else snapshot.to_host(found), path)


def load(engine: Any, folder: str | Path, with_schedule: bool = True) -> bool:
    """Goes on with what the checkpoint ``folder`` has in flight; on all ranks, of a drained and restarted stage.

    ``with_schedule``: whether the learning-rate schedule was loaded too.

    Returns False where it has nothing of the kind, or what cannot be put back here (rank 0 says why): the pipeline is
    to fill anew.

    Raises:
        CheckpointError: on all ranks; some ranks' parts are missing.
    """
    stage = engine.pipeline_stage
    path = path_of(folder, _replica(engine), _part(engine))
    there = path_of(folder, 0, _part(engine))
    found = engine.checkpoint_engine.load(str(path), map_location="cpu") if path.is_file() else None
    if found is None and there.is_file():
        other = engine.checkpoint_engine.load(str(there), map_location="cpu")
        if other["replicas"] <= _replica(engine):  # it had no such replica, and is not put back anyway
            found = other
    missing = _told(None if found is not None else path.name)
    if missing and len(missing) < dist.get_world_size():
        raise CheckpointError(
            f"checkpoint {folder} is incomplete: {', '.join(sorted(missing))} missing, which hold what was in flight; "
            f"load another, or remove {path_of('', 0, 0).name.split('_dp_')[0]}_*.pt to have the pipeline fill anew"
        )
    if found is None:
        return False
    if stage.options.auto_depth and stage.schedule.extra_in_flight != snapshot.depth_of(found):
        stage.change_extra(snapshot.depth_of(found))  # the run's own choice, until it measures again
    reasons = _told(
        _why_other(found, engine) or snapshot.why_not_resumed(found, stage) or snapshot.why_not_taken(stage)
    )
    if reasons:
        _catch_up(engine, snapshot.missing_updates(found) if with_schedule else 0)
        if engine.global_rank == 0:
            logger.warning(
                "noflush: %s: %s; the pipeline fills anew, and the micro-batches that were in flight are lost to the "
                "stages that had still to learn from them", folder, reasons[0],
            )  # fmt: skip
        return False
    if _replica(engine):
        first = engine.checkpoint_engine.load(str(there), map_location="cpu")
        found["ring"]["versions"] = first["ring"]["versions"]
    snapshot.resume(stage, found)
    return True


def _kind(engine: Any) -> dict[str, Any]:
    """What of micro-batches is the run's own choice; their messages must be alike on both sides of a checkpoint."""
    return {
        "train_micro_batch_size_per_gpu": engine.train_micro_batch_size_per_gpu(),
        "precision": str(engine.get_data_types()[0]),
    }


def _why_other(found: dict[str, Any], engine: Any) -> str | None:
    here, there = _kind(engine), found["micro_batches"]
    return ", ".join(f"{key} {there[key]} is {here[key]} now" for key in here if here[key] != there[key]) or None


def _told(mine: str | None) -> list[str]:
    """What ranks have to say that say anything; on all ranks."""
    told: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(told, mine)
    return [one for one in told if one is not None]


def _catch_up(engine: Any, updates: int) -> None:
    """The learning-rate schedule goes on where the run does: as after the updates that will not be made."""
    for _ in range(updates if engine.lr_scheduler is not None else 0):
        engine.step_schedule()


def _replica(engine: Any) -> int:
    replica: int = engine.grid.get_data_parallel_rank()
    return replica


def _part(engine: Any) -> int:
    part: int = engine.grid.get_model_parallel_rank()
    return part
