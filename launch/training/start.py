"""From settings to an engine: process groups, random numbers, model, optimizer, schedule."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.activation_checkpointing import checkpointing
from megatron.core import parallel_state

import noflush
from noflush.launch.arguments.settings import Ranks, Settings
from noflush.launch.gpt.pipeline import build_pipeline, parameter_groups
from noflush.launch.training.random_state import seed_everything
from noflush.launch.training.schedule import schedule_of
from noflush.patches import megatron_core


def join(ranks: Ranks) -> None:
    """Joins torch.distributed, and makes megatron-core's groups over it."""
    noflush.register()
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    backend = ranks.backend if ranks.backend in ("nccl", "gloo") and on_gpu else "nccl" if on_gpu else "gloo"
    timeout = timedelta(minutes=ranks.timeout_minutes)
    deepspeed.init_distributed(backend, timeout=timeout, verbose=False)
    parallel_state.initialize_model_parallel(
        ranks.tensor, ranks.pipeline, distributed_timeout_minutes=ranks.timeout_minutes
    )
    megatron_core.patch()
    checkpointing.configure(mpu_=parallel_state)


def leave() -> None:
    """Ends megatron-core's groups and torch.distributed."""
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def build_engine(settings: Settings) -> Any:
    """DeepSpeed's engine of the run on this rank: noflush's, unless its block is off."""
    stage = parallel_state.get_pipeline_model_parallel_rank()
    seed_everything(settings.steps.seed, stage)
    module = build_pipeline(settings)
    engine, *_ = deepspeed.initialize(
        model=module,
        model_parameters=parameter_groups(module, settings.optimizer.decay_all),
        config=settings.deepspeed,
        lr_scheduler=schedule_of(settings),
    )
    return engine
