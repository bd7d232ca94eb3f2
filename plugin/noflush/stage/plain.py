"""A stage without a host: plain torch modules, a loss function and an optimizer, driven by a loop of one's own.

``examples/bare_torch.py`` is such a run, and checks itself against the simulator.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from noflush.kernels.choice import choose
from noflush.methods.flat import Outcome
from noflush.methods.optimizer import DelayAwareOptimizer
from noflush.order.schedule import Schedule
from noflush.stage.groups import without_splits
from noflush.stage.messages import Payload
from noflush.stage.payloads import check_loss
from noflush.stage.random_numbers import random_state, set_random_state, undisturbed
from noflush.stage.ranks import Ranks
from noflush.stage.slices import Slices
from noflush.stage.stage import Stage
from noflush.stage.tied import Tie
from noflush.stage.update import FusedUpdate, StageUpdate, TorchUpdate
from noflush.stage.weights import PlainWeights
from noflush.stage.work import DEFAULTS, StageOptions

logger = logging.getLogger("noflush")


class ModuleWork:
    """A `Work`: one stage's layers, and at the last stage the loss.

    Args:
        module: the stage's layers; takes a tensor or a tuple of them, and returns the like.
        loss_fn: ``loss_fn(outputs, labels)`` -> 0-dim loss, at the last stage.
        gas: K, by which every loss is divided.
        last: whether this is the last stage.
        replicas: process group of the stage's data-parallel replicas; None for one.

    Attributes:
        gas: K.
        batches: an iterator of (inputs, labels), on the first and last stages; set it before each call.
    """

    def __init__(
        self, module: nn.Module, loss_fn: Callable[[Any, Any], Tensor], gas: int, last: bool, replicas: Any = None
    ) -> None:
        self.batches: Iterator[Any] = iter(())
        self.gas = gas
        self._module, self._loss_fn, self._last, self._replicas = module, loss_fn, last, replicas
        self._device = next((p.device for p in module.parameters()), torch.device("cpu"))
        self._buffers: dict[int, tuple[Payload | None, Payload]] = {}
        self._losses: list[Tensor] = []

    def pull(self) -> Any:
        """As `Work.pull`."""
        return next(self.batches)

    def forward(self, buffer: int, received: Payload | None, batch: Any) -> Payload:
        """As `Work.forward`."""
        outputs: Payload = self._module(batch[0] if received is None else received)
        if self._last:
            loss = self._loss_fn(outputs, batch[1])
            check_loss(loss)
            self._losses.append(loss.detach())
            outputs = loss / self.gas
        self._buffers[buffer] = received, outputs
        return outputs

    def backward(self, buffer: int, gradients: list[Tensor] | None) -> None:
        """As `Work.backward`."""
        received, outputs = self._buffers[buffer]
        tensors = outputs if isinstance(outputs, tuple) else (outputs,)
        heads = [t for t in tensors if t.requires_grad]
        if heads:
            torch.autograd.backward(heads, gradients)
        self._buffers[buffer] = received, ()

    def input_gradients(self, buffer: int) -> list[Tensor]:
        """As `Work.input_gradients`."""
        received, _ = self._buffers.pop(buffer)
        tensors = received if isinstance(received, tuple) else (received,)
        differentiable = [t for t in tensors if t is not None and t.requires_grad]
        return [t.grad if t.grad is not None else torch.zeros_like(t) for t in differentiable]

    def batch_losses(self) -> Tensor:
        """As `Work.batch_losses`: [1]."""
        mean = (sum(self._losses[1:], self._losses[0]) / self.gas).reshape(1)
        self._losses.clear()
        if self._replicas is not None:
            dist.all_reduce(mean, group=self._replicas)
            mean /= dist.get_world_size(self._replicas)
        return mean.double()

    def take_losses(self) -> Any:
        """As `Work.take_losses`."""
        taken, self._losses = self._losses, []
        return taken

    def put_losses(self, losses: Any) -> None:
        """As `Work.put_losses`."""
        self._losses = losses or []

    def random_state(self) -> Any:
        """As `Work.random_state`: torch's own."""
        return random_state(self._device)

    def set_random_state(self, state: Any) -> None:
        """As `Work.set_random_state`."""
        set_random_state(state, self._device)

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """As `Work.replaying`."""
        with undisturbed(self._module, self):
            yield

    def updated(self, outcome: Outcome) -> None:
        """Nothing."""

    def heard(self, step: int, report: Tensor) -> None:
        """Nothing: `Stage.loss` has it."""

    def reserve(self, buffers: int) -> None:
        """Nothing: buffers are made as they are used."""

    def say(self, line: str) -> None:
        """To the logger ``noflush``."""
        logger.info(line)

    def save_stopped(self, folder: str, tag: str) -> None:
        """Nothing: what is worth saving is whose loop it is to know."""


class PlainStage(Stage):
    """A stage of a float32 model without a host, over the default process group.

    Args:
        schedule: the same on every rank.
        module: this stage's layers, on the device where it computes.
        loss_fn: as `ModuleWork` takes it.
        optimizer: of the module's parameters: one of noflush's, or any of torch's.
        pipelines: global ranks of each replica's stages, in stage order; None: one pipeline of all ranks.
        max_norm: the stage's gradients are clipped to so much; 0 clips nothing.
        kernel: what computes the update of noflush's own optimizers, as the block's field says.
        options: the user's.
        ties: weights that several stages use, the same on every rank; needs a schedule without a flush.
        tied: by number of the tie, this stage's parameter. The first of a tie's stages has it in its optimizer, and the
            others have not.

    Raises:
        ScheduleError: the schedule could deadlock.
        KernelError: the kernel asked for cannot run here.
        ValueError: a weight that another stage owns is in the optimizer.
    """

    def __init__(
        self,
        schedule: Schedule,
        module: nn.Module,
        loss_fn: Callable[[Any, Any], Tensor],
        optimizer: Optimizer,
        pipelines: list[list[int]] | None = None,
        max_norm: float = 0.0,
        kernel: str = "auto",
        options: StageOptions = DEFAULTS,
        ties: Sequence[Tie] = (),
        tied: Mapping[int, nn.Parameter] | None = None,
    ) -> None:
        pipelines = pipelines or [list(range(dist.get_world_size()))]
        rank = dist.get_rank()
        replica = next(number for number, members in enumerate(pipelines) if rank in members)
        ranks = Ranks(pipelines, rank, len(pipelines), replica=replica)
        replicas = None
        if len(pipelines) > 1:
            with without_splits():
                groups = [dist.new_group([p[s] for p in pipelines]) for s in range(ranks.stages)]
            replicas = groups[ranks.stage]
        device = next((p.device for p in module.parameters()), torch.device("cpu"))
        learnt = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for number, p in (tied or {}).items():
            if (ties[number].owner == ranks.stage) != (id(p) in learnt):
                raise ValueError(
                    f"stage {ranks.stage} and the tied weight {ties[number].name!r}: stage {ties[number].owner}, the "
                    "first that uses it, must have it in its optimizer, and no other may"
                )
        weights = PlainWeights(optimizer, replicas, Slices())
        self._module_work = ModuleWork(module, loss_fn, schedule.gas, ranks.stage == schedule.stages - 1, replicas)
        update: StageUpdate
        if isinstance(optimizer, DelayAwareOptimizer):
            count = sum(group.numel for group in weights.flat_groups())
            chosen, _ = choose(kernel, device, count)
            update = FusedUpdate(weights, chosen, max_norm, torch.float32, float(len(pipelines)))
        else:
            update = TorchUpdate(weights, max_norm, self._mean_gradients if replicas is not None else None)
        super().__init__(schedule, ranks, device, weights, update, self._module_work, options, tied=(ties, tied or {}))

    def train_on(self, data: Iterator[Any]) -> Tensor:
        """One call on K micro-batches of ``data``: `Stage.train_batch`. Returns `Stage.loss`."""
        self._module_work.batches = data
        self.train_batch()
        return self.loss

    def change_gas(self, gas: int) -> None:
        """As `Stage.change_gas`."""
        super().change_gas(gas)
        self._module_work.gas = gas

    @torch.no_grad()
    def _mean_gradients(self) -> None:
        replicas = self.weights.replicas
        for p in self.ring.params:
            if p.grad is not None:
                dist.all_reduce(p.grad, group=replicas)
                p.grad /= dist.get_world_size(replicas)
