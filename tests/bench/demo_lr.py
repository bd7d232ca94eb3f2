"""Which learning rate is best for each of the demo's two runs, by the delay simulator (bit-equal to the engine).

    python tests/bench/demo_lr.py --lr 5e-4 1e-3 2e-3 4e-3 --record

Appends a row a run to results/demo_lr.jsonl.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from deepspeed.runtime.lr_schedules import WarmupCosineLR  # noqa: E402

from noflush.demo import gpt, text  # noqa: E402
from noflush.methods import DelayAwareNAdamW  # noqa: E402
from noflush.order.schedule import Schedule  # noqa: E402
from noflush.simulate import DelaySimulator, Precision  # noqa: E402
from tests.bench.record import record  # noqa: E402


def validation_loss(args, name, lr, data):
    torch.manual_seed(args.seed)
    layers = gpt.gpt_layers(text.VOCABULARY, 128, 128, 4, args.stages)
    simulator = DelaySimulator(
        gpt.split_by_blocks(layers, args.stages),
        gpt.next_token_loss,
        lambda ps: DelayAwareNAdamW(
            ps,
            lr=lr,
            betas=(args.beta1, 0.999),
            weight_decay=0.01,
            momentum_schedule=args.momentum_schedule,
            moments=args.moments,
        ),
        Schedule(args.stages, 1, name),
        clip=1.0,
        make_lr_scheduler=lambda o: WarmupCosineLR(o, args.steps, warmup_num_steps=args.steps // 20, cos_min_ratio=0.1),
        precision=Precision(torch.bfloat16 if args.weights == "bf16" else torch.float32),
    )
    training, validation = data
    stream = text.batches(training, 8, 128, args.seed)
    for _ in range(args.steps):
        simulator.train_micro_batch(*next(stream))
    held_out = text.batches(validation, 8, 128, seed=0)
    return torch.stack([simulator.evaluate(*next(held_out)) for _ in range(16)]).mean().item()


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--lr", type=float, nargs="+", default=[5e-4, 1e-3, 2e-3, 4e-3])
    p.add_argument("--stages", type=int, default=4)
    p.add_argument("--steps", type=int, default=600)
    p.add_argument("--beta1", type=float, default=0.99)
    p.add_argument("--momentum-schedule", default="nadam")
    p.add_argument("--moments", choices=["fp32", "bf16"], default="fp32")
    p.add_argument("--weights", choices=["fp32", "bf16"], default="fp32", help="bf16: with float32 masters")
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--record", action="store_true")
    args = p.parse_args()
    torch.set_num_threads(1)
    data = text.corpus()
    for lr in args.lr:
        for name in ("1f1b_flush", "1f1b_no_flush"):
            row = vars(args) | {"schedule": name, "lr": lr, "val_loss": validation_loss(args, name, lr, data)}
            print(json.dumps(row), flush=True)
            if args.record:
                record("demo_lr", row)


if __name__ == "__main__":
    main()
