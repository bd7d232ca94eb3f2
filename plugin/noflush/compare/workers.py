"""Processes that run trials, one thread each. They end with whoever started them, however that ends."""

from __future__ import annotations

import multiprocessing
import signal
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

from noflush.compare.settings import Record, Task, Trial

_SECONDS_TO_END = 2.0
_SECONDS_BETWEEN = 0.5  # of news of an update


@dataclass
class _Worker:
    process: Any
    pipe: Connection
    trial: Trial | None = None


@dataclass(frozen=True)
class News:
    """Of a running ``trial``: the ``update`` it has made, or the ``record`` it has come to."""

    trial: Trial
    update: int = 0
    record: Record | None = None


class Workers:
    """At most ``jobs`` processes, started when they are first needed; a context manager that ends them all."""

    def __init__(self, jobs: int, task: Task) -> None:
        self._jobs = jobs
        self._task = task
        self._workers: list[_Worker] = []

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.process.terminate()
        for worker in self._workers:
            worker.process.join(_SECONDS_TO_END)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()
            worker.pipe.close()

    @property
    def running(self) -> list[Trial]:
        """Trials under way."""
        return [worker.trial for worker in self._workers if worker.trial is not None]

    def start(self, trial: Trial) -> bool:
        """Gives ``trial`` to an idle worker; False if there is none."""
        idle = next((worker for worker in self._workers if worker.trial is None), None)
        if idle is None:
            if len(self._workers) == self._jobs:
                return False
            idle = self._launch()
        idle.trial = trial
        try:
            idle.pipe.send(trial)
        except OSError:
            raise _died(idle) from None
        return True

    def _launch(self) -> _Worker:
        # Spawned: a fork of a process in which torch has started threads may hang.
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_work, args=(theirs, self._task), daemon=True)
        process.start()
        theirs.close()
        self._workers.append(_Worker(process, ours))
        return self._workers[-1]

    def news(self, seconds: float) -> Iterator[News]:
        """What has come within ``seconds``. Raises RuntimeError if a trial failed or a worker died."""
        ready = wait([worker.pipe for worker in self._workers if worker.trial is not None], seconds)
        for worker in [worker for worker in self._workers if worker.pipe in ready]:
            assert worker.trial is not None
            try:
                told = worker.pipe.recv()
            except (EOFError, OSError):
                raise _died(worker) from None
            if isinstance(told, int):
                yield News(worker.trial, update=told)
            elif isinstance(told, Record):
                trial, worker.trial = worker.trial, None
                yield News(trial, record=told)
            else:
                raise RuntimeError(f"trial {worker.trial.contestant.name}, lr {worker.trial.lr:g}, failed:\n{told}")


def _died(worker: _Worker) -> RuntimeError:
    worker.process.join(_SECONDS_TO_END)
    code = worker.process.exitcode
    return RuntimeError(f"a worker ended with status {code} in the middle of a trial; the same command goes on")


def _work(pipe: Connection, task: Task) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal tells everyone; whoever started us ends us
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        import torch

        from noflush.compare.corpus import load
        from noflush.compare.trial import run_trial

        torch.set_num_threads(1)
        corpus = load(task)
        told = 0.0

        def tell(update: int) -> None:
            nonlocal told
            if time.monotonic() - told >= _SECONDS_BETWEEN:
                told = time.monotonic()
                pipe.send(update)

        while True:
            trial = pipe.recv()
            pipe.send(run_trial(task, corpus, trial, tell))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # nobody is left to tell
    except Exception:
        pipe.send(traceback.format_exc())
