"""Learning rate and weight decay, by megatron-core's own scheduler, which counts samples."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from noflush.launch.arguments.settings import Settings


def rates_of(settings: Settings) -> Callable[[Any], OptimizerParamScheduler]:
    """What makes the scheduler of a stage's optimizer, once that is there."""
    optimizer = settings.optimizer
    start, end = optimizer.weight_decay

    def make(built: Any) -> OptimizerParamScheduler:
        return OptimizerParamScheduler(
            built,
            init_lr=optimizer.lr_init,
            max_lr=optimizer.lr,
            min_lr=optimizer.min_lr,
            lr_warmup_steps=optimizer.warmup_samples,
            lr_decay_steps=optimizer.decay_samples,
            lr_decay_style=optimizer.decay_style,
            start_wd=start,
            end_wd=end,
            # It must be a checkpoint's. Where nothing increases it is no reason to refuse another --train-iters.
            wd_incr_steps=optimizer.decay_samples if start == end else settings.steps.samples,
            wd_incr_style=optimizer.weight_decay_style,
            use_checkpoint_opt_param_scheduler=optimizer.rates_of_checkpoint,
            override_opt_param_scheduler=optimizer.rates_of_arguments,
            wsd_decay_steps=optimizer.wsd_samples,
            lr_wsd_decay_style=optimizer.wsd_style,
        )

    return make
