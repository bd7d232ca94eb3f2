"""Puts an engine's parts together: what DeepSpeed's engine knows, handed to parts that know nothing of it."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from noflush.config import AsyncPipelineConfig, ConfigError
from noflush.failure import last_words
from noflush.kernels.choice import choose
from noflush.methods.method import Place
from noflush.methods.optimizer import DelayAwareOptimizer
from noflush.order.posting import Posting
from noflush.order.schedule import Schedule
from noflush.patches.deepspeed.update import WrappedUpdate
from noflush.stage.channels import Neighbours, connect
from noflush.stage.groups import without_splits
from noflush.stage.intake import Intake
from noflush.stage.payloads import TensorSpec
from noflush.stage.peer_watch import PeerWatch
from noflush.stage.prefetch import Prefetch
from noflush.stage.runner import StageRunner
from noflush.stage.update import FusedUpdate, StageUpdate, TorchUpdate
from noflush.stage.versions import WeightRing
from noflush.stage.weights import PlainWeights, Weights
from noflush.watch.trace import Recorder


def posting_of(backend: str) -> Posting:
    """When receives are posted over torch.distributed's ``backend``."""
    return "ahead" if backend == "gloo" else "in_step"


def make_runner(
    engine: Any,
    block: AsyncPipelineConfig,
    schedule: Schedule,
    weights: Weights,
    recorder: Recorder,
    report_words: int,
) -> StageRunner:
    """The stage's runner, with its weight ring and its channels."""
    # What no optimizer updates has one version for ever, and stays where it is.
    stash = schedule.weights != "latest"
    device = torch.device(engine.device)
    versions = schedule.versions_alive(engine.stage_id)
    ring = WeightRing(weights.layouts, versions, stash, home=weights.home, device=device)
    _attend(engine)
    neighbours = connect(
        pipelines=engine.grid._topo.get_axis_comm_lists("pipe") if schedule.stages > 1 else [],
        rank=engine.global_rank,
        device=device,
        timeout_s=block.peer_timeout_s,
    )
    return StageRunner(
        schedule,
        engine.stage_id,
        ring,
        neighbours,
        work=engine,
        recorder=recorder,
        report=TensorSpec((report_words,), torch.float64, False),
        posting=posting_of(dist.get_backend()),
    )


def make_watch(neighbours: Neighbours, backend: str) -> PeerWatch:
    """The watch over ``neighbours``, begun; nobody is watched on gloo, whose waits notice by themselves."""
    watch = PeerWatch(() if backend == "gloo" else neighbours.watched, _mark if torch.cuda.is_available() else None)
    watch.start()
    return watch


def _mark() -> Any:
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record()
    return event


def _attend(engine: Any) -> None:
    """From now on this rank leaves its reason when it ends, under the name that its stage gives it."""
    stages = {
        rank: stage
        for pipeline in engine.grid._topo.get_axis_comm_lists("pipe") or [[engine.global_rank]]
        for stage, rank in enumerate(pipeline)
    }

    def name(rank: int) -> str:
        return f"stage {stages[rank]} (rank {rank})" if rank in stages else f"rank {rank}"

    last_words.attend(engine.global_rank, dist.get_world_size(), name)


def make_intake(engine: Any, block: AsyncPipelineConfig, pull: Callable[[], Any], neighbours: Neighbours) -> Intake:
    """The rank's intake; ``pull`` gives DeepSpeed's next micro-batch."""
    replicas = None
    if engine.dp_world_size > 1:
        readers = [pipeline[0] for pipeline in engine.grid._topo.get_axis_comm_lists("pipe")]
        if engine.num_stages == 1:
            readers = list(range(dist.get_world_size()))
        with without_splits():
            group = dist.new_group(readers, timeout=timedelta(seconds=block.peer_timeout_s), backend="gloo")
        replicas = group if engine.is_first_stage() else None
    reads = engine.is_first_stage() or engine.is_last_stage()
    return Intake(
        engine.micro_batches,
        reads,
        pull,
        Prefetch(torch.device(engine.device), engine.is_first_stage(), engine.is_last_stage()),
        neighbours.control_in,
        neighbours.control_out,
        replicas,
    )


def make_update(
    engine: Any, block: AsyncPipelineConfig, schedule: Schedule, weights: Weights, ring: WeightRing
) -> tuple[StageUpdate, str]:
    """How the stage updates, and a line about it. Raises KernelError or ConfigError for a kernel that is no use."""
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
            reduce = engine._exec_reduce_grads if engine.is_data_parallel else None
            return TorchUpdate(weights, max_norm, reduce), named
        return WrappedUpdate(weights, engine), named
    rule.set_stage(Place(engine.stage_id, engine.num_stages, schedule.mean_delay(engine.stage_id)))
    count = sum(m.numel() for m in weights.masters(ring.newest_flats))
    kernel, reason = choose(block.kernel, torch.device(engine.device), count)
    predivide = engine.gradient_predivide_factor() if engine.postscale_gradients() else float(engine.dp_world_size)
    update = FusedUpdate(weights, kernel, max_norm, engine.communication_data_type, predivide)
    return update, f"kernel {kernel.name} ({'; '.join(filter(None, (reason, update.tuned)))})"
