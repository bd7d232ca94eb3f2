"""Time of a ``train_batch`` call: noflush, stock DeepSpeed and the bubble-free bound, side by side in one run.

    python tests/bench/pipeline.py --stages 4 --gas 1 --json
    python tests/bench/pipeline.py --stages 2 --gas 1 --real --json

By default every stage's compute is a sleep inside the real engine (forward 40 ms, backward 80 ms), so that more
stages than cores can be measured; with ``--real`` it is the demo's model on a core a stage. The two engines take
turns, ``--rounds`` times; figures are medians over all calls, of the slowest rank.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.bench.record import record  # noqa: E402
from tests.multiproc.ranks import run_ranks  # noqa: E402

COMPUTE_S = []  # what the emulated compute really took, call by call


def pass_time(seconds):
    """Sleeps, but spins the last millisecond: a sleep alone overshoots by as much, and that is not the engine's."""
    start = time.perf_counter()
    if seconds > 1e-3:
        time.sleep(seconds - 1e-3)
    while time.perf_counter() < start + seconds:
        pass
    COMPUTE_S.append(time.perf_counter() - start)


def sleeping_layers(stages, forward_s, backward_s):
    import torch
    from torch import nn

    class Sleep(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            pass_time(forward_s)
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            pass_time(backward_s)
            return grad.clone()

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(16, 16)

        def forward(self, x):
            # The parameter first: a backward that ends at the first stage's input would not be run at all.
            return Sleep.apply(self.linear(x))

    torch.manual_seed(0)
    return [Block() for _ in range(stages)], (torch.randn(4, 16), torch.randn(4, 16)), nn.functional.mse_loss


def demo_layers(stages, depth, width, sequence, batch):
    import torch

    from noflush.demo import gpt, text

    torch.manual_seed(0)
    layers = gpt.gpt_layers(text.VOCABULARY, sequence, width, 4, depth)
    tokens = torch.randint(0, 256, (batch, sequence))
    return layers, (tokens, tokens), gpt.next_token_loss


def build(args, block):
    import deepspeed
    from deepspeed.pipe import PipelineModule

    if args.real:
        layers, sample, loss_fn = demo_layers(args.stages, args.depth, args.width, args.sequence, args.batch)
    else:
        layers, sample, loss_fn = sleeping_layers(args.stages, args.forward_ms / 1e3, args.backward_ms / 1e3)
    optimizer = {"type": "DelayAwareNAdamW", "params": {"lr": 1e-4}}
    if block is None:
        optimizer = {"type": "NAdam", "params": {"lr": 1e-4, "decoupled_weight_decay": True, "betas": [0.99, 0.999]}}
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": args.gas,
        "optimizer": optimizer,
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
    }
    if block is not None:
        config["async_pipeline"] = block
    module = PipelineModule(layers=layers, num_stages=args.stages, loss_fn=loss_fn, partition_method="type:Block")
    engine, *_ = deepspeed.initialize(model=module, config=config)
    return engine, sample


def measure(rank, args):
    import torch

    def timed(engine, sample, calls, warm_up):
        def call():
            engine.train_batch(data_iter=iter([sample] * args.gas))

        torch.distributed.barrier()
        for _ in range(warm_up):  # also forgets the barrier, which lines the stages up
            call()
        marks = [time.perf_counter()]
        for _ in range(calls):
            call()
            marks.append(time.perf_counter())
        return [(b - a) * 1e3 for a, b in itertools.pairwise(marks)]

    extras = args.extra_in_flight
    ours = {e: build(args, {"extra_in_flight": e, "trace_dir": args.trace_dir}) for e in extras}
    stock = build(args, None)
    rounds = {e: [] for e in extras} | {"stock": []}
    actions = {}
    COMPUTE_S.clear()
    for _ in range(args.rounds):
        for e in extras:
            engine, sample = ours[e]
            warm_up = 3 * -(-engine.schedule.lag(0) // args.gas) + 3
            rounds[e].extend(timed(engine, sample, args.calls, warm_up))
            actions[e] = engine.pipeline_stage.recorder.take_interval()
            engine.drain()
            engine.pipeline_stage.recorder.take_interval()
        rounds["stock"].extend(timed(*stock, max(2, args.calls // 4), 1))
    took = 0.0
    if not args.real and args.forward_ms + args.backward_ms > 0:
        # Forwards and backwards differ in length: split them in the middle.
        middle = (args.forward_ms + args.backward_ms) / 2e3
        took = sum(statistics.median([c for c in COMPUTE_S if (c > middle) is long]) for long in (True, False)) * 1e3
    return {str(k): v for k, v in rounds.items()}, took, actions[extras[0]]


def compute_ms(args):
    """What a micro-batch costs the slowest stage with nothing around it: the bound with real compute."""
    import torch

    from noflush.demo.gpt import split_by_blocks

    torch.set_num_threads(1)
    layers, (tokens, labels), loss_fn = demo_layers(args.stages, args.depth, args.width, args.sequence, args.batch)
    worst = 0.0
    for s, stage in enumerate(split_by_blocks(layers, args.stages)):
        inputs = tokens if s == 0 else torch.randn(*tokens.shape, args.width, requires_grad=True)
        times = []
        for _ in range(15):
            start = time.perf_counter()
            out = stage(inputs)
            if s == args.stages - 1:
                loss_fn(out, labels).backward()
            else:
                out.backward(torch.ones_like(out))
            times.append(time.perf_counter() - start)
        worst = max(worst, statistics.median(times))
    return worst * 1e3


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--stages", type=int, default=4)
    p.add_argument("--gas", type=int, default=1)
    p.add_argument("--extra-in-flight", type=int, nargs="+", default=[2, 0], help="the first one is no_flush_ms")
    p.add_argument("--forward-ms", type=float, default=40.0)
    p.add_argument("--backward-ms", type=float, default=80.0)
    p.add_argument("--calls", type=int, help="timed calls a round (stock: a quarter); default: 60 micro-batches")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--real", action="store_true", help="the demo's model instead of sleeping")
    p.add_argument("--depth", type=int, default=4)
    p.add_argument("--width", type=int, default=128)
    p.add_argument("--sequence", type=int, default=128)
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--trace-dir")
    p.add_argument("--json", action="store_true", help="print one JSON object")
    p.add_argument("--record", action="store_true", help="append the result to tests/bench/results/pipeline.jsonl")
    args = p.parse_args()
    args.calls = args.calls or max(6, 60 // args.gas)
    if args.stages == 1 or args.real:
        args.extra_in_flight = args.extra_in_flight[-1:]

    per_rank = run_ranks(measure, args.stages, timeout=3000, args=args)
    slowest = {key: max(statistics.median(r[0][key]) for r in per_rank) for key in per_rank[0][0]}
    first, last = str(args.extra_in_flight[0]), str(args.extra_in_flight[-1])
    bound = args.gas * (compute_ms(args) if args.real else args.forward_ms + args.backward_ms)
    middle = args.stages // 2
    took = args.gas * max(r[1] for r in per_rank)
    result = {
        "no_flush_ms": round(slowest[first], 3),
        "no_flush_ms_extra_0": round(slowest[last], 3),
        "stock_ms": round(slowest["stock"], 3),
        "bound_ms": round(bound, 3),
        "fraction_of_bound": round(bound / slowest[first], 4) if bound else None,
        "fraction_of_bound_extra_0": round(bound / slowest[last], 4) if bound else None,
        "compute_took_ms": round(took, 3) or None,
        "overhead_ms_per_micro_batch": round((slowest[first] - (took or bound)) / args.gas, 3),
        "stock_overhead_ms_per_micro_batch": round(
            (slowest["stock"] - (took or bound) / args.gas * (args.gas + args.stages - 1))
            / (args.gas + args.stages - 1),
            3,
        ),
        "stock_over_no_flush": round(slowest["stock"] / slowest[first], 3),
        "ideal_stock_over_no_flush": (args.gas + args.stages - 1) / args.gas,
        "mean_ms_an_action": {k: round(v, 3) for k, v in per_rank[middle][2].items() if k != "seconds"},
        "compute": "demo model" if args.real else f"sleep {args.forward_ms:g} + {args.backward_ms:g} ms",
        "stages": args.stages,
        "gas": args.gas,
        "extra_in_flight": args.extra_in_flight[0],
    }
    if args.record:
        record("pipeline", result)
    if args.json:
        print(json.dumps(result))
    else:
        for key, value in result.items():
            print(f"{key:28} {value}")


if __name__ == "__main__":
    main()
