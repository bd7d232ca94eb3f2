"""A long run that is disturbed against one that is left alone: every loss the same, and nothing that grows.

    python tests/bench/soak.py --updates 20000        (or: make soak)

A tiny Megatron GPT with tied embeddings at P = 4 without a flush, under launch/pretrain_gpt.py. Disturbed: a checkpoint
every ``--save``, in the background; an evaluation every ``--evaluate``; and every ``--kill`` updates one rank, drawn by
chance, is killed at a moment drawn by chance, and the run starts again from its newest checkpoint. Of every process
resident memory, open files and sockets are looked at once a second; what is compared is the medians of the second
tenth of an unbroken stretch and of its last.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.bench.record import record  # noqa: E402
from tests.launch.processes import Run  # noqa: E402

STAGES = 4
MODEL = (
    "--num-layers 4 --hidden-size 16 --num-attention-heads 2 --seq-length 8 --max-position-embeddings 8 --mock-data "
    "--micro-batch-size 2 --lr 1e-3 --lr-decay-style constant --vocab-size 63 --eval-iters 2 --num-workers 0 "
    "--log-interval 1 --clip-grad 1.0 --make-vocab-size-divisible-by 1"
)
CONFIG = {
    "optimizer": {"type": "DelayAwareNAdamW", "params": {"betas": [0.99, 0.999]}},
    "async_pipeline": {"enabled": True},
}


class Figures:
    """What a run's processes hold, looked at once a second."""

    def __init__(self):
        self.seen = []

    def look(self, run):
        found = []
        for process in run.processes:
            of = Path(f"/proc/{process.pid}")
            try:
                files = [os.readlink(link) for link in (of / "fd").iterdir()]
                resident = int((of / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
            except OSError:
                return
            found.append((resident, len(files), sum(name.startswith("socket:") for name in files)))
        self.seen.append([max(column) for column in zip(*found, strict=True)])

    def growth(self):
        """Of MiB, files and sockets the medians early and late, of the process that holds most."""
        tenth = len(self.seen) // 10
        if tenth < 3:
            return None
        parts = self.seen[tenth : 2 * tenth], self.seen[-tenth:]
        early, late = ([statistics.median(column) for column in zip(*part, strict=True)] for part in parts)
        return {
            name: [round(a, 1), round(b, 1)]
            for name, a, b in zip(("MiB", "files", "sockets"), early, late, strict=True)
        }


def arguments(folder, more):
    config = Path(folder, "ds_config.json")
    config.write_text(json.dumps(CONFIG))
    return [
        *MODEL.split(),
        "--pipeline-model-parallel-size",
        str(STAGES),
        "--deepspeed_config",
        str(config),
        *more.split(),
    ]


def run_to(folder, name, more, kill_at=None, pause=0.0):
    """A run to its end, or until iteration ``kill_at`` is logged and ``pause`` seconds are over; its losses."""
    run, figures = Run(arguments(folder, more), STAGES, Path(folder), name), Figures()
    victim = random.randrange(STAGES)
    while any(process.is_alive() for process in run.processes):
        time.sleep(1)
        figures.look(run)
        if kill_at is not None and newest_line(run) >= kill_at:
            time.sleep(pause)
            run.processes[victim].kill()
            kill_at = None
    codes = run.wait(120)
    return run.losses(), codes, figures.growth(), victim


def newest_line(run):
    if not run.logs[-1].exists():
        return 0
    with open(run.logs[-1], "rb") as log:
        log.seek(max(0, log.seek(0, 2) - 4000))
        lines = re.findall(r"iteration +(\d+)/.*lm loss", log.read().decode(errors="replace"))
    return int(lines[-1]) if lines else 0


def main(args):
    random.seed(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        to_the_end = f"--train-iters {args.updates}"
        begun = time.monotonic()
        alone, codes, growth_alone, _ = run_to(folder, "alone", f"{to_the_end} --eval-interval {args.updates}")
        assert codes == [0] * STAGES, codes
        save = f"{to_the_end} --save {folder}/save --load {folder}/save --save-interval {args.save} --async-save "
        save += f"--eval-interval {args.evaluate} --override-opt_param-scheduler"
        kills, losses, growths, redone = [], {}, [], 0
        while max(losses, default=0) < args.updates:
            done = max(losses, default=0)
            kill_at = (done // args.kill + 1) * args.kill
            kill_at = kill_at if kill_at < args.updates else None
            found, codes, growth, victim = run_to(folder, f"disturbed{len(kills)}", save, kill_at, random.random())
            assert found, "a run that was started again logged nothing"
            redone += sum(n in losses for n in found)
            wrong = [n for n, loss in found.items() if loss != alone[n]]
            assert not wrong, f"after {len(kills)} kills the loss of iteration {wrong[0]} is another"
            losses |= found
            growths += [growth] if growth else []
            if kill_at is None:
                assert codes == [0] * STAGES, codes
            else:
                assert codes != [0] * STAGES, f"nothing was killed at iteration {kill_at}"
                kills.append([max(found), victim])
        result = vars(args) | {
            "stages": STAGES,
            "losses_equal": losses == alone,
            "kills_at_and_of_stage": kills,
            "updates_done_twice": redone,
            "early_and_late_undisturbed": growth_alone,
            "early_and_late_disturbed": growths,
            "minutes": round((time.monotonic() - begun) / 60, 1),
        }
    print(json.dumps(result))
    if args.record:
        record("soak", {key: value for key, value in result.items() if key != "record"})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in {"updates": 20000, "save": 500, "evaluate": 200, "kill": 2000, "seed": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--record", action="store_true")
    main(parser.parse_args())
