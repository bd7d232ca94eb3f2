"""Groups that lose stages and go on through others': what it costs whom, until the stage is back and after.

    python tests/bench/lost_stages.py --strikes 12

Three groups of three stages, tiny, whose compute is slept (``--sleep-ms`` a forward and twice that a backward, in every
stage), so that nine processes on two cores each have their own pace. Again and again the process of a stage, any but a
first one, is killed; some seconds later it is started again and comes back. Of the group that lost it: the longest gap
between two calls, and calls a second without the stage and once it is back, against those before. Of the others: the
rate of who stands in and of the third. Without detours the first would be 0 until a whole group is there again, and the
others' 1.
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
from tests.multiproc.groups import lighthouse  # noqa: E402
from tests.multiproc.ranks import CONTEXT  # noqa: E402

GROUPS, STAGES = 3, 3
AWAY_S, BACK_S = 6.0, 5.0


def rank_main(rank, port, back, where, name, log, sleep_s):
    """One rank of a group: a line a call, with time, call, loss and groups."""
    os.nice(-15)
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
    from noflush.stage import alone
    from tests.multiproc import training as t

    class Slept(torch.autograd.Function):
        """What a layer's compute would take."""

        @staticmethod
        def forward(ctx, x):
            time.sleep(sleep_s)
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            time.sleep(2 * sleep_s)
            return gradient

    def layers(gpt=None):
        made = t.layers(gpt)
        blocks = [i for i, layer in enumerate(made) if type(layer).__name__ == "Block"]
        for i in blocks[:: len(blocks) // STAGES]:
            made[i].register_forward_hook(lambda module, given, out: Slept.apply(out))
        return made

    noflush.register()
    torch.set_num_threads(1)
    if back:
        alone.enter(rank, STAGES)
    deepspeed.init_distributed("gloo")
    replicas = {
        "lighthouse": where, "average_every": 10, "fraction": 0.2, "timeout_s": 6.0, "name": name, "reroute": True,
    }  # fmt: skip
    rule = {"type": "DelayAwareNAdamW", "params": {"lr": 1e-3, "betas": [0.99, 0.999]}}
    config = t.ds_config(1, rule, {"replicas": replicas, "peer_timeout_s": 20.0})
    engine = t.build(STAGES, config, gpt=t.GPT | {"depth": 2 * STAGES}, make_layers=layers)
    with open(log, "a", buffering=1) as lines:
        while multiprocessing.parent_process().is_alive():
            # By the call: a last stage that has come back reads on where its group is.
            draw = torch.Generator().manual_seed(1000 * engine.global_steps + int(name[1:]))
            first = torch.randint(0, 32, (3, 1), generator=draw)
            tokens = (first + torch.arange(13)) % 32  # each is the one before it and one more
            loss = engine.train_batch(iter([(tokens[:, :-1], tokens[:, 1:])]))
            rerouting = engine.group.lost_stages.rerouting
            served = rerouting.guests.micro_batches
            lines.write(f"{time.time()} {engine.global_steps} {float(loss)} {engine.group.averager.groups} {served}\n")


class Group:
    """One group's processes."""

    def __init__(self, number, port, where, folder, sleep_s):
        self.number, self._port, self._where, self._folder, self._sleep_s = number, port, where, folder, sleep_s
        self.processes = [None] * STAGES

    def start(self, rank, back=False):
        log = self._folder / f"g{self.number}-{rank}"
        arguments = rank, self._port, back, self._where, f"g{self.number}", str(log), self._sleep_s
        self.processes[rank] = CONTEXT.Process(target=rank_main, args=arguments)
        self.processes[rank].start()

    def lines(self, rank=0):
        """(time, calls, loss, groups, guests) of a stage's calls."""
        log = self._folder / f"g{self.number}-{rank}"
        found = [line.split() for line in log.read_text().splitlines()] if log.exists() else []
        return [tuple(map(float, words)) for words in found if len(words) == 5]

    def said(self, rank=0):
        """What a stage's process has printed."""
        return (self._folder / f"g{self.number}-{rank}.err").read_text(errors="replace")

    def end(self):
        for process in self.processes:
            if process is not None and process.is_alive():
                process.kill()
            if process is not None:
                process.join()


def wait_for(condition, seconds, what):
    """How long it took; raises if it takes too long."""
    begun = time.time()
    while not condition():
        if time.time() - begun > seconds:
            raise TimeoutError(f"{what} in {seconds} s")
        time.sleep(0.02)
    return time.time() - begun


def rate(lines, begin, end):
    """Calls a second."""
    return sum(begin <= line[0] < end for line in lines) / (end - begin)


def gap(lines, begin, end):
    """The longest time between two calls."""
    times = [begin, *(line[0] for line in lines if begin < line[0] < end), end]
    return max(b - a for a, b in itertools.pairwise(times))


def strike(groups):
    """Kills one stage, has it come back; what that cost."""
    struck, rank = random.choice(groups), random.randrange(1, STAGES)
    others = [group for group in groups if group is not struck]
    served = {group: group.lines(rank)[-1][4] for group in others}
    backs = struck.said(rank - 1).count(f"stage {rank} is back")
    at = time.time()
    os.kill(struck.processes[rank].pid, signal.SIGKILL)
    time.sleep(AWAY_S)
    away = time.time()
    host = max(others, key=lambda group: group.lines(rank)[-1][4] - served[group])
    (third,) = [group for group in others if group is not host]
    struck.processes[rank].join()
    struck.start(rank, back=True)
    took = wait_for(lambda: struck.said(rank - 1).count(f"stage {rank} is back") > backs, 90, "not back")
    back = time.time()
    time.sleep(BACK_S)
    now = time.time()

    def against(group, begin, end):
        return round(rate(group.lines(), begin, end) / rate(group.lines(), at - 4, at), 2)

    losses = {group: statistics.mean(line[2] for line in group.lines(0)[-50:]) for group in groups}
    return {
        "stage": rank, "load": round(os.getloadavg()[0], 1),
        "calls_a_second_before": round(rate(struck.lines(), at - 4, at), 1),
        "gap_s": round(gap(struck.lines(), at - 1, at + AWAY_S), 3),
        "gap_before_s": round(gap(struck.lines(), at - 4, at), 3),
        "rate_without": against(struck, at + 1, away), "rate_of_stand_in": against(host, at + 1, away),
        "rate_of_third": against(third, at + 1, away), "gap_of_others_s": round(
            max(gap(group.lines(), at, now) for group in others), 3),
        "back_s": round(took, 1), "gap_at_return_s": round(gap(struck.lines(), back - 2, now), 3),
        "rate_back": against(struck, back + 1, now), "rate_of_stand_in_then": against(host, back + 1, now),
        "loss_against_others": round(losses[struck] - statistics.mean(losses[other] for other in others), 4),
    }  # fmt: skip


def main(args):
    """Prints one line a strike, and the figures of all."""
    random.seed(args.seed)
    found = []
    with lighthouse() as where, tempfile.TemporaryDirectory() as name, held_port() as a, held_port() as b, \
            held_port() as c:  # fmt: skip
        groups = [Group(n, port, where, Path(name), args.sleep_ms / 1e3) for n, port in enumerate((a, b, c))]
        try:
            for group, rank in itertools.product(groups, range(STAGES)):
                group.start(rank)
            wait_for(lambda: all(g.lines() and g.lines()[-1][3] == GROUPS for g in groups), 180, "not all groups met")
            for _ in range(args.strikes):
                time.sleep(6 + 2 * random.random())
                found.append(strike(groups))
                print(json.dumps(found[-1]), flush=True)
        except (TimeoutError, IndexError):
            for group, rank in itertools.product(groups, range(STAGES)):
                print(f"---- g{group.number} {rank}\n{group.said(rank)[-1500:]}")
            raise
        finally:
            for group in groups:
                group.end()
    figures = {key: [one[key] for one in found] for key in found[0]}
    result = {
        "groups": GROUPS, "stages": STAGES, "strikes": len(found), "sleep_ms": args.sleep_ms, "seed": args.seed,
        **{key: {"median": statistics.median(v), "least": min(v), "most": max(v)} for key, v in figures.items()},
    }  # fmt: skip
    print(json.dumps(result))
    if args.record:
        record("lost_stages", result)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for option, default in {"strikes": 12, "sleep-ms": 10, "seed": 1}.items():
        parser.add_argument(f"--{option}", type=int, default=default)
    parser.add_argument("--record", action="store_true")
    main(parser.parse_args())
