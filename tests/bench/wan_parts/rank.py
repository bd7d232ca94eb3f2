"""One host of tests/bench/wan.py: trains each contestant in turn, and prints its times as JSON.

python -m tests.bench.wan_parts.rank '{"contestants": ..., ...}'    # RANK, WORLD_SIZE and MASTER_* in the environment
"""

from __future__ import annotations

import itertools
import json
import statistics
import sys
import time

import torch
from torch import nn

SLOW = [1.0]  # what this stage's compute is multiplied by
TOOK = []  # what each forward and backward together really took


def sleeping_layers(stages, numbers, forward_s, backward_s):
    """A block a stage with one parameter, whose activations are ``numbers`` float32, and whose compute is sleep."""

    class Sleep(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            pass_time(forward_s * SLOW[0])
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            pass_time(backward_s * SLOW[0])
            return grad.clone()

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, x):
            # The parameter first: a backward that ends at the first stage's input would not be run at all.
            return Sleep.apply(x * self.weight)

    sample = torch.randn(1, numbers), torch.randn(1, numbers)
    return [Block() for _ in range(stages)], sample, nn.functional.mse_loss


def pass_time(seconds):
    start = time.perf_counter()
    time.sleep(seconds)
    TOOK.append(time.perf_counter() - start)


def build(args, block):
    import deepspeed
    from deepspeed.pipe import PipelineModule

    torch.manual_seed(0)
    layers, sample, loss_fn = sleeping_layers(args["stages"], args["numbers"], args["forward_s"], args["backward_s"])
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": args["gas"],
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-5, "torch_adam": True}},
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
    }
    if block is not None:
        config["async_pipeline"] = block
    module = PipelineModule(layers=layers, num_stages=args["stages"], loss_fn=loss_fn, partition_method="type:Block")
    engine, *_ = deepspeed.initialize(model=module, config=config)
    return engine, sample


def measure(args, contestant, block):
    """Seconds a call by call, full; then those of as many calls during a part of which one stage is slow."""
    engine, sample = build(args, block)
    rank = torch.distributed.get_rank()

    def calls(count, slow=range(0)):
        marks = [time.perf_counter()]
        for call in range(count):
            SLOW[0] = args["slowed"] if rank == args["slow_stage"] and call in slow else 1.0
            engine.train_batch(data_iter=iter([sample] * args["gas"]))
            marks.append(time.perf_counter())
        SLOW[0] = 1.0
        return [b - a for a, b in itertools.pairwise(marks)]

    count = args["calls"] if block is not None else args["stock_calls"]
    calls(args["warm_up"] if block is not None else 2)
    if block is not None:
        deep = engine.schedule.lag(0) // args["gas"]
        calls(2 * deep + 2)  # the pipeline fills anew after the choice
    TOOK.clear()
    if block is not None:
        engine.pipeline_stage.recorder.take_interval()
    steady = calls(count)
    actions = engine.pipeline_stage.recorder.take_interval() if block is not None else {}
    took = sum(statistics.median(sorted(TOOK)[part]) for part in (slice(len(TOOK) // 2), slice(len(TOOK) // 2, None)))
    slowed = calls(count, range(args["slow_from"], args["slow_to"])) if block is not None or args["slow_stock"] else []
    found = {"steady": steady, "slowed": slowed, "compute_s": took, "actions": actions}
    if block is not None:
        depth = engine.pipeline_stage.depth
        found |= {"extra": engine.schedule.extra_in_flight, "said": None if depth is None else str(depth)}
        engine.drain()
    torch.distributed.barrier()
    return found


def main():
    args = json.loads(sys.argv[1])
    import deepspeed

    import noflush

    noflush.register()
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo")
    results = {name: measure(args, name, block) for name, block in args["contestants"].items()}
    print("RESULT " + json.dumps(results), flush=True)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
