"""From settings to an engine: process groups, random numbers, model, optimizer, schedule."""

from __future__ import annotations

import os
from datetime import timedelta
from functools import partial
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.activation_checkpointing import checkpointing
from megatron.core import parallel_state
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import PrefixStore

import noflush
from noflush.failure.last_words import attend
from noflush.launch.arguments.settings import Ranks, Settings
from noflush.launch.gpt.pipeline import build_pipeline, parameter_groups
from noflush.launch.training.devices import on_gpu
from noflush.launch.training.learning_rate import rates_of
from noflush.launch.training.meeting import meet
from noflush.launch.training.random_state import seed_everything
from noflush.patches.megatron_core import dropout as megatron_core
from noflush.stage.alone import is_alone
from noflush.stage.groups import without_splits


def meet_others(ranks: Ranks) -> Any:
    """Waits for all ranks at the store, which it returns; raises MeetingError. A single process takes any free port."""
    agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if ranks.world == 1 and not agent:
        alone = TCPStore("127.0.0.1", 0, 1, is_master=True, wait_for_workers=False, multi_tenant=True)
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(alone.port))
        return alone
    split = f"tensor {ranks.tensor} x pipeline {ranks.pipeline} x data {ranks.data}"
    return meet(int(os.environ["RANK"]), ranks.world, os.environ, 60.0 * ranks.timeout_minutes, split)


def _join_again(ranks: Ranks, store: Any, gpu: bool, timeout: timedelta) -> None:
    """As DeepSpeed joins, after torchrun has started the ranks again: through a store of this attempt's own.

    With ``--master-port`` torch (2.13) keeps its store, in which the addresses of processes stand that are gone.
    """
    torch.distributed.init_process_group(
        "nccl" if gpu else "gloo",
        store=PrefixStore("ranks", store),
        rank=int(os.environ["RANK"]),
        world_size=ranks.world,
        timeout=timeout,
        device_id=torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpu else None,
    )


def join(ranks: Ranks, store: Any = None) -> None:
    """Joins torch.distributed, and makes megatron-core's groups over it; ``store`` takes ranks' last words."""
    noflush.register()
    gpu = on_gpu(os.environ)
    if gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    timeout = timedelta(minutes=ranks.timeout_minutes)
    # DeepSpeed makes groups without a timeout of their own: torch's default is half an hour.
    torch.distributed.distributed_c10d.default_pg_timeout = timeout
    attend(int(os.environ["RANK"]), 1 if is_alone() else ranks.world, partial(rank_name, ranks), store)
    if store is not None and int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")):
        _join_again(ranks, store, gpu, timeout)
    deepspeed.init_distributed("nccl" if gpu else "gloo", timeout=timeout, verbose=False)
    with without_splits():
        parallel_state.initialize_model_parallel(
            ranks.tensor, ranks.pipeline, distributed_timeout_minutes=ranks.timeout_minutes
        )
    if gpu and ranks.tensor > 1:
        # NCCL connects a group when it is first used, and no call should wait for that.
        torch.distributed.all_reduce(
            torch.zeros(1, device="cuda"), group=parallel_state.get_tensor_model_parallel_group()
        )
    megatron_core.patch()
    checkpointing.configure(mpu_=parallel_state)


def stage_of(ranks: Ranks, rank: int) -> int:
    """The pipeline stage of a rank: Megatron's order is tensor, then data, then pipeline."""
    return rank // (ranks.data * ranks.tensor)


def rank_name(ranks: Ranks, rank: int) -> str:
    """What a rank is called in messages."""
    return f"stage {stage_of(ranks, rank)} (rank {rank})"


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
        lr_scheduler=rates_of(settings),
    )
    return engine
