"""Trains a small byte-level GPT on real text with DeepSpeed's pipeline engine; nothing here knows about noflush.

    deepspeed --num_gpus 4 --module noflush.run examples/train_gpt.py --deepspeed_config examples/ds_config.json

`compare.py` runs it with and without the flush.
"""

import argparse
import json
import time
from pathlib import Path

import deepspeed
import torch
from deepspeed.pipe import PipelineModule

from noflush.demo.gpt import gpt_layers, next_token_loss
from noflush.demo.text import VOCABULARY, batches, corpus


def parse():
    p = argparse.ArgumentParser()
    p.add_argument("--stages", type=int, default=4)
    p.add_argument("--steps", type=int, default=600)
    p.add_argument("--depth", type=int, default=4, help="transformer blocks")
    p.add_argument("--width", type=int, default=128)
    p.add_argument("--heads", type=int, default=4)
    p.add_argument("--sequence", type=int, default=128)
    p.add_argument("--eval-every", type=int, default=60)
    p.add_argument("--eval-batches", type=int, default=16)
    p.add_argument("--text", help="a text file (default: the source of Python's standard library)")
    p.add_argument("--out", help="write the loss curves into this JSON file")
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--local_rank", type=int)
    deepspeed.add_config_arguments(p)
    return p.parse_args()


def main():
    args = parse()
    torch.set_num_threads(1)  # one core a stage
    if not torch.cuda.is_available():
        # DeepSpeed would compile a collective that training never calls.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed()
    training, validation = corpus(args.text)
    torch.manual_seed(args.seed)
    layers = gpt_layers(VOCABULARY, args.sequence, args.width, args.heads, args.depth)
    module = PipelineModule(
        layers=layers, num_stages=args.stages, loss_fn=next_token_loss, partition_method="type:Block"
    )
    engine, *_ = deepspeed.initialize(model=module, config=args.deepspeed_config)
    batch = engine.train_micro_batch_size_per_gpu()
    data = batches(training, batch, args.sequence, args.seed)

    curve, seconds = [], 0.0
    for step in range(1, args.steps + 1):
        start = time.perf_counter()
        loss = engine.train_batch(data_iter=data)
        seconds += time.perf_counter() - start
        if step % args.eval_every == 0 or step == args.steps:
            held_out = batches(validation, batch, args.sequence, seed=0)
            value = engine.eval_batch(data_iter=held_out, num_micro_batches=args.eval_batches).item()
            tokens = step * engine.train_batch_size() * args.sequence
            curve.append({"step": step, "tokens": tokens, "seconds": seconds, "val_loss": value})
            if engine.global_rank == 0:
                print(f"step {step}/{args.steps} train {loss.item():.3f} validation {value:.4f} nats", flush=True)
    if args.out and engine.global_rank == 0:
        Path(args.out).write_text(json.dumps(curve))


if __name__ == "__main__":
    main()
