"""The delay simulator: P pipeline stages on one device, each gradient taken at the weights its schedule names.

It is the oracle the engine is tested against, so it shares nothing with the engine but the schedule's formulas:
no swapping, no messages, no micro-batches in flight. A micro-batch goes forward through all stages, each at its
own old version, and straight back; every stage then updates its newest weights. That is all that asynchrony
does to the numbers. It is also a tool: the price of staleness at any P, before any hardware is rented.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from noflush.methods.method import Place
from noflush.methods.optimizer import DelayAwareOptimizer
from noflush.order.clipping import ClipName, known_batch, newest_finite
from noflush.order.schedule import Schedule
from noflush.order.wire_format import AS_IN_MODEL, Wire
from noflush.simulated_stage import FLOAT32, Precision, SimulatedStage, StageState
from noflush.stage.messages import TensorSpec
from noflush.stage.wire import Form, LinkForms

Payload = Tensor | tuple[Tensor, ...]


def _as_tuple(payload: Payload) -> tuple[Tensor, ...]:
    return payload if isinstance(payload, tuple) else (payload,)


@dataclass(frozen=True)
class Shared:
    """A weight that several stages use: (stage, its name there), the owner, who updates it, first."""

    users: tuple[tuple[int, str], ...]


class DelaySimulator:
    """Trains P virtual stages with the delays of a schedule.

    Args:
        stages: a module for each stage, applied one after the other to a tensor or a tuple of tensors.
        loss_fn: ``loss_fn(outputs, labels)`` -> 0-dim loss.
        make_optimizer: builds a stage's optimizer from its trainable parameters (their float32 masters).
        schedule: of ``len(stages)`` stages.
        clip: largest norm of gradients; 0 clips nothing.
        clip_by: which gradients: as the block's ``clip``. Here ``global`` is known without a flush too, as no engine
            could: what the others are measured against.
        make_lr_scheduler: builds a stage's learning-rate scheduler (stepped after each of its updates), or None.
        precision: dtypes of weights and gradients.
        replicas: data-parallel replicas.
        wire: the form that activations and gradients have between stages; they are coded and decoded on their way.
        shared: weights that stages share: all forwards and backwards of a micro-batch use the version that its owner's
            forward does, and the owner's update takes all their gradients.
        loss_scale: ``loss_scale(batch)`` multiplies that batch's loss, and its updates divide by it.
        recompute: layers of a stage (children of its ``nn.Sequential``) that backward computes anew together, as
            DeepSpeed's ``activation_checkpoint_interval``; 0 keeps activations. It changes numbers under ``latest``
            alone, whose backward then sees live weights throughout, not live weights and old activations.

    A stage whose gradients are not finite skips that update, and counts it in ``skipped``. ``norms`` are those of all
    stages' gradients together, unscaled and before clipping, by batch since the newest drain. ``after_update`` is
    called with stage and update when an update is made, before any forward uses it.

    Raises:
        ValueError: the schedule has another number of stages.
    """

    def __init__(
        self,
        stages: Sequence[nn.Module],
        loss_fn: Callable[[Any, Any], Tensor],
        make_optimizer: Callable[[list[nn.Parameter]], Optimizer],
        schedule: Schedule,
        clip: float = 0.0,
        make_lr_scheduler: Callable[[Optimizer], Any] | None = None,
        precision: Precision = FLOAT32,
        replicas: int = 1,
        loss_scale: Callable[[int], float] = lambda batch: 1.0,
        recompute: int = 0,
        shared: Sequence[Shared] = (),
        clip_by: ClipName = "stage",
        wire: Wire = AS_IN_MODEL,
    ) -> None:
        if len(stages) != schedule.stages:
            raise ValueError(f"{len(stages)} stage modules for a schedule of {schedule.stages} stages")
        self.schedule = schedule
        self.after_update: Callable[[int, int], None] = lambda stage, update: None
        self.micro_batches = 0
        self.skipped: list[tuple[int, int]] = []
        self._loss_fn = loss_fn
        self._clip, self._clip_by = clip, clip_by
        self.norms: list[float] = []
        self._loss_scale = loss_scale
        self._recompute = recompute
        self._segment = 0
        self._shared = tuple(shared)
        self._links = [[LinkForms(wire, link, r) for link in range(len(stages) - 1)] for r in range(replicas)]
        self._stages: list[SimulatedStage] = []
        for s, module in enumerate(stages):
            # For `latest` a forward is as old as with `stash`; only its backward differs.
            borrowed = [name for one in shared for of, name in one.users[1:] if of == s]
            stage = SimulatedStage(module, make_optimizer, schedule.max_delay(s) + 1, precision, replicas, borrowed)
            self._tell(s, stage)
            self._stages.append(stage)
        self._lr = [make_lr_scheduler(s.optimizer) for s in self._stages] if make_lr_scheduler else []

    def train_micro_batch(self, inputs: Payload, labels: Any) -> Tensor:
        """One micro-batch forth and back; updates every stage after each K-th. Returns its loss, detached."""
        return self.train_replicas([(inputs, labels)])[0]

    def train_replicas(self, batches: Sequence[tuple[Payload, Any]]) -> list[Tensor]:
        """As `train_micro_batch` with (inputs, labels) for each data-parallel replica; returns their losses."""
        losses = [self._train_one(replica, inputs, labels) for replica, (inputs, labels) in enumerate(batches)]
        m = self.micro_batches - self._segment
        self.micro_batches += 1
        if (m + 1) % self.schedule.gas == 0:
            self._update()
        return losses

    def _train_one(self, replica: int, inputs: Payload, labels: Any) -> Tensor:
        m = self.micro_batches - self._segment
        graphs = []
        payload = inputs
        for s, stage in enumerate(self._stages):
            # A version counted from the segment's start, as an offset from the newest.
            version = stage.newest - m // self.schedule.gas + self.schedule.version(s, m)
            weights = stage.weights(version) | self._borrowed(s, m)
            frozen = _as_tuple(payload)
            if s:
                frozen = self._carried(
                    self._links[replica][s - 1].activations, frozen, [TensorSpec.of(t) for t in frozen]
                )
            received = tuple(t.detach().requires_grad_(t.requires_grad) for t in frozen)
            outputs = self._forward(stage.module, weights, received if isinstance(payload, tuple) else received[0])
            graphs.append((weights, received, outputs))
            payload = outputs
        loss = self._loss_fn(payload, labels)
        scaled = loss / self.schedule.gas * self._loss_scale(self.micro_batches // self.schedule.gas)
        grads: tuple[Tensor, ...] | None = None
        for s, (weights, received, outputs) in reversed(list(enumerate(graphs))):
            stage = self._stages[s]
            if self.schedule.backward_sees_live_weights:
                for name, leaf in weights.items():
                    if name in stage.params:
                        leaf.data.copy_(stage.params[name])
            heads = [scaled] if grads is None else [t for t in _as_tuple(outputs) if t.requires_grad]
            wanted = [*weights.values(), *(t for t in received if t.requires_grad)]
            # A stage without weights, behind none that trains, has nothing to pass on.
            found = torch.autograd.grad(heads, wanted, grads, allow_unused=True) if heads and wanted else ()
            for name, grad in zip(weights, found, strict=False):
                if grad is not None:
                    self._accumulate(s, replica, name, grad)
            grads = tuple(
                torch.zeros_like(t) if g is None else g
                for t, g in zip(wanted[len(weights) :], found[len(weights) :], strict=True)
            )
            if s:
                specs = [TensorSpec.of(t) for t in received if t.requires_grad]
                grads = self._carried(self._links[replica][s - 1].gradients, grads, specs)
        return loss.detach()

    def _carried(self, form: Form, tensors: Sequence[Tensor], specs: Sequence[TensorSpec]) -> tuple[Tensor, ...]:
        """What a link makes of ``tensors``; whether they train stays as it was."""
        batch, index = self._stages[0].newest, (self.micro_batches - self._segment) % self.schedule.gas
        carried = form.decode(form.encode(tensors, specs, batch, index), specs)
        return tuple(new.requires_grad_(old.requires_grad) for old, new in zip(tensors, carried, strict=True))

    def _borrowed(self, stage: int, m: int) -> dict[str, Tensor]:
        """What ``stage`` reads of other stages' weights, at the versions that their forwards of micro-batch m use."""
        found = {}
        for one in self._shared:
            of, own_name = one.users[0]
            owner = self._stages[of]
            version = owner.newest - m // self.schedule.gas + self.schedule.version(of, m)
            found.update({n: owner.weights(version)[own_name] for reader, n in one.users[1:] if reader == stage})
        return found

    def _accumulate(self, stage: int, replica: int, name: str, gradient: Tensor) -> None:
        """A gradient of a shared weight is kept apart until the update, which adds those of its readers up."""
        for one in self._shared:
            if (stage, name) in one.users[1:]:
                owner, own_name = one.users[0]
                self._stages[owner].accumulate(replica, f"{own_name} of stage {stage}", gradient)
                return
        self._stages[stage].accumulate(replica, name, gradient)

    def _gather_shared(self) -> None:
        """Every owner's gradient and its readers': those of the readers first, from the last one on."""
        for one in self._shared:
            owner, own_name = one.users[0]
            for sums in self._stages[owner].gradients:
                total = None
                for reader, _ in reversed(one.users[1:]):
                    found = sums.pop(f"{own_name} of stage {reader}", None)
                    total = found if total is None or found is None else total + found
                if total is not None:
                    sums[own_name] = sums[own_name] + total.to(sums[own_name].dtype) if own_name in sums else total

    def _forward(self, module: nn.Module, weights: dict[str, Tensor], payload: Payload) -> Payload:
        if not self._recompute:
            outputs: Payload = functional_call(module, weights, (payload,))
            return outputs
        assert isinstance(module, nn.Sequential), type(module)
        for first in range(0, len(module), self._recompute):
            part = module[first : first + self._recompute]
            of_part = {name: weight for name, weight in weights.items() if name.split(".")[0] in part._modules}
            payload = checkpoint(functional_call, part, of_part, (payload,), use_reentrant=False)
        return payload

    def _update(self) -> None:
        self._gather_shared()
        scale = self._loss_scale(self.micro_batches // self.schedule.gas - 1)
        finite = [stage.take_gradients(scale) for stage in self._stages]
        norms = [stage.norm() for stage in self._stages]
        # From the last stage on, as the norms meet on their way up.
        squares = sum((norm.double() ** 2 for norm in reversed(norms)), torch.zeros((), dtype=torch.float64))
        self.norms.append(squares.sqrt().float().item())
        for s, stage in enumerate(self._stages):
            if not finite[s]:
                self.skipped.append((s, stage.newest + 1))
                stage.publish()
            else:
                if self._clip > 0:
                    stage.clip(self._clip, self._norm_to_clip_by(norms[s]))
                stage.step()
            stage.newest += 1
            self.after_update(s, stage.newest)
            stage.remember()
            if self._lr:
                self._lr[s].step()

    def _norm_to_clip_by(self, own: Tensor) -> Tensor:
        """Of a stage whose own norm is ``own``: what is known of the whole pipeline's, which its own cannot exceed."""
        if self._clip_by == "stage" or self.schedule.stages == 1:
            return own
        batch = len(self.norms) - 1
        at_once = self._clip_by == "global" or self.schedule.flushes
        whole = newest_finite(self.norms, batch if at_once else known_batch(self.schedule, batch))
        return own if whole is None else own.clamp(min=whole)

    @property
    def updates(self) -> int:
        """Updates that every stage has made."""
        return self._stages[0].newest

    def true_flat(self, stage: int) -> Tensor:
        """A stage's true weights in a row, in the order of its optimizer's groups: float32, a copy."""
        return torch.cat([p.detach().reshape(-1) for p in self._stages[stage].in_order()])

    def shift(self, stage: int, start: int, change: Tensor) -> None:
        """Adds ``change`` to a stage's true weights from number ``start`` of `true_flat` on; forwards use the sum."""
        self._stages[stage].shift(start, change)

    def step_schedule(self, stage: int, steps: int) -> None:
        """A stage's learning-rate schedule goes on by ``steps`` more than its updates."""
        for _ in range(steps if self._lr else 0):
            self._lr[stage].step()

    def state_of(self, stage: int) -> StageState:
        """A stage's true weights, its optimizer's state and its schedule's; copies. As of `after_update`."""
        of, schedule = self._stages[stage], self._lr[stage].state_dict() if self._lr else None
        optimizer = copy.deepcopy(of.optimizer.state_dict())
        return [p.detach().clone() for p in of.in_order()], optimizer, copy.deepcopy(schedule)

    def put_state(self, stage: int, updates: int, state: StageState) -> None:
        """Has a stage go on from `state_of` another run's, as after ``updates`` updates; nothing may be in flight."""
        self._stages[stage].put(updates, state)
        if self._lr:
            self._lr[stage].load_state_dict(state[2])
            self._lr[stage].step()

    def drain(self) -> None:
        """What a drain does to the numbers: the next micro-batch sees every stage's newest, true weights."""
        self._segment = self.micro_batches
        self.norms = []
        for stage in self._stages:
            stage.publish()
            stage.history.pop()
            stage.remember()

    def change_gas(self, gas: int) -> None:
        """What another K does: a `drain`, and the delays of that K from there on."""
        self.drain()
        self._follow(replace(self.schedule, gas=gas))

    def change_extra(self, extra: int) -> None:
        """What another depth of `Schedule.extra_in_flight` does: a `drain`, and its delays from there on."""
        self.drain()
        self._follow(replace(self.schedule, extra_in_flight=extra))

    def _follow(self, schedule: Schedule) -> None:
        self.schedule = schedule
        for s, stage in enumerate(self._stages):
            stage.history = deque(stage.history, maxlen=schedule.max_delay(s) + 1)
            self._tell(s, stage)

    def _tell(self, s: int, stage: SimulatedStage) -> None:
        if isinstance(stage.optimizer, DelayAwareOptimizer):
            stage.optimizer.set_stage(Place(s, self.schedule.stages, self.schedule.mean_delay(s)))

    def parameters(self, stage: int) -> dict[str, Tensor]:
        """What forwards of ``stage`` use next, by name within its module; after a `drain` its true weights."""
        return {name: p.detach() for name, p in self._stages[stage].params.items()}

    @torch.no_grad()
    def evaluate(self, inputs: Payload, labels: Any) -> Tensor:
        """Loss of a micro-batch with every stage's newest true weights, in evaluation mode."""
        payload = inputs
        for stage in self._stages:
            stage.module.eval()
            true = self._true_weights(stage)
            for one in self._shared:
                of, own_name = one.users[0]
                true |= {n: self._true_weights(self._stages[of])[own_name] for s, n in one.users[1:]
                         if self._stages[s] is stage}  # fmt: skip
            payload = functional_call(stage.module, true, (payload,))
            stage.module.train()
        return self._loss_fn(payload, labels)

    @staticmethod
    def _true_weights(stage: SimulatedStage) -> dict[str, Tensor]:
        return {name: master.to(stage.params[name].dtype) for name, master in stage.masters.items()}
