"""What the parts that train a pipeline have in common: a process a stage, and their losses beside the simulator's."""

from __future__ import annotations

import argparse
import json
import sys

from tests.bench.gpu_parts import device as gpu
from tests.bench.gpu_parts import model
from tests.bench.gpu_parts.ranks import Ranks


def main(module, description, rank_main):
    """Runs the part ``module`` as a program; ``rank_main(stages, dry)`` is one stage's process."""
    p = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--stages", type=int, required=True)
    p.add_argument("--dry", action="store_true")
    p.add_argument("--as-rank", action="store_true")
    args = p.parse_args()
    stages = model.stages_of(args.stages, args.dry)
    if args.as_rank:
        rank_main(stages, args.dry)
        return
    ranks = Ranks(module, stages, ["--stages", str(args.stages), *["--dry"] * args.dry])
    device, of = gpu.of(args.dry), model.size(stages, args.dry)
    simulated = model.simulated_losses(stages, of, device)
    row, wrong = model.row_of(ranks.gather(), simulated, device, of.calls)
    print(json.dumps({"stages": stages, "gas": model.GAS, "calls": of.calls, "way": ranks.way} | row))
    if wrong:
        sys.exit("; ".join(wrong))
