"""50 `train_batch` calls of DeepSpeed's engine as noflush makes it: losses as the simulator's, and where calls wait."""

from __future__ import annotations

import json
import time

import torch

from tests.bench.gpu_parts import compared, model
from tests.bench.gpu_parts import device as gpu
from tests.bench.gpu_parts.ranks import own_device

_MODULE = "tests.bench.gpu_parts.engine"


def build(stages, of):
    """The engine, and the list that takes the last stage's losses."""
    import deepspeed
    from deepspeed.pipe import PipelineModule

    from noflush.demo.gpt import next_token_loss, split_by_blocks

    losses = []

    def loss_fn(outputs, labels):
        loss = next_token_loss(outputs, labels)
        losses.append(loss.detach())
        return loss

    parts = split_by_blocks(model.layers(of), stages)
    module = PipelineModule(
        layers=[layer for part in parts for layer in part],
        num_stages=stages,
        loss_fn=loss_fn,
        partition_method="type:Block",
    )
    config = {
        "train_micro_batch_size_per_gpu": of.batch,
        "gradient_accumulation_steps": model.GAS,
        "optimizer": {"type": "DelayAwareNAdamW", "params": model.OPTIMIZER},
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
        "async_pipeline": {"peer_timeout_s": 60},
    }
    engine, *_ = deepspeed.initialize(model=module, config=config)
    return engine, losses


def rank_main(stages, dry):
    """One rank's run; prints its times, its losses and how often it waited for the GPU."""
    device = own_device()
    import deepspeed

    import noflush

    noflush.register()
    begin = time.perf_counter()
    deepspeed.init_distributed("gloo" if dry else "nccl")
    of = model.size(stages, dry)
    engine, losses = build(stages, of)
    gpu.settle(device)
    row = {"construction_s": round(time.perf_counter() - begin, 2)}
    batches = model.data(of)
    half = of.calls // 2

    def calls(first, last):
        gpu.settle(device)
        start = time.perf_counter()
        for call in range(first, last):
            engine.train_batch(iter(batches[call * model.GAS : (call + 1) * model.GAS]))
        gpu.settle(device)
        return round((time.perf_counter() - start) / (last - first) * 1e3, 3)

    calls(0, half)  # fills the pipeline, compiles, loads
    allocations = gpu.Allocations(device)
    row["ms_a_call"] = calls(half, of.calls - 1)
    row["allocations"] = allocations.since()
    with gpu.noting_waits(device) as waits:  # of one call
        calls(of.calls - 1, of.calls)
    row["waits"] = dict(waits)
    engine.drain()
    row |= {"updates": engine.updates, "losses": [loss.item() for loss in losses]}
    if device.type == "cuda":
        row["peak_GB"] = round(torch.cuda.max_memory_allocated() / 1e9, 3)
    print(json.dumps(row), flush=True)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    compared.main(_MODULE, __doc__, rank_main)
