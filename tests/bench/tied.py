"""Time of a ``train_batch`` call with a tied embedding against an untied one, without a flush, both in turns.

    python tests/bench/tied.py --stages 2 --gas 1 --vocabulary 8192

The demo's GPT in DeepSpeed's engine under noflush, over gloo. A turn is ``--calls`` calls of every rank between two
barriers; figures are medians over the turns.
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

SIZES = {"sequence": 128, "width": 128, "heads": 4, "depth": 4, "micro_batch": 8}


def engine_of(stages, gas, vocabulary, tied):
    import deepspeed
    from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
    from torch import nn

    from noflush.demo.gpt import Block, Embedding, next_token_loss

    sizes = vocabulary, SIZES["sequence"], SIZES["width"]

    def as_head(embedding, hidden):
        return nn.functional.linear(hidden, embedding.token.weight)

    first = LayerSpec(Embedding, *sizes)
    last = LayerSpec(nn.Linear, SIZES["width"], vocabulary, bias=False)
    if tied:
        first = TiedLayerSpec("embed", Embedding, *sizes, tied_weight_attr="token.weight")
        last = TiedLayerSpec("embed", Embedding, *sizes, forward_fn=as_head, tied_weight_attr="token.weight")
    blocks = [LayerSpec(Block, SIZES["width"], SIZES["heads"], SIZES["depth"]) for _ in range(SIZES["depth"])]
    norm = LayerSpec(nn.LayerNorm, SIZES["width"])
    module = PipelineModule(
        layers=[first, *blocks, norm, last], num_stages=stages, loss_fn=next_token_loss, partition_method="type:Block"
    )
    config = {
        "train_micro_batch_size_per_gpu": SIZES["micro_batch"],
        "gradient_accumulation_steps": gas,
        "optimizer": {"type": "DelayAwareNAdamW", "params": {"lr": 1e-3}},
        "steps_per_print": 10**9,
        "async_pipeline": {},
    }
    return deepspeed.initialize(model=module, config=config)[0]


def measure(rank, stages, gas, vocabulary, turns, calls):
    import torch
    import torch.distributed as dist

    engines = {name: engine_of(stages, gas, vocabulary, name == "tied") for name in ("tied", "untied")}
    shape = SIZES["micro_batch"], SIZES["sequence"]
    batch = torch.randint(vocabulary, shape), torch.randint(vocabulary, shape)
    took = {name: [] for name in engines}
    for turn in range(turns + 1):
        for name, engine in engines.items():
            dist.barrier()
            start = time.perf_counter()
            for _ in range(calls):
                engine.train_batch(data_iter=itertools.repeat(batch, gas))
            dist.barrier()
            if turn:  # the first fills the pipelines
                took[name].append((time.perf_counter() - start) / calls)
    return took


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--stages", type=int, default=2)
    p.add_argument("--gas", type=int, default=1)
    p.add_argument("--vocabulary", type=int, default=256)
    p.add_argument("--turns", type=int, default=9)
    p.add_argument("--calls", type=int, default=12)
    p.add_argument("--record", action="store_true")
    args = p.parse_args()
    how = {"stages": args.stages, "gas": args.gas, "vocabulary": args.vocabulary}
    took = run_ranks(measure, args.stages, timeout=280, **how, turns=args.turns, calls=args.calls)[0]
    result = how | SIZES | {"calls": args.calls}
    for name, seconds in took.items():
        result[f"{name}_ms"] = round(1e3 * statistics.median(seconds), 2)
        result[f"{name}_ms_of_turns"] = [round(1e3 * s, 2) for s in seconds]
    print(json.dumps(result))
    if args.record:
        record("tied", result)


if __name__ == "__main__":
    main()
