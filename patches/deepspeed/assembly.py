"""Makes an engine's stage: what DeepSpeed's engine knows, handed to parts that know nothing of it."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from noflush.config import AsyncPipelineConfig, ConfigError
from noflush.kernels.choice import choose
from noflush.methods.optimizer import DelayAwareOptimizer
from noflush.order.schedule import Schedule
from noflush.order.wire_format import Wire
from noflush.patches.deepspeed.lost_stages import ties_of_group
from noflush.patches.deepspeed.ties import Ties, ties_of
from noflush.patches.deepspeed.update import TiedFirst, WrappedUpdate
from noflush.patches.deepspeed.weights import weights_of
from noflush.patches.deepspeed.work import EngineWork
from noflush.stage.alone import is_alone
from noflush.stage.ranks import Ranks
from noflush.stage.slices import Slices
from noflush.stage.stage import Stage
from noflush.stage.update import FusedUpdate, StageUpdate, TorchUpdate
from noflush.stage.weights import PlainWeights, Weights
from noflush.stage.work import StageOptions


def make_stage(
    engine: Any, block: AsyncPipelineConfig, schedule: Schedule, slices: Slices, losses: int
) -> tuple[Stage, str]:
    """The stage of a constructed ``engine``, and a line about how it updates.

    Args:
        slices: over which ranks gradient norms are taken.
        losses: how many a batch has.

    Raises:
        KernelError, ConfigError: a kernel that is no use.
        ScheduleError: the schedule could deadlock.
    """
    weights = weights_of(engine.optimizer, engine.mpu.get_data_parallel_group(), slices)
    update, named = _make_update(engine, block, weights, schedule.flushes)
    pipe = engine.grid.get_pipe_parallel_group()
    tied: Ties = ([], {})
    if is_alone() and block.groups is not None:
        tied = ties_of_group(block.groups.timeout_s), {}
    elif schedule.stages > 1 and not schedule.flushes:
        tied = ties_of(engine.module, pipe, engine.get_data_types()[1])
    if tied[0] and isinstance(update, WrappedUpdate):
        raise ConfigError(
            [
                f"tied layers {', '.join(tie.name for tie in tied[0])}: without a flush their owner adds up the "
                f"gradients, which {type(engine.optimizer).__name__} around {type(weights.rule).__name__} keeps to "
                "itself; name one of noflush's optimizers in async_pipeline.optimizer, untie them, or set the schedule "
                "to '1f1b_flush'"
            ]
        )
    pipelines = engine.grid._topo.get_axis_comm_lists("pipe")
    ranks = Ranks(
        pipelines if schedule.stages > 1 else [[rank] for rank in range(dist.get_world_size())],
        engine.global_rank,
        engine.dp_world_size,
        pipe,
        engine.grid.get_data_parallel_rank(),
    )
    options = StageOptions(
        trace_dir=block.trace_dir,
        peer_timeout_s=block.peer_timeout_s,
        max_skipped_updates=block.max_skipped_updates,
        stop_dir=block.stop_dir,
        losses=losses,
        one_norm=engine.has_one_norm,
        late_norm=block.clip == "lagged_global" and not schedule.flushes,
        wire=Wire.read(block.wire),
        auto_depth=block.extra_in_flight == "auto",
        reroute=block.groups is not None and block.groups.reroute,
    )
    scaler = (lambda: engine.optimizer.loss_scaler) if engine.fp16_enabled() else None
    device = torch.device(engine.device)
    return Stage(schedule, ranks, device, weights, update, EngineWork(engine), options, scaler, tied), named


def _make_update(engine: Any, block: AsyncPipelineConfig, weights: Weights, flushes: bool) -> tuple[StageUpdate, str]:
    update, named = _update_of(engine, block, weights)
    if engine.module.tied_comms and flushes:
        update = TiedFirst(update, engine, weights.slices.waits)
    return update, named


def _update_of(engine: Any, block: AsyncPipelineConfig, weights: Weights) -> tuple[StageUpdate, str]:
    rule, max_norm = weights.rule, engine.gradient_clipping()
    if not isinstance(rule, DelayAwareOptimizer):
        if block.kernel in ("triton", "compile"):
            raise ConfigError(
                [
                    f"async_pipeline.kernel is {block.kernel!r}, but the optimizer is a {type(rule).__name__}, which "
                    "updates by itself: leave kernel out, or pass one of noflush's optimizers"
                ]
            )
        named = f"{type(rule).__name__} through DeepSpeed"
        if isinstance(weights, PlainWeights):
            return TorchUpdate(weights, max_norm, engine._exec_reduce_grads if engine.is_data_parallel else None), named
        return WrappedUpdate(weights, engine), named
    count = sum(group.numel for group in weights.flat_groups())
    kernel, reason = choose(block.kernel, torch.device(engine.device), count)
    predivide = engine.gradient_predivide_factor() if engine.postscale_gradients() else float(engine.dp_world_size)
    update = FusedUpdate(weights, kernel, max_norm, engine.communication_data_type, predivide)
    return update, f"kernel {kernel.name} ({'; '.join(filter(None, (reason, update.tuned)))})"
