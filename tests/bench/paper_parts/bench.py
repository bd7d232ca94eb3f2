"""All contestants of one call: what is checked before it starts, their slices, and the table of where they are."""

from __future__ import annotations

import time

from rich.console import Console
from rich.table import Table

from noflush.compare.tables import duration
from noflush.launch.arguments.parser import expand
from noflush.stage.checkpoint import write_whole
from tests.bench import record
from tests.bench.paper_parts import folders, room, table
from tests.bench.paper_parts.agenda import Entry, best_rate, next_of
from tests.bench.paper_parts.ranks import run_slice
from tests.bench.paper_parts.setting import ARGUMENTS, described, ds_config, main_run, trials, words

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
        """One slice of a run; sets it aside if it came no further."""
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
        if not (stop.first or now.finished or now.reached > standing.reached):
            why = f"slice {number} ended with {codes}, no further than iteration {now.reached}: {log.parent}"
            self.aside[run.folder] = why
            console.print(f"{what}: {why}", style="red")
            last = self.setting.stages - 1
            failed = "srun" if self.place.slurm else next((rank for rank, code in enumerate(codes) if code), last)
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

    def train(self, stop, title):
        """Slices in turns until nothing is left or it is told to stop."""
        while not stop.first and (standing := next_of(self.entries(), self.aside)):
            folders.check(standing.run, self.settings_of(standing.run))
            self.slice(standing, stop)
            self.write(self.rows(), title)
