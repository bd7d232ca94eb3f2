"""What groups without a barrier cost in tokens: the method's authors' setting, 8 stages x 3 groups, in the simulator.

    python tests/bench/token_tax.py --updates 2400 --search 600 --seeds 1 --record

A small GPT on the bytes of Python's standard library. Every contestant sees the same tokens; each has the best of three
learning rates, and of up to two more where the best is the smallest or the largest tried; searched by runs of
``--search`` updates. Against data parallelism with a flush (one pipeline, batches three times as large, as many
tokens), three groups that average 5 % of each stage's weights every 20 updates, heard of 10 updates later. Losses
are of held-out text.
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

import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from noflush.compare.trial import share_of_rate  # noqa: E402
from noflush.demo import gpt, text  # noqa: E402
from noflush.methods import DelayAwareMuon, DelayAwareNAdamW, PipeDreamAdamW  # noqa: E402
from noflush.order.averaging import Exchange, Part, slice_of  # noqa: E402
from noflush.order.schedule import Schedule  # noqa: E402
from noflush.replicas.simulate import GroupsSimulator, SimulatedGroup  # noqa: E402
from noflush.simulate import DelaySimulator  # noqa: E402
from tests.bench.record import record  # noqa: E402

STAGES, GROUPS = 8, 3
EVERY, FRACTION, LATE = 20, 0.05, 10
WIDTH, HEADS, SEQUENCE, BATCH = 32, 2, 32, 4
EQ13 = {"stage_momentum": True, "betas": (0.9, 0.999), "momentum_schedule": "constant", "lr_discount_steps": 100}
NO_FLUSH = "1f1b_no_flush"
# Optimizer, weight policy, schedule, groups, learning rates.
CONTESTANTS = {
    "AdamW, data parallel with the flush": (PipeDreamAdamW, {}, "stash", "1f1b_flush", 1, (1e-3, 2e-3, 4e-3)),
    "AdamW, no stash": (PipeDreamAdamW, {}, "latest", NO_FLUSH, GROUPS, (3e-4, 1e-3, 2e-3)),
    "Eq 13, no stash": (DelayAwareNAdamW, EQ13, "latest", NO_FLUSH, GROUPS, (3e-4, 1e-3, 2e-3)),
    "Muon looking ahead": (DelayAwareMuon, {"look_ahead": 0.9}, "stash", NO_FLUSH, GROUPS, (4e-3, 8e-3, 1.6e-2)),
    "Muon, data parallel with the flush": (DelayAwareMuon, {}, "stash", "1f1b_flush", 1, (8e-3, 1.6e-2, 3.2e-2)),
}


def exchanges(updates, elements):
    """Of one stage: a round every EVERY updates, heard of LATE updates later by all groups alike."""
    found = []
    for number, sent in enumerate(range(EVERY, updates - LATE, EVERY)):
        start, length = slice_of(number, elements, FRACTION)
        parts = tuple(Part(str(g), sent, float(EVERY)) for g in range(GROUPS))
        found.append(Exchange(number, start, length, sent, sent + LATE, parts))
    return found


def train(name, lr, updates, seed, training, held_out, points):
    """Held-out losses at ``points`` shares of the tokens, of the first group (they are averaged)."""
    rule, options, weights, schedule, groups, _ = CONTESTANTS[name]
    batch = BATCH * (GROUPS // groups)
    evaluated = list(itertools.islice(text.batches(held_out, 16, SEQUENCE, 0), 16))
    losses, at = [], {max(1, round(share * updates)) for share in points}

    def make_simulator():
        torch.manual_seed(seed)
        layers = gpt.gpt_layers(text.VOCABULARY, SEQUENCE, WIDTH, HEADS, STAGES)
        return DelaySimulator(
            gpt.split_by_blocks(layers, STAGES), gpt.next_token_loss, lambda ps: rule(list(ps), lr=lr, **options),
            Schedule(STAGES, 1, schedule, weights), clip=1.0,
            make_lr_scheduler=lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda n: share_of_rate(n, updates)),
        )  # fmt: skip

    simulators = [make_simulator() for _ in range(groups)]
    elements = [simulators[0].true_flat(stage).numel() for stage in range(STAGES)]
    heard = [exchanges(updates, count) for count in elements] if groups > 1 else [[] for _ in elements]
    runs = []
    for number, simulator in enumerate(simulators):
        stream = text.batches(training, batch, SEQUENCE, 1000 * seed + number)
        runs.append(SimulatedGroup(str(number), simulator, list(itertools.islice(stream, updates)), heard))
    fleet = GroupsSimulator(runs, "corrected")
    follow = simulators[0].after_update

    def watch(stage, update):
        follow(stage, update)
        if stage == STAGES - 1 and update in at:
            losses.append(statistics.fmean(simulators[0].evaluate(*b).item() for b in evaluated))

    simulators[0].after_update = watch
    fleet.run()
    return losses


def tax(curve, target, points):
    """By how many tokens more ``curve`` reaches the loss that ``target`` ends with; None: it does not."""
    end = target[-1]
    for (share, loss), (following, after) in itertools.pairwise(zip(points, curve, strict=True)):
        if after <= end:
            part = (loss - end) / (loss - after) if loss > after else 0.0
            return round(share + max(0.0, part) * (following - share), 2)
    return None


def search(name, rates, loss_at):
    """Losses by learning rate: of ``rates``, and of at most two more beyond an end at which the best one lies."""
    trials = {}
    for lr in rates:
        trials[lr] = tried(name, lr, loss_at)
    for _ in range(2):
        best = min(trials, key=trials.get)
        if best not in (min(trials), max(trials)):
            break
        further = best / 2 if best == min(trials) else best * 2
        trials[further] = tried(name, further, loss_at)
    return trials


def tried(name, lr, loss_at):
    """Infinite where it diverged."""
    try:
        loss = loss_at(lr)
    except (ValueError, RuntimeError) as error:
        print(name, lr, error, file=sys.stderr)
        return math.inf
    print(f"{name} lr {lr:g}: {loss:.4f}", file=sys.stderr, flush=True)
    return loss if math.isfinite(loss) else math.inf


def main(args):
    """Prints one line a contestant."""
    torch.set_num_threads(1)
    training, held_out = text.corpus()
    points = [n / 20 for n in range(1, 21)]
    found = {}
    for name, (*_, rates) in CONTESTANTS.items():
        begun = time.monotonic()
        trials = search(name, rates, lambda lr, name=name: train(name, lr, args.search or args.updates, 0, training,
                                                                 held_out, [1.0])[-1])  # fmt: skip
        best = min(trials, key=trials.get)
        seeds = range(1, args.seeds + 1)
        curves = [train(name, best, args.updates, seed, training, held_out, points) for seed in seeds]
        curve = [statistics.fmean(of) for of in zip(*curves, strict=True)]
        found[name] = {
            "lr": best, "tried": {f"{lr:g}": round(loss, 4) for lr, loss in trials.items()},
            "loss": round(curve[-1], 4), "of_seeds": [round(of[-1], 4) for of in curves], "curve": curve,
            "minutes": round((time.monotonic() - begun) / 60, 1),
        }  # fmt: skip
        print(json.dumps({name: found[name]}), flush=True)
    sync = found["AdamW, data parallel with the flush"]["curve"]
    result = {
        "stages": STAGES, "groups": GROUPS, "average_every": EVERY, "fraction": FRACTION, "late": LATE,
        "updates": args.updates, "of_a_search": args.search or args.updates,
        "tokens": args.updates * BATCH * GROUPS * SEQUENCE, "seeds": args.seeds,
        "contestants": {
            name: {key: value for key, value in one.items() if key != "curve"}
            | {"share_of_tokens_to_adamw_data_parallel": tax(one["curve"], sync, points)}
            for name, one in found.items()
        },
        "adamw_data_parallel_share_of_tokens_to_reach": {
            name: tax(sync, one["curve"], points) for name, one in found.items()
        },
    }  # fmt: skip
    print(json.dumps(result))
    if args.record:
        record("token_tax", result)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--updates", type=int, default=400)
    parser.add_argument("--search", type=int, help="updates of a search's runs (default: as many)")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--record", action="store_true")
    main(parser.parse_args())
