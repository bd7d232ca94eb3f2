"""What groups send each other, counted at their hosts' interfaces, against data parallelism and against arithmetic.

    python tests/bench/group_traffic.py --record

R hosts, a network namespace each behind a link of its own (`wan_parts/network.py`, root), and one for the lighthouse.
A host has a pipeline of two stages, which talk over its loopback; so what passes its interface is what groups, or
replicas, send each other: frames with all their headers, acknowledgements, what TCP had to send again, the lighthouse's
heartbeats. Counters are read by the first rank of every host after every call. Groups: from some calls after a round to
as many after another, so whole rounds, with nothing under way at either end. Replicas wait for each other at every
update, over the same links.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from noflush.order.averaging import slice_of  # noqa: E402
from tests.bench.group_parts.apart import LighthouseApart, be_rank  # noqa: E402
from tests.bench.record import record  # noqa: E402
from tests.bench.wan_parts.network import Wan, carried, running  # noqa: E402
from tests.multiproc.ranks import CONTEXT  # noqa: E402

STAGES = 2
SETTLED = 6
"""Calls after which a round that one stage has ended has ended at the other too."""
WARM_UP = 4
"""Calls of replicas that are not counted: the pipeline fills."""


def rank_main(place, out, calls, sleep_s, width, replicas):
    """One rank; the first of a host writes a line a call: time, rounds, bytes in and out, segments sent again."""
    be_rank(**place)
    import torch

    from noflush.demo.gpt import next_token_loss
    from tests.multiproc import training as t

    def loss_fn(outputs, labels):
        time.sleep(sleep_s)
        return next_token_loss(outputs, labels)

    rule = {"type": "DelayAwareNAdamW", "params": {"lr": 1e-3, "betas": [0.99, 0.999]}}
    gpt = t.GPT | {"depth": STAGES, "width": width}
    engine = t.build(STAGES, t.ds_config(1, rule, {"replicas": replicas} if replicas else {}), gpt=gpt, loss_fn=loss_fn)
    lines = []
    for call in range(calls):
        engine.train_batch(iter(t.data(1, gpt=gpt, seed=call)))
        rounds = len(engine.group.averager.exchanges) if replicas else call + 1
        lines.append((time.time(), rounds, *carried()))
    elements = sum(p.numel() for p in engine.module.parameters())
    Path(out).write_text(json.dumps({"lines": lines, "elements": elements}))
    torch.distributed.barrier()


def run_world(wan, worlds, timeout_s, **kwargs):
    """Every rank's report; ``worlds``: the hosts of each world's ranks, in order of ranks, and its block."""
    with tempfile.TemporaryDirectory() as folder:
        ranks, outs = [], []
        for number, (hosts, replicas) in enumerate(worlds):
            for rank, host in enumerate(hosts):
                log, out = f"{folder}/{number}-{rank}.log", f"{folder}/{number}-{rank}.json"
                place = {"rank": rank, "world": len(hosts), "port": 29531, "log": log, "name": wan.name(host)}
                place["master"] = wan.address(hosts[0])
                outs.append((host, out, log))
                ranks.append(CONTEXT.Process(target=rank_main, args=(place, out), kwargs=kwargs | replicas))
        try:
            for process in ranks:
                process.start()
            deadline = time.monotonic() + timeout_s
            for process in ranks:
                process.join(max(0.1, deadline - time.monotonic()))
        finally:
            for process in ranks:
                process.kill()
                process.join()
        for _, out, log in outs:
            if not Path(out).exists():
                raise SystemExit(f"a rank ended without a result:\n{Path(log).read_text()[-3000:]}")
        return [(host, json.loads(Path(out).read_text())) for host, out, _ in outs]


def between(lines, first, last):
    """What there was from the end of call ``first`` to that of call ``last``."""
    whole = [b - a for a, b in zip(lines[first], lines[last], strict=True)]
    return {"calls": last - first, **dict(zip(("seconds", "rounds", "in", "out", "again"), whole, strict=True))}


def of_groups(wan, hosts, options):
    """R groups: the busiest host's traffic."""
    lighthouse = LighthouseApart(wan, join_timeout_s=10.0, min_groups=hosts)
    lighthouse.start()
    replicas = {"lighthouse": lighthouse.address, "average_every": options.every, "fraction": options.fraction}
    replicas |= {"min_groups": hosts, "timeout_s": 60.0}
    worlds = [
        ([host] * STAGES, {"replicas": replicas | {"bind": wan.address(host), "name": f"g{host}"}})
        for host in range(hosts)
    ]
    try:
        found = run_world(
            wan, worlds, options.timeout_s, calls=(options.rounds + 3) * options.every, sleep_s=options.sleep_ms / 1e3,
            width=options.width,
        )  # fmt: skip
    finally:
        lighthouse.kill()
    windows, rests = [], []
    for host in range(hosts):
        lines = next(report["lines"] for where, report in found if where == host)
        ends = [n + SETTLED for n in range(1, len(lines) - options.every) if lines[n][1] > lines[n - 1][1] > 0]
        windows.append(between(lines, ends[0], ends[-1]))
        # From there to the next round's start: its first call is `every` after the one before began.
        rests += [between(lines, end, end + 3) for end in ends]
    elements = [report["elements"] for where, report in found if where == 0]
    sent = sum(4 * slice_of(0, count, options.fraction)[1] for count in elements) * 2 * (hosts - 1) / hosts
    busiest = max(windows, key=lambda window: window["out"] / window["rounds"])
    return summary(busiest, sent * busiest["rounds"] / busiest["calls"], elements, options.mtu) | {
        "rounds": busiest["rounds"],
        "out_a_round": round(busiest["out"] / busiest["rounds"]),
        "out_a_round_by_arithmetic": round(sent),
        "at_rest_bytes_a_s": round(sorted(rest["out"] / rest["seconds"] for rest in rests)[len(rests) // 2]),
    }


def of_replicas(wan, hosts, options):
    """Data parallelism over as many hosts: DeepSpeed numbers replicas faster than stages."""
    world = [rank % hosts for rank in range(hosts * STAGES)]
    found = run_world(
        wan, [(world, {"replicas": None})], options.timeout_s, calls=options.replica_calls + WARM_UP,
        sleep_s=options.sleep_ms / 1e3, width=options.width,
    )  # fmt: skip
    last = options.replica_calls + WARM_UP - 1
    by_host = [next(report["lines"] for where, report in found if where == host) for host in range(hosts)]
    windows = [between(lines, WARM_UP - 1, last) for lines in by_host]
    elements = [report["elements"] for where, report in found if where == 0]
    arithmetic = 4 * sum(elements) * 2 * (hosts - 1) / hosts
    return summary(max(windows, key=lambda window: window["out"]), arithmetic, elements, options.mtu)


def summary(window, arithmetic, elements, mtu):
    """``arithmetic``: bytes out an update."""
    again = window["again"] * (mtu + 14)  # at most: a segment fills a frame, or less
    out = window["out"] / window["calls"]
    return {
        "updates": window["calls"],
        "updates_a_s": round(window["calls"] / window["seconds"], 2),
        "weights": elements,
        "out_an_update": round(out),
        "in_an_update": round(window["in"] / window["calls"]),
        "out_an_update_by_arithmetic": round(arithmetic),
        "of_arithmetic": round(out / arithmetic, 3),
        "of_it_sent_again": round(again / window["out"], 3),
        "out_bytes_a_s": round(window["out"] / window["seconds"]),
    }


def main(options):
    """Prints the figures, and appends them to results/group_traffic.jsonl if asked to."""
    rows = {}
    for hosts in options.groups:
        wan = Wan(hosts + 1, options.delay_ms / 1e3, 0.0, options.mbit * 1e6, options.mtu)
        with running(wan):
            groups, replicas = of_groups(wan, hosts, options), of_replicas(wan, hosts, options)
        share = groups["out_an_update"] / replicas["out_an_update"]
        rows[hosts] = {
            "groups": groups,
            "replicas": replicas,
            "an_update_of_replicas": round(share, 5),
            "by_arithmetic": round(options.fraction / options.every, 5),
            "replicas_at_the_groups_pace_mbit": round(8e-6 * replicas["out_an_update"] * groups["updates_a_s"], 1),
            "groups_mbit": round(8e-6 * groups["out_bytes_a_s"], 2),
        }
        print(json.dumps({hosts: rows[hosts]}, indent=1), flush=True)
    kept = ("every", "fraction", "mbit", "delay_ms", "mtu", "width", "sleep_ms")
    result = {name: getattr(options, name) for name in kept}
    result |= {"stages": STAGES, "load": [round(n, 1) for n in os.getloadavg()], "hosts": rows}
    if options.record:
        record("group_traffic", result)


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--groups", type=int, nargs="+", default=[2, 3])
    p.add_argument("--every", type=int, default=20, help="updates from one round to the next")
    p.add_argument("--fraction", type=float, default=0.05, help="of the weights, a round")
    p.add_argument("--rounds", type=int, default=12)
    p.add_argument("--replica-calls", type=int, default=8)
    p.add_argument("--width", type=int, default=512, help="of the GPT, which has a block a stage")
    p.add_argument("--sleep-ms", type=float, default=50.0, help="of compute a call, besides what there is")
    p.add_argument("--mbit", type=float, default=50.0, help="of every host's link, in and out")
    p.add_argument("--delay-ms", type=float, default=10.0, help="one way")
    p.add_argument("--mtu", type=int, default=1500)
    p.add_argument("--timeout-s", type=float, default=300.0, help="of each of the runs")
    p.add_argument("--record", action="store_true")
    main(p.parse_args())
