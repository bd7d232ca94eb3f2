"""Runs what a comparison lacks, on several processes, and says how far it is."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from noflush.compare.agenda import Agenda, Plan, agenda
from noflush.compare.ledger import Ledger
from noflush.compare.settings import Record, Task, Trial
from noflush.compare.tables import duration
from noflush.compare.workers import Workers

_SECONDS = 0.5


@dataclass
class _Pace:
    """Work a second and job, from the trials that have run since this began."""

    work: float = 0.0
    seconds: float = 0.0

    def add(self, work: float, seconds: float) -> None:
        self.work += work
        self.seconds += seconds

    def left(self, work: float, jobs: int) -> str:
        if not work:
            return "done"
        if not self.work:
            return "time left: not known yet"
        return f"about {duration(work * self.seconds / self.work / jobs)} left"


def run(plan: Plan, task: Task, ledger: Ledger, jobs: int, console: Console) -> None:
    """Runs every trial of ``plan`` that ``ledger`` lacks, and keeps each there.

    Raises RuntimeError if one fails or its process dies.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}% {task.fields[note]}"),
    )
    with Workers(jobs, task) as workers, Progress(*columns, console=console) as progress:
        whole = progress.add_task("all", note="")
        bars: dict[str, TaskID] = {}
        updates: dict[str, int] = {}
        pace = _Pace()
        left = agenda(plan, task, ledger.find)
        while True:
            for trial in left.now:
                key = trial.key(task)
                if key not in bars:
                    if not workers.start(trial):
                        break
                    bars[key] = progress.add_task(name_of(trial), total=trial.updates, note="")
            if not workers.running:
                return
            for news in workers.news(_SECONDS):
                key = news.trial.key(task)
                updates[key] = news.update
                progress.update(bars[key], completed=news.update)
                if news.record is not None:
                    ledger.add(news.trial, news.record)
                    pace.add(news.trial.work(task) * _share_run(news.trial, task, news.record), news.record.seconds)
                    progress.remove_task(bars.pop(key))
                    progress.console.print(f"{name_of(news.trial)}: {_said(news.record)}")
                    left = agenda(plan, task, ledger.find)
            _tell(progress, whole, left, workers.running, updates, task, pace, jobs)


def name_of(trial: Trial) -> str:
    """A trial in words."""
    purpose = "search" if trial.part == "search" else f"seed {trial.seed}"
    return f"P={trial.stages} {trial.contestant.name} lr {trial.lr:g} {purpose} ({trial.updates} updates)"


def _said(record: Record) -> str:
    end = f"loss {record.loss:.4f}" if record.loss < float("inf") else "diverged"
    return f"{end} in {duration(record.seconds)}"


def _share_run(trial: Trial, task: Task, record: Record) -> float:
    return record.curve[-1][0] / (trial.updates * task.tokens_per_update)


def _tell(
    progress: Progress,
    whole: TaskID,
    left: Agenda,
    running: list[Trial],
    updates: dict[str, int],
    task: Task,
    pace: _Pace,
    jobs: int,
) -> None:
    under_way = sum(trial.work(task) * updates.get(trial.key(task), 0) / trial.updates for trial in running)
    remaining = sum(trial.work(task) for trial in left.now) + left.later - under_way
    progress.update(
        whole, completed=left.done + under_way, total=left.done + under_way + remaining, note=pace.left(remaining, jobs)
    )
