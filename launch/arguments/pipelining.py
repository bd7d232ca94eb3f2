"""How the pipeline runs: the ``async_pipeline`` block, the facts of the run it is checked with, and its schedule.

All of launch/ that asks for one of the three asks here, or `Settings.block`. Imports no torch; DeepSpeed alone, for
its version.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from noflush.config import BLOCK, AsyncPipelineConfig, ConfigError
from noflush.launch.arguments.settings import Model, Ranks, Settings
from noflush.order.schedule import Schedule
from noflush.patches.deepspeed.faults import RunFacts, check_config, check_run

SWITCHED_ON = {BLOCK: {"enabled": True}}
"""The config of a run that names none."""


def asked_for(config: Mapping[str, Any]) -> str | None:
    """Name of the schedule that ``config`` asks for, right or wrong; None where noflush is not switched on.

    For what has to be filled in before the block can be checked with it.
    """
    block = config.get(BLOCK)
    if not isinstance(block, Mapping) or not block.get("enabled", True):
        return None
    return str(block.get("schedule", AsyncPipelineConfig.schedule))


def checked_block(
    config: Mapping[str, Any], ranks: Ranks, model: Model, faults: list[str]
) -> AsyncPipelineConfig | None:
    """The block of the completed ``config``; None where DeepSpeed is left as it is.

    Adds to ``faults`` what noflush refuses the run for; the block is None then too.
    """
    try:
        if check_config(config) is None:
            return None
        block, _ = check_run(config, _facts(config, ranks, model))
    except ConfigError as error:
        faults += error.faults
        return None
    return block


def schedule_of(settings: Settings) -> Schedule:
    """The schedule that the run will have, at its full batch; the flush twin's where the block is off."""
    block, stages = settings.block, settings.ranks.pipeline
    if block is None:
        return Schedule(stages, settings.gas, "1f1b_flush")
    aligned = block.eval_weights == "aligned"
    return Schedule(stages, settings.gas, block.schedule, block.weights, block.extra_at_start, aligned)


def _facts(config: Mapping[str, Any], ranks: Ranks, model: Model) -> RunFacts:
    import deepspeed

    zero = config.get("zero_optimization")
    return RunFacts(
        stages=ranks.pipeline,
        layers=max(ranks.pipeline, model.layers),
        gas=config["gradient_accumulation_steps"],
        zero_stage=int(zero.get("stage") or 0) if isinstance(zero, Mapping) else 0,
        tied_keys=("embedding",) if model.tied and ranks.pipeline > 1 else (),
        deepspeed_version=deepspeed.__version__,
        untie="pass --untie-embeddings-and-output-weights",
    )
