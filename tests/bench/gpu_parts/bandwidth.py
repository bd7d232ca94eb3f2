"""Time and bandwidth of one update, beside a copy and other optimizers: `tests/bench/update.py` at this GPU's size."""

from __future__ import annotations

import argparse
import json

from tests.bench.update import add_kinds, measure


def main():
    p = argparse.ArgumentParser(description=__doc__)
    add_kinds(p)
    p.add_argument("--dry", action="store_true")
    args = p.parse_args()
    args.device, args.numel, args.rounds = ("cpu", 5_003, 1) if args.dry else ("cuda", 1_000_000_000, 9)
    args.kernel = "triton"  # on a CPU its interpreter
    print(json.dumps(measure(args)))


if __name__ == "__main__":
    main()
