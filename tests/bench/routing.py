"""What it is worth to go round a lost stage: tokens/s that are left, by arithmetic, of P stages x R groups.

    python tests/bench/routing.py --record

Every process is down for a share of the time, by itself. *Leaving*, without detours: a group works while all its P
stages do, so a share (1 - p)^P is left. *Routing*, as SWARM does, and detours nearly: any group's stage serves any
micro-batch, all stages are equally fast, and the stage with fewest processes sets the pace: the mean of the minimum
over stages of Binomial(R, 1 - p), over R. Nothing is charged for the routing itself.
"""

from __future__ import annotations

import argparse
import sys
from math import comb
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.bench.record import record

GROUPS = (2, 3, 8, 32)
DOWN = (0.001, 0.01, 0.05, 0.2)


def leaving(stages: int, down: float) -> float:
    """Share of tokens/s left where a group stops with any of its stages."""
    return (1 - down) ** stages


def routing(stages: int, groups: int, down: float) -> float:
    """Share of tokens/s left where the stage with fewest processes sets the pace."""
    of = [comb(groups, up) * (1 - down) ** up * down ** (groups - up) for up in range(groups + 1)]
    return sum(sum(of[least:]) ** stages for least in range(1, groups + 1)) / groups


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--stages", type=int, default=8)
    p.add_argument("--record", action="store_true", help="append the table to tests/bench/results/routing.jsonl")
    args = p.parse_args()
    rows = {}
    for down in DOWN:
        by_groups = {str(groups): round(routing(args.stages, groups, down), 4) for groups in GROUPS}
        rows[str(down)] = {"leaving": round(leaving(args.stages, down), 4), "routing_by_groups": by_groups}
        print(f"down {down:.1%} of the time: leaving {leaving(args.stages, down):.4f}; routing, by groups: {by_groups}")
    if args.record:
        record("routing", {"stages": args.stages, "by_share_of_time_down": rows})


if __name__ == "__main__":
    main()
