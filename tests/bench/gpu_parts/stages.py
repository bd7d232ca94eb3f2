"""50 calls of a pipeline of stages, one a process, without DeepSpeed: noflush's runner, channels, ring and kernel.

In the last calls the whole device is waited for before every forward and backward: what lazy loading,
an allocator's retry or a user may do at any time, and must not hang. Losses are compared with the delay simulator's.
"""

from __future__ import annotations

import json
import os
import time

import torch
import torch.distributed as dist

from noflush.demo.gpt import next_token_loss, split_by_blocks
from noflush.kernels.choice import choose
from noflush.methods.flat import FlatGroup
from noflush.methods.method import Place
from noflush.order.deadlock import prove
from noflush.order.schedule import Schedule
from noflush.stage.channels import connect
from noflush.stage.layout import FlatGradients, lay_out
from noflush.stage.messages import TensorSpec
from noflush.stage.runner import StageRunner
from noflush.stage.versions import WeightRing
from noflush.watch.trace import Recorder
from tests.bench.gpu_parts import compared, model
from tests.bench.gpu_parts import device as gpu
from tests.bench.gpu_parts.ranks import join, own_device

_MODULE = "tests.bench.gpu_parts.stages"
_PEER_S = 30.0
POSTING = "in_step"  # NCCL's, in the rehearsal over gloo too


class Stage:
    """A `noflush.stage.runner.StageWork` in plain torch: one stage's layers, data, weights and update."""

    def __init__(self, stage, schedule, of, device):
        self.first, self.last = stage == 0, stage == schedule.stages - 1
        self.module = split_by_blocks(model.layers(of), schedule.stages)[stage].to(device)
        self.synchronising = False
        self.losses = []
        self._gas, self._device = schedule.gas, device
        self._batches = iter([tuple(t.to(device) for t in batch) for batch in model.data(of)])
        self._buffers = {}
        layouts = lay_out(self.module.parameters())
        self.ring = WeightRing(layouts, schedule.versions_alive(stage))
        self._gradients = FlatGradients(layouts)
        self._optimizer = model.optimizer(list(self.module.parameters()))
        self._optimizer.set_stage(Place(stage, schedule.stages, schedule.mean_delay(stage)))
        self._kernel, _ = choose("auto", device, sum(layout.numel for layout in layouts))
        groups = [FlatGroup.of(0, layout.params, layout.offsets, layout.numel) for layout in layouts]
        self._optimizer.flatten(groups, self._kernel)

    def _stand_still(self):
        if self.synchronising:
            gpu.settle(self._device)

    def run_forward(self, buffer, received):
        self._stand_still()
        tokens, labels = next(self._batches)
        outputs = self.module(tokens if self.first else received)
        if self.last:
            loss = next_token_loss(outputs, labels)
            self.losses.append(loss.detach())
            outputs = loss / self._gas
        self._buffers[buffer] = received, outputs
        return outputs

    def run_backward(self, buffer, gradients):
        self._stand_still()
        torch.autograd.backward(self._buffers[buffer][1], gradients)

    def input_gradients(self, buffer):
        received, _ = self._buffers.pop(buffer)
        return [received.grad]

    @torch.no_grad()
    def run_update(self):
        gradients, newest = self._gradients.collect(), self.ring.newest_flats
        norm = self._kernel.norm(gradients)
        self._optimizer.step_flat(self._kernel, gradients, newest, self.ring.begin_update(), False, norm)
        self.ring.commit_update()

    def make_report(self, received):
        return torch.zeros(1, dtype=torch.float64, device=self._device) if received is None else received


def rank_main(stages, dry):
    """One stage's run; prints its times, its losses and how often it waited for the GPU."""
    begin = time.perf_counter()
    device = own_device()
    join(device, 2 * _PEER_S)
    stage, of, schedule = int(os.environ["RANK"]), model.size(stages, dry), Schedule(stages, model.GAS)
    prove(schedule, POSTING)
    work = Stage(stage, schedule, of, device)
    neighbours = connect([range(stages)], stage, device, _PEER_S)
    report = TensorSpec((1,), torch.float64, False)
    runner = StageRunner(schedule, stage, work.ring, neighbours, work, Recorder(stage, stage, None), report, POSTING)
    gpu.settle(device)
    row = {"construction_s": round(time.perf_counter() - begin, 2)}
    warm, still = of.calls // 4, max(2, of.calls // 5)

    def calls(count):
        gpu.settle(device)
        start = time.perf_counter()
        for _ in range(count):
            runner.run_call()
        gpu.settle(device)
        return round((time.perf_counter() - start) / count * 1e3, 3)

    calls(warm)  # fills the pipeline, compiles, loads
    allocations = gpu.Allocations(device)
    with gpu.noting_waits(device) as waits:
        row["ms_a_call"] = calls(of.calls - warm - still)
    row["allocations"] = allocations.since()
    row["waits"] = dict(waits)
    work.synchronising = True
    row["ms_a_call_standing_still"] = calls(still)
    runner.drain()
    gpu.settle(device)
    row["updates"] = work.ring.newest
    row["losses"] = [loss.item() for loss in work.losses]
    print(json.dumps(row), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    compared.main(_MODULE, __doc__, rank_main)
