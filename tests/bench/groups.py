"""Groups under faults: what the others lose while one dies, hangs or comes back, and while the lighthouse is gone.

    python tests/bench/groups.py --faults 30

Three groups of two stages, tiny, whose compute is slept (``--sleep-ms`` a forward), so that six processes on two cores
each have their own pace. Each group has a host, and so has the lighthouse: a network namespace behind a link of its own
(`wan_parts/network.py`, root). Again and again something drawn by chance is struck: a rank or a whole group is killed,
a rank is stopped until its group gives it up, the lighthouse is killed for eight seconds, or a group's link is slow, so
that its rounds come late, or so slow that none ends in time. Of the groups that were not struck: the longest gap
between two calls from then on, and calls a second after it against before. Of a group whose link is slow, the same: its
pipeline need not wait either. Then what was struck is started again, or its link restored, and how long it took to be
one of three again, and its loss against the others', are noted.
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

from tests.bench.group_parts.apart import LighthouseApart, be_rank  # noqa: E402
from tests.bench.record import record  # noqa: E402
from tests.bench.wan_parts.network import Links, Wan, running  # noqa: E402
from tests.multiproc.ranks import CONTEXT  # noqa: E402

GROUPS, STAGES = 3, 2
AFTER_S = {"rank stopped": 12.0, "link slow": 12.0, "link dead slow": 20.0}
"""For how long all are watched, where it is not 8 s: until a stopped rank was given up; for several rounds."""
KINDS = ["nothing", "rank killed", "rank stopped", "group killed", "lighthouse killed", "link slow", "link dead slow"]
"""``nothing`` is there to be compared with: what the machine, which others use too, does by itself."""
SLOW = {"link slow": (200e3, 0.3), "link dead slow": (4e3, 1.5)}
"""Bits a second of a slow link, in and out, and seconds one way."""


def rank_main(place, where, bind, name, log, sleep_s):
    """One rank of a group: a line a call, with time, calls, groups, loss and averages applied."""
    os.nice(-15)  # before whatever else this machine runs, so that a gap is the groups' own
    be_rank(**place)
    import torch

    from noflush.demo.gpt import next_token_loss
    from tests.multiproc import training as t

    def loss_fn(outputs, labels):
        time.sleep(sleep_s)
        return next_token_loss(outputs, labels)

    replicas = {"lighthouse": where, "average_every": 10, "fraction": 0.2, "timeout_s": 6.0, "name": name, "bind": bind}
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
            averager, calls = engine.group.averager, engine.global_steps
            lines.write(f"{time.time()} {calls} {averager.groups} {float(loss)} {len(averager.exchanges)}\n")


class Group:
    """One group's processes, on host number ``host``."""

    def __init__(self, host, wan, where, folder, sleep_s):
        self.host, self._wan, self._where, self._folder, self._sleep_s = host, wan, where, folder, sleep_s
        self.processes, self._lives = [], 0

    def start(self):
        self._lives += 1
        self.logs = [self._folder / f"g{self.host}-{self._lives}-{rank}" for rank in range(STAGES)]
        place = {"world": STAGES, "port": 29531, "master": "127.0.0.1", "name": self._wan.name(self.host)}
        rest = self._where, self._wan.address(self.host), f"g{self.host}"
        self.processes = [
            CONTEXT.Process(
                target=rank_main, args=(place | {"rank": rank, "log": f"{log}.err"}, *rest, str(log), self._sleep_s)
            )
            for rank, log in enumerate(self.logs)
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
        """(time, calls, groups, loss, averages) of its last stage's calls."""
        log = self.logs[-1]
        found = [line.split() for line in log.read_text().splitlines()] if log.exists() else []
        whole = (words for words in found if len(words) == 5)
        return [(float(a), int(b), int(c), float(d), int(e)) for a, b, c, d, e in whole]

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


def averages(lines, begin, end):
    """A second."""
    counts = [line[4] for line in lines if begin <= line[0] < end]
    return (counts[-1] - counts[0]) / (end - begin) if counts else 0.0


def strike(kind, group, lighthouse, links):
    """Does it; who was struck."""
    if kind == "nothing":
        return None
    if kind == "lighthouse killed":
        lighthouse.kill()
        return None
    if kind in SLOW:
        links.change(group.host, *SLOW[kind])
    elif kind == "group killed":
        for process in group.processes:
            process.kill()
    else:
        victim = random.choice(group.processes)
        os.kill(victim.pid, signal.SIGKILL if kind == "rank killed" else signal.SIGSTOP)
    return group


def watched(groups, at, now):
    """The longest gap between calls since ``at``, and the least rate against what was before, of ``groups``."""
    gaps, rates = [], []
    for group in groups:
        lines = group.lines()
        times = [at, *(line[0] for line in lines if line[0] > at), now]
        gaps.append(max(b - a for a, b in itertools.pairwise(times)))
        before = rate(lines, at - 3, at)
        rates.append(rate(lines, at, now) / before if before else 0.0)
    return round(max(gaps), 2), round(min(rates), 2)


def disturb(kind, groups, lighthouse, links):
    """Strikes once, mends it, and returns what it did to the others."""
    at = time.time()
    struck = strike(kind, random.choice(groups), lighthouse, links)
    time.sleep(AFTER_S.get(kind, 8.0))
    now, others = time.time(), [group for group in groups if group is not struck]
    one = {"fault": kind, "load": round(os.getloadavg()[0], 1)}
    one["longest_gap_s"], one["rate"] = watched(others, at, now)
    if kind in SLOW:
        one["its_own_gap_s"], one["its_own_rate"] = watched([struck], at, now)
        one["its_averages_a_s"] = round(averages(struck.lines(), at, now), 2)
        one["averages_a_s"] = round(min(averages(group.lines(), at, now) for group in others), 2)
        one["averages_a_s_before"] = round(averages(others[0].lines(), at - 3, at), 2)
        links.restore(struck.host)
    elif kind == "lighthouse killed":
        lighthouse.start()
    elif struck is not None:
        struck.end()
        begun = time.time()
        struck.start()
        one["started_again_s"] = round(time.time() - begun, 1)
    mended = wait_for(lambda: all(group.settled() for group in groups), 90, f"not whole after {kind}")
    one["whole_again_s"] = round(mended, 1)
    if struck is not None:
        time.sleep(4)
        losses = {group: statistics.mean(line[3] for line in group.lines()[-50:]) for group in groups}
        one["loss_against_others"] = round(losses[struck] - statistics.mean(losses[other] for other in others), 4)
    return one


def main(args):
    """Prints one line a fault, and the figures of all."""
    random.seed(args.seed)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the namespaces go
    kinds, found = args.only or KINDS, []
    wan = Wan(GROUPS + 1, args.delay_ms / 1e3, 0.0, args.mbit * 1e6, 1500)
    links = Links(wan)
    with tempfile.TemporaryDirectory() as name, running(wan, links):
        lighthouse = LighthouseApart(wan, join_timeout_s=1.0)
        groups = [Group(n, wan, lighthouse.address, Path(name), args.sleep_ms / 1e3) for n in range(GROUPS)]
        lighthouse.start()
        try:
            for group in groups:
                group.start()
            wait_for(lambda: all(group.settled() for group in groups), 60, "not all groups met")
            for number in range(args.faults):
                time.sleep(3 + 2 * random.random())
                found.append(disturb(kinds[number % len(kinds)], groups, lighthouse, links))
                print(json.dumps(found[-1]), flush=True)
        finally:
            for group in groups:
                if group.processes:
                    group.end()
            lighthouse.kill()
    result = {
        "groups": GROUPS, "stages": STAGES, "faults": len(found), "sleep_ms": args.sleep_ms, "seed": args.seed,
        "mbit": args.mbit, "delay_ms": args.delay_ms, "load": [round(n, 1) for n in os.getloadavg()],
        **{kind: summary([one for one in found if one["fault"] == kind]) for kind in kinds},
    }  # fmt: skip
    print(json.dumps(result))
    if args.record:
        record("groups", result)


def summary(ones):
    """Worst and median of a kind of fault."""
    figures = {"count": len(ones)}
    for key in ones[0] if ones else ():
        if key != "fault":
            values = [one[key] for one in ones]
            worst = min(values) if key in ("rate", "its_own_rate") or "averages" in key else max(values, key=abs)
            figures[key] = {"median": statistics.median(values), "worst": worst}
    return figures


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for option, default in {"faults": 30, "sleep-ms": 20, "seed": 1, "mbit": 100, "delay-ms": 5}.items():
        parser.add_argument(f"--{option}", type=int, default=default)
    parser.add_argument("--only", nargs="+", choices=KINDS, help="these faults, in turn")
    parser.add_argument("--record", action="store_true")
    main(parser.parse_args())
