"""Validation loss with each form on the wire against none, in the delay simulator: the same data, weights and updates.

    python tests/bench/wire.py --record

A byte-level GPT of one block a stage on the standard library's source, K = 1, without the flush; every form from the
same seeds. What a form changes is the difference to ``model`` at the same seed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
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
from noflush.order.wire_format import Wire  # noqa: E402
from noflush.simulate import DelaySimulator  # noqa: E402
from tests.bench.record import record  # noqa: E402

FORMS = {
    "model": "model",
    "bf16": "bf16",
    "int8": "int8",
    "int4": "int4",
    "int8 down, int4 up": {"activations": "int8", "gradients": "int4"},
}
_EVALUATED = 48


def loss_of(args, corpus, stages, seed, form):
    """Validation loss in nats at the end; inf where training has diverged."""
    training, held_out = corpus
    torch.manual_seed(seed)
    layers = gpt.gpt_layers(text.VOCABULARY, args.sequence, args.width, 4, stages)
    rule, params = load(args.optimizer), json.loads(args.optimizer_params)
    simulator = DelaySimulator(
        gpt.split_by_blocks(layers, stages),
        gpt.next_token_loss,
        lambda weights: rule(weights, lr=args.lr, **params),
        Schedule(stages, 1),
        clip=1.0,
        make_lr_scheduler=lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda u: share_of_rate(u, args.updates)),
        wire=Wire.read(FORMS[form]),
    )
    stream = text.batches(training, args.batch, args.sequence, seed)
    for batch in itertools.islice(stream, args.updates):
        if not math.isfinite(simulator.train_micro_batch(*batch).item()):
            return math.inf
    batches = itertools.islice(text.batches(held_out, args.batch, args.sequence, 0), _EVALUATED)
    with torch.no_grad():
        return statistics.fmean(simulator.evaluate(*batch).item() for batch in batches)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--stages", type=int, nargs="+", default=[4, 8])
    p.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    p.add_argument("--updates", type=int, default=300)
    p.add_argument("--batch", type=int, default=8)
    p.add_argument("--sequence", type=int, default=64)
    p.add_argument("--width", type=int, default=64)
    p.add_argument("--optimizer", default="DelayAwareMuon")
    p.add_argument("--optimizer-params", default='{"look_ahead": 0.9}')
    p.add_argument("--lr", type=float, default=8e-3)
    p.add_argument("--only", nargs="+", choices=tuple(FORMS), metavar="FORM", default=list(FORMS))
    p.add_argument("--record", action="store_true", help="append a row a depth to tests/bench/results/wire.jsonl")
    args = p.parse_args()
    torch.set_num_threads(1)
    corpus = text.corpus()
    for stages in args.stages:
        losses = {form: [] for form in args.only}
        for seed, form in itertools.product(args.seeds, args.only):
            since = time.perf_counter()
            losses[form].append(round(loss_of(args, corpus, stages, seed, form), 4))
            print(
                f"P={stages} seed {seed} {form}: {losses[form][-1]} ({time.perf_counter() - since:.0f} s)", flush=True
            )
        none = losses[args.only[0]]
        result = {
            "stages": stages,
            "updates": args.updates,
            "tokens_per_update": args.batch * args.sequence,
            "width": args.width,
            "optimizer": args.optimizer,
            "lr": args.lr,
            "seeds": args.seeds,
            "losses": losses,
            "more_than_none": {
                form: [round(loss - plain, 4) for loss, plain in zip(found, none, strict=True)]
                for form, found in losses.items()
            },
        }
        print(json.dumps(result))
        if args.record:
            record("wire", result)


if __name__ == "__main__":
    main()
