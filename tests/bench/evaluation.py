"""How noisy a validation curve is by which weights each stage evaluates with: the newest, or those of one version.

    python tests/bench/evaluation.py --stages 4 --record

In the delay simulator: a small GPT, a block a stage, K = 1, AdamW, on the standard library's source. After every update
of the last part of a run the same held-out batches are evaluated. ``newest``: stage s has made lag(0) - lag(s) updates
more than stage 0, as between two calls of a full pipeline. ``aligned``: every stage at stage 0's version. ``drained``:
every stage's after all batches. Noise is the standard deviation of the curve's second differences over the square root
of six: that of independent noise on a line.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
from collections import deque
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch.func import functional_call  # noqa: E402

from noflush.compare.trial import share_of_rate  # noqa: E402
from noflush.demo import gpt, text  # noqa: E402
from noflush.methods.adamw import PipeDreamAdamW  # noqa: E402
from noflush.order.schedule import Schedule  # noqa: E402
from noflush.simulate import DelaySimulator  # noqa: E402
from tests.bench.record import record  # noqa: E402

BATCH, SEQUENCE, WIDTH, HEADS, VOCABULARY = 8, 64, 64, 4, 256
HELD_OUT = 8


@torch.no_grad()
def loss_of(modules, weights, batches):
    """Mean loss of ``batches`` with each stage's ``weights``."""
    losses = []
    for inputs, labels in batches:
        for module, of_stage in zip(modules, weights, strict=True):
            inputs = functional_call(module, of_stage, (inputs,))
        losses.append(gpt.next_token_loss(inputs, labels).item())
    return statistics.fmean(losses)


def curves(args, seed):
    """name -> losses after each of the last updates."""
    torch.manual_seed(seed)
    parts = gpt.split_by_blocks(gpt.gpt_layers(VOCABULARY, SEQUENCE, WIDTH, HEADS, args.stages), args.stages)
    schedule = Schedule(args.stages, 1)
    simulator = DelaySimulator(
        parts,
        gpt.next_token_loss,
        lambda weights: PipeDreamAdamW(weights, lr=args.lr, weight_decay=0.01),
        schedule,
        1.0,
        lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda u: share_of_rate(u, args.updates)),
    )
    training, held_out = text.corpus(None)
    stream = text.batches(training, BATCH, SEQUENCE, seed)
    batches = list(itertools.islice(text.batches(held_out, BATCH, SEQUENCE, 1), HELD_OUT))
    versions = deque(maxlen=args.stages)
    found = {"newest": [], "aligned": [], "drained": []}
    for update in range(args.updates):
        simulator.train_micro_batch(*next(stream))
        versions.append([{n: w.clone() for n, w in simulator.parameters(s).items()} for s in range(args.stages)])
        if update >= args.updates - args.last:
            lags = [schedule.lag(s) for s in range(args.stages)]
            for name, behind in (("newest", lags), ("aligned", [lags[0]] * len(lags)), ("drained", [0] * len(lags))):
                weights = [versions[-1 - lag][s] for s, lag in enumerate(behind)]
                found[name].append(loss_of(parts, weights, batches))
    return found


def noise(curve):
    """Of a curve without its trend."""
    bends = [a - 2 * b + c for a, b, c in zip(curve, curve[1:], curve[2:], strict=False)]
    return statistics.pstdev(bends) / 6**0.5


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--updates", type=int, default=300)
    parser.add_argument("--last", type=int, default=100, help="updates that are evaluated (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--record", action="store_true", help="append rows to results/evaluation.jsonl")
    args = parser.parse_args()
    torch.set_num_threads(1)
    by_seed = [curves(args, seed) for seed in range(1, args.seeds + 1)]
    for name in by_seed[0]:
        row = {
            **{key: value for key, value in vars(args).items() if key != "record"},
            "weights": name,
            "mean loss": [round(statistics.fmean(of[name]), 4) for of in by_seed],
            "noise": [round(noise(of[name]), 5) for of in by_seed],
        }
        print(json.dumps(row))
        if args.record:
            record("evaluation", row)


if __name__ == "__main__":
    main()
