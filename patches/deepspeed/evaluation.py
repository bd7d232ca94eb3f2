"""`eval_batch` of `NoFlushEngine`: DeepSpeed's own pipeline, beside the one that stays full."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.pipe.schedule import SendActivation

from noflush.stage.messages import PayloadSpec
from noflush.stage.payloads import check_alike, check_outputs
from noflush.stage.stage import Stage

if TYPE_CHECKING:
    from noflush.patches.deepspeed.groups import Group

_Host: Any = PipelineEngine if TYPE_CHECKING else object


class Evaluation(_Host):  # type: ignore[misc]
    """What the engine has of it.

    Attributes:
        evaluating: whether `eval_batch` is running.
    """

    evaluating = False
    # DeepSpeed's own, which carries no types.
    pipe_buffers: dict[str, list[Any]]
    num_pipe_buffers: int
    total_loss: Any
    total_additional_losses: Any
    _nf_stage: Stage
    _nf_group: Group | None
    _nf_evaluated: tuple[int, PayloadSpec | None] = (0, None)
    """Micro-batches sent in this evaluation, and what the first one was."""

    def eval_batch(self, *args: Any, **kwargs: Any) -> Any:
        """As DeepSpeed's; training's micro-batches stay in flight and are not disturbed.

        Every stage evaluates with its newest weights (the true ones, not what a look-ahead has forwards use), and a
        later stage has made up to ceil(L/K) updates more than stage 0. Call `drain` first to evaluate one version
        everywhere.

        Where a group of several has lost a stage (``replicas.reroute``) nothing is evaluated, and it returns nan.

        Raises:
            ValueError: micro-batches of one call differ in shape (those of different calls may).
        """
        if self._nf_group is not None and not self._nf_group.is_whole("evaluation"):
            return torch.tensor(math.nan, device=self.device)
        training = self.pipe_buffers, self.num_pipe_buffers, self.module.training
        self.pipe_buffers = {kind: [] for kind in self.pipe_buffers}
        self.num_pipe_buffers = 0
        self.reset_activation_shape()
        self.evaluating, self._nf_evaluated = True, (0, None)
        try:
            with self._nf_stage.on_duty(), self._nf_stage.evaluating():
                return super().eval_batch(*args, **kwargs)
        finally:
            self.evaluating = False
            self.pipe_buffers, self.num_pipe_buffers, was_training = training
            self.total_loss = self.total_additional_losses = None
            self.module.train(was_training)

    def _nf_send_evaluated(self, buffer_id: int) -> None:
        # DeepSpeed receives into buffers of the first one's shape: a larger message aborts the next stage's process, a
        # smaller one leaves there what the one before had.
        outputs = self.pipe_buffers["outputs"][buffer_id]
        check_outputs(outputs, self.stage_id)
        count, first = self._nf_evaluated
        spec = PayloadSpec.of(outputs)
        if first is not None:
            check_alike(spec, first, self.stage_id, f"micro-batch {count} of an eval_batch")
        self._nf_evaluated = count + 1, first or spec
        self._exec_send_activations(buffer_id)

    _INSTRUCTION_MAP: ClassVar[dict[type, Any]] = {
        **PipelineEngine._INSTRUCTION_MAP,
        SendActivation: _nf_send_evaluated,
    }
