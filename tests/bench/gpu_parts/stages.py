"""50 calls of a pipeline of stages, one a process, without DeepSpeed: noflush's own stage in plain torch.

In the last calls the whole device is waited for before every forward and backward: what lazy loading,
an allocator's retry or a user may do at any time, and must not hang. Losses are compared with the delay simulator's.
"""

from __future__ import annotations

import json
import os
import time

import torch.distributed as dist

from noflush.demo.gpt import next_token_loss, split_by_blocks
from noflush.order.schedule import Schedule
from noflush.stage.plain import PlainStage
from noflush.stage.work import StageOptions
from tests.bench.gpu_parts import compared, model
from tests.bench.gpu_parts import device as gpu
from tests.bench.gpu_parts.ranks import join, own_device

_MODULE = "tests.bench.gpu_parts.stages"
OPTIONS = StageOptions(peer_timeout_s=30.0, posting="in_step")  # NCCL's posting, in the rehearsal over gloo too


class Stage(PlainStage):
    """One that stands still before every forward and backward, if it is told to."""

    synchronising = False

    def run_forward(self, micro_batch, buffer, received):
        self._stand_still()
        return super().run_forward(micro_batch, buffer, received)

    def run_backward(self, buffer, gradients):
        self._stand_still()
        super().run_backward(buffer, gradients)

    def _stand_still(self):
        if self.synchronising:
            gpu.settle(self.device)


def rank_main(stages, dry):
    """One stage's run; prints its times, its losses and how often it waited for the GPU."""
    begin = time.perf_counter()
    device = own_device()
    join(device, 2 * OPTIONS.peer_timeout_s)
    rank, of, schedule = int(os.environ["RANK"]), model.size(stages, dry), Schedule(stages, model.GAS)
    module = split_by_blocks(model.layers(of), stages)[rank].to(device)
    losses, batches = [], iter(model.data(of))

    def loss_fn(outputs, labels):
        loss = next_token_loss(outputs, labels)
        losses.append(loss.detach())
        return loss

    stage = Stage(schedule, module, loss_fn, model.optimizer(module.parameters()), options=OPTIONS)
    gpu.settle(device)
    row = {"construction_s": round(time.perf_counter() - begin, 2)}
    warm, still = of.calls // 4, max(2, of.calls // 5)

    def calls(count):
        gpu.settle(device)
        start = time.perf_counter()
        for _ in range(count):
            stage.train_on(batches)
        gpu.settle(device)
        return round((time.perf_counter() - start) / count * 1e3, 3)

    calls(warm)  # fills the pipeline, compiles, loads
    allocations = gpu.Allocations(device)
    with gpu.noting_waits(device) as waits:
        row["ms_a_call"] = calls(of.calls - warm - still)
    row["allocations"] = allocations.since()
    row["waits"] = dict(waits)
    stage.synchronising = True
    row["ms_a_call_standing_still"] = calls(still)
    stage.drain()
    gpu.settle(device)
    row["updates"] = stage.updates
    row["losses"] = [loss.item() for loss in losses]
    print(json.dumps(row), flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    compared.main(_MODULE, __doc__, rank_main)
