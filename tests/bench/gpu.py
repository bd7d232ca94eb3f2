"""Everything that needs a GPU, in one command of at most eight minutes; docs/bench-gpu.md says how to read it.

    python tests/bench/gpu.py --record
    python tests/bench/gpu.py --dry
    python tests/bench/gpu.py --only update-fp32 stages-4

Every part runs in a process of its own with a time limit, so that a crash or a hang costs one row, which then says so.
Needs a checkout and torch, nothing installed: a part that lacks a package is a row that names it. ``--dry`` is the
rehearsal: the same code in tiny sizes on a CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from tests.bench import record  # noqa: E402
from tests.bench.checkout import lay_out  # noqa: E402
from tests.bench.gpu_parts.printed import last_object  # noqa: E402
from tests.bench.gpu_parts.table import BUDGET_S, ENDS, PARTS, chosen, lacking, skipped  # noqa: E402

LAST_LINES = 12
_OF_OTHER_RUNS = (
    *("TRITON_INTERPRET", "DS_ACCELERATOR", "CUDA_DEVICE_MAX_CONNECTIONS"),
    *("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"),
)


def installed(name):
    """Whether a package can be imported, found out without importing it."""
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def environment(package, dry):
    """Of every part: this checkout's noflush first, and no setting of another run."""
    found = dict(os.environ)
    for name in _OF_OTHER_RUNS:
        found.pop(name, None)
    if dry:
        found |= {"TRITON_INTERPRET": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    found["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(package), *filter(None, [found.get("PYTHONPATH")])])
    return found


def run(command, limit, env):
    """Runs ``command`` in a session of its own for at most ``limit`` seconds: (status, what it printed, its stderr)."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        start = time.monotonic()
        process = subprocess.Popen(command, cwd=ROOT, env=env, stdout=out, stderr=err, start_new_session=True)
        try:
            code = process.wait(limit)
            status = "ok" if code == 0 else f"failed: exit status {code}"
        except subprocess.TimeoutExpired:
            status = f"out of time: {limit} s"
        finally:
            with contextlib.suppress(ProcessLookupError):  # it, or what it has left running
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        seconds = time.monotonic() - start
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read())
    return status, seconds, *texts


def command_of(part, dry):
    """That runs ``part``."""
    return [sys.executable, "-m", f"tests.bench.gpu_parts.{part.module}", *part.arguments, *["--dry"] * dry]


def row_of(part, args, env, devices, left):
    """Runs ``part`` and makes its row."""
    row = {"part": part.name, "asks": part.asks}
    why_not = lacking(part, devices, args.dry, installed)
    if why_not is None and left < part.seconds:
        why_not = f"no time: {left:.0f} s of the budget left, and it may take {part.seconds}"
    if why_not is not None:
        return row | {"status": why_not}
    env = env | dict(part.environment) | {ENDS: str(time.time() + part.seconds)}
    status, seconds, out, err = run(command_of(part, args.dry), part.seconds, env)
    row |= {"status": status, "seconds": round(seconds, 1)} | last_object(out)
    if status != "ok":
        row["stderr"] = err.splitlines()[-LAST_LINES:]
    return row


def show(row):
    """Prints a row for people."""
    print(f"== {row['part']}: {row['asks']}\n   {row['status']}", flush=True)
    for key, value in row.items():
        if key == "stderr":
            print("   " + "\n   ".join(value))
        elif key not in ("part", "asks", "status"):
            print(f"   {key:28} {value}")
    sys.stdout.flush()


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--dry", action="store_true", help="the rehearsal: same code, tiny sizes, CPU")
    p.add_argument("--only", nargs="+", default=[], metavar="NAME", help=", ".join(part.name for part in PARTS))
    p.add_argument("--record", action="store_true", help="append the rows to gpu.jsonl in the folder of results")
    p.add_argument("--results", type=Path, default=record.RESULTS, help="that folder; default: tests/bench/results")
    p.add_argument("--commit", help="what is checked out, where git cannot tell")
    args = p.parse_args()
    try:
        parts = chosen(args.only)
    except ValueError as error:
        p.error(str(error))
    deadline = time.monotonic() + BUDGET_S
    commit = args.commit or record.commit()
    machine, rows = {}, []
    with tempfile.TemporaryDirectory() as folder:
        env = environment(lay_out(Path(folder)), args.dry)
        for part in parts:
            row = row_of(part, args, env, machine.get("devices", 0), deadline - time.monotonic())
            if part is PARTS[0]:
                machine = row
            show(row)
            rows.append(row)
            if args.record:
                measured_on = machine.get("device") or record.hardware()
                record.append(args.results / "gpu.jsonl", "gpu", row, measured_on, commit)
    failed = [row["part"] for row in rows if row["status"] != "ok" and not skipped(row["status"])]
    print(f"== {len(rows)} rows in {BUDGET_S - deadline + time.monotonic():.0f} s; not answered: {failed or 'none'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
