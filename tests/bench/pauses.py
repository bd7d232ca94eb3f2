"""How long a checkpoint and an evaluation hold up a pipeline that never flushes, in times of a micro-batch.

    python tests/bench/pauses.py --stages 4 --megabytes 4

Compute is a sleep inside the real engine (forward 20 ms, backward 40 ms); a stage has ``--megabytes`` of weights, and
NAdam's state three times as much. Turns of ``--calls`` calls follow each other without a barrier, one of each kind a
round: nothing in the middle; an evaluation of ``--eval`` micro-batches; a checkpoint after a drain, as one had to be
taken before pipelines could be saved full; a full one; a full one that is written in the background. A pause is the
time of a turn beyond the median of those with nothing in them, of the slowest stage; a background write ends within
its turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.bench.pipeline import sleeping_layers  # noqa: E402
from tests.bench.record import record  # noqa: E402
from tests.multiproc.ranks import run_ranks  # noqa: E402

KINDS = ("nothing", "evaluation", "drain and save", "save", "save in the background")


def build(args, background):
    import deepspeed
    import torch
    from deepspeed.pipe import PipelineModule
    from torch import nn

    layers, sample, loss_fn = sleeping_layers(args.stages, args.forward_ms / 1e3, args.backward_ms / 1e3)
    for layer in layers:
        layer.ballast = nn.Parameter(torch.zeros(args.megabytes * 2**18))
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": args.gas,
        "optimizer": {"type": "DelayAwareNAdamW", "params": {"lr": 1e-4}},
        "gradient_clipping": 0.0,
        "steps_per_print": 10**9,
        "async_pipeline": {"async_save": background},
    }
    module = PipelineModule(layers=layers, num_stages=args.stages, loss_fn=loss_fn, partition_method="type:Block")
    engine, *_ = deepspeed.initialize(model=module, config=config)
    return engine, sample


def measure(rank, args, folder):
    engines = {background: build(args, background) for background in (False, True)}
    took = {kind: [] for kind in KINDS}
    for number in range(args.rounds + 1):
        for kind in KINDS:
            engine, sample = engines[kind.endswith("background")]

            def train(calls, engine=engine, sample=sample):
                for _ in range(calls):
                    engine.train_batch(iter([sample] * args.gas))

            train(2 * args.stages)  # full, and its stages apart as they are in the long run
            start = time.perf_counter()
            train(args.calls // 3)
            if kind == "evaluation":
                engine.eval_batch(iter([sample] * args.eval), num_micro_batches=args.eval, bcast_loss=False)
            elif kind != "nothing":
                if kind.startswith("drain"):
                    engine.drain()
                engine.save_checkpoint(folder, tag="pause")
            train(args.calls - args.calls // 3)
            if number:  # the first round warms up
                took[kind].append(time.perf_counter() - start)
            engine.finish_saves()
            engine.drain()
    return took


def main(args):
    with tempfile.TemporaryDirectory() as folder:
        ranks = run_ranks(measure, args.stages, timeout=3000, args=args, folder=folder)
    slowest = {kind: [max(turn) for turn in zip(*(rank[kind] for rank in ranks), strict=True)] for kind in KINDS}
    usual = statistics.median(slowest["nothing"])
    micro_batch = usual / args.calls / args.gas
    pauses = {kind: round((statistics.median(slowest[kind]) - usual) / micro_batch, 2) for kind in KINDS[1:]}
    result = vars(args) | {"micro_batch_ms": round(micro_batch * 1e3, 2), "pauses_in_micro_batches": pauses}
    print(json.dumps(result))
    if args.record:
        record("pauses", {key: value for key, value in result.items() if key != "record"})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    numbers = {"stages": 4, "gas": 1, "megabytes": 4, "eval": 8, "calls": 60, "rounds": 5}
    for name, default in numbers.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--forward-ms", type=float, default=20)
    parser.add_argument("--backward-ms", type=float, default=40)
    parser.add_argument("--record", action="store_true")
    main(parser.parse_args())
