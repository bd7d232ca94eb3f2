"""Forward and backward of a micro-batch as DeepSpeed has them: what an engine's `Stage` is given to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.runtime.activation_checkpointing import checkpointing
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch import Tensor

from noflush.methods.flat import Outcome
from noflush.stage.messages import Payload
from noflush.stage.payloads import check_loss
from noflush.stage.random_numbers import random_state, set_random_state, undisturbed

_NO_LOSS = object()


class EngineWork:
    """A `stage.Work` over a `NoFlushEngine`, whose buffers hold what is in flight."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def pull(self) -> Any:
        """The next micro-batch of DeepSpeed's iterator."""
        return PipelineEngine._next_batch(self._engine)  # the engine's own hands out what the stage has pulled

    def forward(self, buffer: int, received: Payload | None, batch: Any) -> Payload:
        """As `Work.forward`. The last stage's loss becomes the engine's ``loss``."""
        self._engine.batch_of_stage = batch
        if self._engine.is_first_stage() or self._engine.is_last_stage():
            self._engine._exec_load_micro_batch(buffer)
        if received is not None:
            self._engine.pipe_buffers["inputs"][buffer] = received
        self._engine.loss = _NO_LOSS
        try:
            self._engine._exec_forward_pass(buffer)
        except (AttributeError, TypeError):
            # DeepSpeed takes any loss apart as if it were a list.
            if self._engine.loss is not _NO_LOSS:
                check_loss(self._engine.loss)
            raise
        if self._engine.is_last_stage():
            check_loss(self._engine.loss)
        self._engine.fwd_outputs.clear()
        outputs: Payload = self._engine.pipe_buffers["outputs"][buffer]
        return outputs

    def backward(self, buffer: int, gradients: list[Tensor] | None) -> None:
        """As `Work.backward`."""
        if gradients is None:
            self._engine._exec_backward_pass(buffer)
        else:
            self._backward_from(self._engine.pipe_buffers["outputs"][buffer], gradients)
        for kind in ("outputs", "output_tensors", "labels"):
            self._engine.pipe_buffers[kind][buffer] = None
        if self._engine.is_first_stage():
            self._engine.pipe_buffers["inputs"][buffer] = None

    def _backward_from(self, outputs: Payload, gradients: list[Tensor]) -> None:
        if self._engine.using_bf16_optimizer:
            self._engine.optimizer.clear_lp_grads()
        tensors = outputs if isinstance(outputs, tuple) else (outputs,)
        # DeepSpeed's hooks take a backward outside this flag for a user's mistake.
        self._engine._running_engine_backward = True
        try:
            # One traversal for all outputs; stock makes one for each.
            if gradients:  # none where all before is frozen
                torch.autograd.backward([t for t in tensors if t.requires_grad], gradients)
        finally:
            self._engine._running_engine_backward = False
        if self._engine.using_bf16_optimizer and not self._engine._config.bfloat16_config.immediate_grad_update:
            self._engine.optimizer.update_hp_grads(clear_lp_grads=False)

    def input_gradients(self, buffer: int) -> list[Tensor]:
        """As `Work.input_gradients`."""
        inputs = self._engine.pipe_buffers["inputs"][buffer]
        self._engine.pipe_buffers["inputs"][buffer] = None
        tensors = inputs if isinstance(inputs, tuple) else (inputs,)
        return [t.grad if t.grad is not None else torch.zeros_like(t) for t in tensors if t.requires_grad]

    def batch_losses(self) -> Tensor:
        """As `Work.batch_losses`: the loss, and the module's additional losses."""
        total, extra = self._engine.total_loss, self._engine.total_additional_losses or {}
        self._engine.total_loss = self._engine.total_additional_losses = None
        parts = [total, *(extra[name] for name in self._engine.loss_names)]
        losses = torch.stack([self._engine._scale_loss_by_gas(part).detach().reshape(()) for part in parts])
        if self._engine.is_data_parallel:
            dist.all_reduce(losses, group=self._engine.mpu.get_data_parallel_group())
            losses /= self._engine.dp_world_size
        return losses.double()

    def take_losses(self) -> Any:
        """As `Work.take_losses`."""
        # DeepSpeed keeps the newest micro-batch's between its forward and its backward.
        taken = self._engine.total_loss, self._engine.total_additional_losses, self._engine.loss
        self._engine.total_loss = self._engine.total_additional_losses = self._engine.loss = None
        return taken

    def put_losses(self, losses: Any) -> None:
        """As `Work.put_losses`."""
        taken = losses or (None, None, None)
        self._engine.total_loss, self._engine.total_additional_losses, self._engine.loss = taken

    def random_state(self) -> Any:
        """As `Work.random_state`: torch's, and DeepSpeed's tracker of them, which Megatron's layers draw from too."""
        tracker = checkpointing.get_cuda_rng_tracker().get_states()
        return {**random_state(torch.device(self._engine.device)), "tracker": tracker}

    def set_random_state(self, state: Any) -> None:
        """As `Work.set_random_state`."""
        set_random_state(state, torch.device(self._engine.device))
        checkpointing.get_cuda_rng_tracker().set_states(dict(state["tracker"]))  # it writes into what it is given

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """As `Work.replaying`."""
        with undisturbed(self._engine.module, self):
            self._engine.ready_to_train()
            yield

    def updated(self, outcome: Outcome) -> None:
        """As `Work.updated`."""
        self._engine.updated(outcome)

    def heard(self, step: int, report: Tensor) -> None:
        """As `Work.heard`."""
        self._engine.heard(step, report)

    def reserve(self, buffers: int) -> None:
        """As `Work.reserve`."""
        self._engine._reserve_pipe_buffers(buffers)

    def say(self, line: str) -> None:
        """As `Work.say`: where DeepSpeed prints its own progress."""
        self._engine.say(line)

    def save_stopped(self, folder: str, tag: str) -> None:
        """As `Work.save_stopped`: without what is in flight, which led to where the run ends."""
        self._engine.drain()
        self._engine.save_checkpoint(folder, tag=tag, save_latest=False)
        self._engine.finish_saves()
