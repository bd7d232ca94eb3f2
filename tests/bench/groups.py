"""Groups under faults: what the others lose while one dies, hangs or comes back, and while the lighthouse is gone.

    python tests/bench/groups.py --faults 30

Three groups of two stages, tiny, whose compute is slept (``--sleep-ms`` a forward), so that six processes on two cores
each have their own pace. Again and again something drawn by chance is struck: a rank or a whole group is killed, a rank
is stopped until its group gives it up, or the lighthouse is killed for ten seconds. Of the groups that were not struck:
the longest gap between two calls from then on, and calls a second after it against before. Then what was struck is
started again, and how long it took to be one of three again, and its loss against the others', are noted.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from noflush.demo.port import held_port  # noqa: E402
from tests.bench.record import record  # noqa: E402
from tests.multiproc.groups import LighthouseProcess  # noqa: E402
from tests.multiproc.ranks import _context  # noqa: E402

GROUPS, STAGES = 3, 2
AFTER_S = 8.0
"""For how long the others are watched."""


def rank_main(rank, port, where, name, log, sleep_s):
    """One rank of a group: a line a call, with time, calls, groups and loss."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(STAGES), LOCAL_WORLD_SIZE=str(STAGES),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1",
    )  # fmt: skip
    errors = os.open(f"{log}.err", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(errors, 1)
    os.dup2(errors, 2)
    import deepspeed
    import torch

    import noflush
    from noflush.demo.gpt import next_token_loss
    from tests.multiproc import training as t

    noflush.register()
    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo")

    def loss_fn(outputs, labels):
        time.sleep(sleep_s)
        return next_token_loss(outputs, labels)

    replicas = {"lighthouse": where, "average_every": 10, "fraction": 0.2, "timeout_s": 6.0, "name": name}
    block = {"replicas": replicas, "peer_timeout_s": 8.0}
    rule = {"type": "DelayAwareNAdamW", "params": {"lr": 1e-3, "betas": [0.99, 0.999]}}
    engine = t.build(STAGES, t.ds_config(1, rule, block), loss_fn=loss_fn)
    # Something to learn: each token is the one before it and one more.
    first = torch.Generator().manual_seed(hash(name) % 1000)
    with open(log, "a", buffering=1) as lines:
        while multiprocessing.parent_process().is_alive():
            start = torch.randint(0, 32, (3, 1), generator=first)
            tokens = (start + torch.arange(13)) % 32
            loss = engine.train_batch(iter([(tokens[:, :-1], tokens[:, 1:])]))
            lines.write(f"{time.time()} {engine.global_steps} {engine.group.averager.groups} {float(loss)}\n")


class Group:
    """One group's processes."""

    def __init__(self, name, where, folder, sleep_s):
        self.name, self._where, self._folder, self._sleep_s = name, where, folder, sleep_s
        self.processes, self._lives = [], 0

    def start(self):
        self._lives += 1
        with held_port() as port:
            self.logs = [self._folder / f"{self.name}-{self._lives}-{rank}" for rank in range(STAGES)]
            self.processes = [
                _context.Process(target=rank_main, args=(r, port, self._where, self.name, str(log), self._sleep_s))
                for r, log in enumerate(self.logs)
            ]
            for process in self.processes:
                process.start()
            deadline = time.time() + 120
            while not self.lines() and time.time() < deadline and all(p.is_alive() for p in self.processes):
                time.sleep(0.1)

    def end(self):
        for process in self.processes:
            if process.is_alive():
                process.kill()
            process.join()

    def lines(self):
        """(time, calls, groups, loss) of its last stage's calls."""
        log = self.logs[-1]
        found = [line.split() for line in log.read_text().splitlines()] if log.exists() else []
        return [(float(a), int(b), int(c), float(d)) for a, b, c, d in (f for f in found if len(f) == 4)]

    def settled(self):
        """Whether it is one of all groups."""
        found = self.lines()
        return bool(found) and found[-1][2] == GROUPS


def wait_for(condition, seconds, what):
    """How long it took; raises if it takes too long."""
    begun = time.time()
    while not condition():
        if time.time() - begun > seconds:
            raise TimeoutError(f"{what} in {seconds} s")
        time.sleep(0.1)
    return time.time() - begun


def rate(lines, begin, end):
    """Calls a second."""
    times = [line[0] for line in lines if begin <= line[0] < end]
    return (len(times) - 1) / (times[-1] - times[0]) if len(times) > 2 else 0.0


def strike(kind, group, lighthouse):
    """Does it; who was struck."""
    if kind == "lighthouse killed":
        lighthouse.kill()
        return None
    if kind == "group killed":
        for process in group.processes:
            process.kill()
    else:
        victim = random.choice(group.processes)
        os.kill(victim.pid, signal.SIGKILL if kind == "rank killed" else signal.SIGSTOP)
    return group


def main(args):
    """Prints one line a fault, and the figures of all."""
    random.seed(args.seed)
    kinds = ["rank killed", "rank stopped", "group killed", "lighthouse killed"]
    found = []
    with tempfile.TemporaryDirectory() as name, held_port() as port:
        where = f"127.0.0.1:{port}"
    with tempfile.TemporaryDirectory() as name:
        groups = [Group(f"g{n}", where, Path(name), args.sleep_ms / 1e3) for n in range(GROUPS)]
        lighthouse = LighthouseProcess(port)
        lighthouse.start()
        try:
            for group in groups:
                group.start()
            wait_for(lambda: all(group.settled() for group in groups), 60, "not all groups met")
            for number in range(args.faults):
                time.sleep(3 + 2 * random.random())
                kind = kinds[number % len(kinds)]
                at = time.time()
                struck = strike(kind, random.choice(groups), lighthouse)
                time.sleep(AFTER_S + (4 if kind == "rank stopped" else 0))
                now, gaps, rates = time.time(), [], []
                for group in (g for g in groups if g is not struck):
                    lines = group.lines()
                    times = [at, *(t for t, *_ in lines if t > at), now]
                    gaps.append(max(b - a for a, b in itertools.pairwise(times)))
                    before = rate(lines, at - 3, at)
                    rates.append(rate(lines, at, now) / before if before else 0.0)
                one = {"fault": kind, "longest_gap_s": round(max(gaps), 2), "rate": round(min(rates), 2)}
                if struck is None:
                    lighthouse.start()
                else:
                    struck.end()
                    begun = time.time()
                    struck.start()
                    one["started_again_s"] = round(time.time() - begun, 1)
                one["whole_again_s"] = round(
                    wait_for(lambda: all(group.settled() for group in groups), 90, f"not whole after {kind}"), 1
                )
                if struck is not None:
                    time.sleep(4)
                    losses = {g: statistics.mean(line[3] for line in g.lines()[-50:]) for g in groups}
                    others = [loss for g, loss in losses.items() if g is not struck]
                    one["loss_against_others"] = round(losses[struck] - statistics.mean(others), 4)
                print(json.dumps(one), flush=True)
                found.append(one)
        finally:
            for group in groups:
                if group.processes:
                    group.end()
            lighthouse.kill()
    result = {
        "groups": GROUPS, "stages": STAGES, "faults": len(found), "sleep_ms": args.sleep_ms, "seed": args.seed,
        **{kind: summary([one for one in found if one["fault"] == kind]) for kind in kinds},
    }  # fmt: skip
    print(json.dumps(result))
    if args.record:
        record("groups", result)


def summary(ones):
    """Worst and median of a kind of fault."""
    keys = ("longest_gap_s", "rate", "started_again_s", "whole_again_s", "loss_against_others")
    figures = {"count": len(ones)}
    for key in keys:
        values = [one[key] for one in ones if key in one]
        if values:
            worst = min(values) if key == "rate" else max(values, key=abs)
            figures[key] = {"median": statistics.median(values), "worst": worst}
    return figures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for option, default in {"faults": 30, "sleep-ms": 20, "seed": 1}.items():
        parser.add_argument(f"--{option}", type=int, default=default)
    parser.add_argument("--record", action="store_true")
    main(parser.parse_args())
