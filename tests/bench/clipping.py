"""What clipping by stage, and by a late norm of the whole pipeline, costs in loss beside clipping by the norm of now.

    python tests/bench/clipping.py --stages 4 --optimizer AdamW --record

In the delay simulator: a small GPT, a block a stage, K = 1, on the standard library's source. All contestants have the
same first weights, batches and learning rates; the losses are of held-out text after the last update.
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

import torch  # noqa: E402

from noflush.compare.trial import share_of_rate  # noqa: E402
from noflush.demo import gpt, text  # noqa: E402
from noflush.methods.table import load  # noqa: E402
from noflush.order.schedule import Schedule  # noqa: E402
from noflush.simulate import DelaySimulator  # noqa: E402
from tests.bench.record import record  # noqa: E402

BATCH, SEQUENCE, WIDTH, HEADS, VOCABULARY = 8, 64, 64, 4, 256
HELD_OUT = 64
OPTIMIZERS = {
    "AdamW": ("PipeDreamAdamW", {"weight_decay": 0.01}),
    "Muon": ("DelayAwareMuon", {"weight_decay": 0.01, "look_ahead": 0.9}),
}
"""Name -> noflush's rule, and its parameters."""
WAYS = {
    "flush, global": ("1f1b_flush", "global", 0.0),
    "global, known at once": ("1f1b_no_flush", "global", 0.0),
    "lagged_global": ("1f1b_no_flush", "lagged_global", 0.0),
    "stage, 1/sqrt(P)": ("1f1b_no_flush", "stage", 0.5),
    "stage, all of it": ("1f1b_no_flush", "stage", 0.0),
    "nothing": ("1f1b_no_flush", None, 0.0),
}
"""Name -> schedule, what clips, and by which power of P the threshold is divided."""


class Corpus:
    """Training text, and the batches that losses are of."""

    def __init__(self):
        self.training, held_out = text.corpus(None)
        self.held_out = list(itertools.islice(text.batches(held_out, BATCH, SEQUENCE, 1), HELD_OUT))


def trial(args, corpus, way, seed):
    """(loss on held-out text, the norms of all stages together by update)."""
    schedule, clip_by, power = WAYS[way]
    torch.manual_seed(seed)
    parts = gpt.split_by_blocks(gpt.gpt_layers(VOCABULARY, SEQUENCE, WIDTH, HEADS, args.stages), args.stages)
    rule, params = OPTIMIZERS[args.optimizer]
    simulator = DelaySimulator(
        parts,
        gpt.next_token_loss,
        lambda weights: load(rule)(weights, lr=args.lr, **params),
        Schedule(args.stages, 1, schedule),
        args.clip / args.stages**power if clip_by else 0.0,
        lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda u: share_of_rate(u, args.updates)),
        clip_by=clip_by or "stage",
    )
    stream = text.batches(corpus.training, BATCH, SEQUENCE, seed)
    for _ in range(args.updates):
        simulator.train_micro_batch(*next(stream))
    loss = statistics.fmean(simulator.evaluate(*batch).item() for batch in corpus.held_out)
    return loss, simulator.norms


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="AdamW")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--clip", type=float, default=1.0)
    parser.add_argument("--updates", type=int, default=800)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS))
    parser.add_argument("--record", action="store_true", help="append rows to results/clipping.jsonl")
    args = parser.parse_args()
    torch.set_num_threads(1)
    corpus = Corpus()
    for way in args.ways:
        since = time.perf_counter()
        found = [trial(args, corpus, way, seed) for seed in range(1, args.seeds + 1)]
        losses, norms = [loss for loss, _ in found], [norm for _, of_run in found for norm in of_run]
        row = {
            **{key: value for key, value in vars(args).items() if key not in ("ways", "record")},
            "way": way,
            "losses": [round(loss, 4) for loss in losses],
            "mean": round(statistics.fmean(losses), 4),
            "norm, median": round(statistics.median(norms), 3),
            "norm, largest": round(max(norms), 2),
            "share of updates with a norm above clip": round(sum(n > args.clip for n in norms) / len(norms), 3),
            "seconds": round(time.perf_counter() - since, 1),
        }
        print(json.dumps(row))
        if args.record:
            record("clipping", row)


if __name__ == "__main__":
    main()
