"""Time of one update of a GPT layer's matrices by every method: `tests/bench/matrices.py` on this GPU."""

from __future__ import annotations

import argparse
import json

from tests.bench.matrices import measure


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--hidden", type=int, required=True)
    p.add_argument("--dry", action="store_true")
    args = p.parse_args()
    args.device, args.tokens, args.rounds = ("cpu", 32, 1) if args.dry else ("cuda", 8192, 9)
    args.hidden = 64 if args.dry else args.hidden
    print(json.dumps(measure(args)))


if __name__ == "__main__":
    main()
