"""Four hosts 50 ms apart at 80 Mbit/s: noflush that chooses its depth, without one, coded, and stock DeepSpeed.

    python tests/bench/wan.py --record                 # activations of 1 MB: compute sets the bound
    python tests/bench/wan.py --megabytes 2 --record   # 2 MB: bandwidth does

Each host is a network namespace with a TCP of its own, behind an uplink and a downlink (`wan_parts/network.py`, root);
delay jitters. Hosts and switch go before whatever else this machine runs (nice). Compute is a sleep inside the real
engine (forward 100 ms, backward 200 ms). The bound is what the slower of compute and of a middle host's link, which
carries an activation and a gradient each way, takes a micro-batch; what plain sockets take for the same messages, and
nothing else, is measured beside it. After the timed calls come as many again, of which a sixth have one stage three
times as slow.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from noflush.order.wire_format import Wire, wire_bytes  # noqa: E402
from tests.bench.record import record  # noqa: E402
from tests.bench.wan_parts.network import Wan, running  # noqa: E402

CONTESTANTS = {
    "noflush auto": {"extra_in_flight": "auto"},
    "noflush 0": {"extra_in_flight": 0},
    "noflush auto, int8": {"extra_in_flight": "auto", "wire": "int8"},
    "stock": None,
}
OTHERS = {f"noflush {extra}": {"extra_in_flight": extra} for extra in range(1, 65)}


def run_hosts(wan, part, args, timeout_s):
    """Each host's results of ``tests.bench.wan_parts.<part>``."""
    port = "29531"  # of namespaces of their own
    with running(wan) as names:
        hosts = []
        for rank, name in enumerate(names):
            environment = os.environ | {
                "RANK": str(rank), "LOCAL_RANK": "0", "WORLD_SIZE": str(wan.hosts), "LOCAL_WORLD_SIZE": "1",
                "MASTER_ADDR": wan.address(0), "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "wan0",
                "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1",
            }  # fmt: skip
            words = [
                "nice",
                "-n",
                "-15",
                "ip",
                "netns",
                "exec",
                name,
                sys.executable,
                "-m",
                f"tests.bench.wan_parts.{part}",
                json.dumps(args),
            ]
            hosts.append(
                subprocess.Popen(
                    words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
                )
            )
        try:
            said = [host.communicate(timeout=timeout_s)[0] for host in hosts]
        finally:
            for host in hosts:
                host.kill()
    results = []
    for rank, text in enumerate(said):
        lines = [line for line in text.splitlines() if line.startswith("RESULT ")]
        if not lines:
            raise SystemExit(f"host {rank} ended without a result:\n{text[-3000:]}")
        results.append(json.loads(lines[-1].removeprefix("RESULT ")))
    return results


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--hosts", type=int, default=4)
    p.add_argument("--gas", type=int, default=1)
    p.add_argument("--megabytes", type=float, default=1.0, help="of an activation, float32")
    p.add_argument("--forward-ms", type=float, default=100.0)
    p.add_argument("--backward-ms", type=float, default=200.0)
    p.add_argument("--delay-ms", type=float, default=50.0, help="one way")
    p.add_argument("--jitter-ms", type=float, default=10.0, help="up to so much more, anew ten times a second")
    p.add_argument("--mbit", type=float, default=80.0, help="of every host, in and out")
    p.add_argument("--mtu", type=int, default=32000, help="large, as after segmentation offload")
    p.add_argument("--congestion", default="cubic", help="the hosts' rule of congestion: cubic, bbr, reno")
    p.add_argument("--calls", type=int, default=48, help="timed")
    p.add_argument("--stock-calls", type=int, default=8)
    p.add_argument(
        "--slowed", type=float, default=3.0, help="times that one stage is as slow, for a sixth of the calls"
    )
    p.add_argument("--only", nargs="+", choices=tuple(CONTESTANTS | OTHERS), metavar="NAME", default=list(CONTESTANTS))
    p.add_argument("--timeout-s", type=float, default=550.0)
    p.add_argument("--record", action="store_true", help="append the result to tests/bench/results/wan.jsonl")
    options = p.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the namespaces go
    wan = Wan(
        options.hosts,
        options.delay_ms / 1e3,
        options.jitter_ms / 1e3,
        options.mbit * 1e6,
        options.mtu,
        options.congestion,
    )
    numbers = round(options.megabytes * 1e6 / 4)
    slow_from = options.calls // 3
    slow_to = slow_from + options.calls // 6
    args = {
        "stages": options.hosts,
        "gas": options.gas,
        "numbers": numbers,
        "forward_s": options.forward_ms / 1e3,
        "backward_s": options.backward_ms / 1e3,
        "calls": options.calls,
        "stock_calls": options.stock_calls,
        "warm_up": 2 * options.hosts + -(-16 // options.gas) + 4,
        "slowed": options.slowed,
        "slow_stage": options.hosts // 2,
        "slow_from": slow_from,
        "slow_to": slow_to,
        "slow_stock": False,
        "contestants": {name: (CONTESTANTS | OTHERS)[name] for name in options.only},
    }
    by_host = run_hosts(wan, "rank", args, options.timeout_s)
    plain = {
        "stages": options.hosts,
        "addresses": [wan.address(host) for host in range(options.hosts)],
        "bytes": 4 * numbers,
        "calls": options.calls,
        "in_flight": 3 * options.hosts,
    }
    alone = run_hosts(wan, "sockets", plain, options.timeout_s)[0]["steady"]
    middle = 2 if options.hosts > 2 else 1  # messages each way
    compute_ms = options.forward_ms + options.backward_ms
    rows = {}
    for name, block in args["contestants"].items():
        found = [host[name] for host in by_host]
        form = Wire.read((block or {}).get("wire", "model"))
        link_ms = 1e3 * middle * 8 * wire_bytes(form.activations, numbers, 4) / wan.bits_per_s
        bound = options.gas * max(compute_ms, link_ms)
        took = max(1e3 * sum(host["steady"]) / len(host["steady"]) for host in found)
        rows[name] = {
            "ms_a_call": round(took, 1),
            "bound_ms": round(bound, 1),
            "of_bound": round(bound / took, 3),
            "compute_busy": round(options.gas * compute_ms / took, 3),
            "compute_took_ms": round(1e3 * max(host["compute_s"] for host in found), 1),
            "wait_ms_by_host": [
                {
                    kind: round(host["actions"][f"wait for {kind}"], 1)
                    for kind in ("header", "activation", "gradient")
                    if f"wait for {kind}" in host["actions"]
                }
                for host in found
            ],
            "extra_in_flight": found[0].get("extra"),
            "said": found[0].get("said"),
        }
        if found[0]["slowed"]:
            slow_bound = options.gas * max(options.slowed * compute_ms, link_ms)
            whole = (options.calls - (slow_to - slow_from)) * bound + (slow_to - slow_from) * slow_bound
            seconds = max(sum(host["slowed"]) for host in found)
            rows[name] |= {"slowed_s": round(seconds, 2), "slowed_of_bound": round(whole / 1e3 / seconds, 3)}
    result = {
        "hosts": options.hosts,
        "gas": options.gas,
        "delay_ms": options.delay_ms,
        "jitter_ms": options.jitter_ms,
        "mbit": options.mbit,
        "mtu": options.mtu,
        "congestion": options.congestion,
        "plain_sockets_ms": round(1e3 * sum(alone) / len(alone), 1),
        "activation_mb": options.megabytes,
        "compute": f"sleep {options.forward_ms:g} + {options.backward_ms:g} ms",
        "calls": options.calls,
        "load": [round(n, 1) for n in os.getloadavg()],
        "contestants": rows,
    }
    if options.record:
        record("wan", result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
