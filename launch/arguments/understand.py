"""From a command line to a run's settings: Megatron-LM's and Megatron-DeepSpeed's names made one, and checked across.

Reads no file but the DeepSpeed config, and where the checkpoint to load stands; what the data and tokenizer files hold
is checked by `files`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from noflush.launch.arguments.deepspeed_config import complete, read_config
from noflush.launch.arguments.of_files import read_checkpoints, read_data, read_logs, read_start, read_tokens
from noflush.launch.arguments.of_model import read_model, read_ranks
from noflush.launch.arguments.of_stages import read_layers_by_stage
from noflush.launch.arguments.of_training import read_batch, read_steps
from noflush.launch.arguments.parser import ArgumentsError, read
from noflush.launch.arguments.pipelining import checked_block
from noflush.launch.arguments.settings import Settings


def understand(argv: list[str], world: int) -> tuple[Settings, dict[str, list[str]]]:
    """The settings that ``argv`` stands for on ``world`` ranks, and the options without meaning, by kind.

    Raises ArgumentsError listing every fault.
    """
    of = read(argv)
    of.check()
    config = read_config(of.deepspeed_config, of.faults)
    ranks = read_ranks(of, world)
    model = read_model(of, ranks)
    layers_by_stage = read_layers_by_stage(of, model.layers, ranks)
    batch = read_batch(of, config, ranks)
    checkpoints = read_checkpoints(of)
    steps, optimizer = read_steps(of, batch, model, ranks, read_start(of, checkpoints))
    precision: Literal["fp32", "bf16", "fp16"] = "fp16" if of.fp16 else "bf16" if of.bf16 else "fp32"
    if of.fp16 and of.bf16:
        of.faults.append("--fp16 and --bf16: give one")
    if not of.named.keys() & {"fp16", "bf16"}:
        precision = _precision_of(config)
    of.note_without(precision != "fp32", "--fp16 or --bf16", "fp16_lm_cross_entropy")
    deepspeed = complete(of, config, ranks, batch, optimizer, precision)
    block = checked_block(deepspeed, ranks, model, of.faults)
    settings = Settings(
        model=model,
        ranks=ranks,
        layers_by_stage=layers_by_stage,
        batch=batch,
        steps=steps,
        optimizer=optimizer,
        data=read_data(of),
        tokens=read_tokens(of),
        checkpoints=checkpoints,
        logs=read_logs(of),
        precision=precision,
        deepspeed=deepspeed,
        block=block,
        **of.taken("settings"),
        notes=tuple(of.notes),
    )
    if of.faults:
        raise ArgumentsError(of.faults)
    return settings, of.without_meaning


def _precision_of(config: Mapping[str, Any]) -> Any:
    for name in ("fp16", "bf16"):
        section = config.get(name, {})
        if isinstance(section, Mapping) and section.get("enabled") is True:
            return name
    return "fp32"
