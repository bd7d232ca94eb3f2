"""The fault campaign: starts runs, strikes them, reads how they end, and goes on from what they left.

    python -m tests.faults.campaign [--only WORDS] [--jobs 2] [--list] [--write docs/faults.md]

Every run that is struck must end in bounded time; accuse the stage that was struck or none; leave a folder whose
``latest`` names a checkpoint that loads; and, started again, give the losses of a run that nobody disturbed.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import hashlib
import multiprocessing.process
import os
import re
import shutil
import signal
import socket
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from noflush.demo.port import held_port
from noflush.stage.checkpoint import newest_complete
from tests.faults import gpt, plain
from tests.faults.cases import CASES, Case
from tests.multiproc.ranks import CONTEXT

# At every start multiprocessing asks all children for their ends; from another thread than the one that waits for a
# child, it would take the answer away.
multiprocessing.process._cleanup = lambda: None

WORLD = {"plain": 3, "gpt": 2}
MARGIN = 30.0
"""Seconds beyond the timeouts: 6 to hear the others, 10 for the process to end, and a slow machine."""
BOUND = {
    "plain": max(plain.PEER_TIMEOUT_S, plain.MEETING_TIMEOUT_S) + MARGIN,
    "gpt": 60.0 * gpt.TIMEOUT_MINUTES + MARGIN,
}
ACCUSED = re.compile(
    r"(?:[Ss]tage \d+ \(|\b)rank (\d+)\)? (?:is gone|has been silent|was silent|failed)", re.IGNORECASE
)
"""How `noflush.failure.blame` and `noflush.failure.keeper` say it."""


@dataclass
class Result:
    """How a case went; ``faults`` is empty if it went as it must."""

    case: Case
    seconds: float = 0.0
    statuses: list[int | None] = field(default_factory=list)
    accused: set[int] = field(default_factory=set)
    resumed: str = ""
    faults: list[str] = field(default_factory=list)


class Ranks:
    """Processes of one run and their logs."""

    def __init__(self, script, folder, save, port, label="run", ranks=None, struck=(None, ""), job=None, **more):
        self.script, self.folder, self.label = script, folder, label
        world = WORLD[script]
        self.ranks = list(range(world)) if ranks is None else list(ranks)
        target = gpt.main if script == "gpt" else plain.main
        what = gpt.arguments(folder, save) if script == "gpt" else str(save)
        self.processes = []
        for rank in self.ranks:
            phase = struck[1] if rank == struck[0] else None
            keep = {key: value for key, value in more.items() if rank == struck[0]}
            if job:
                keep["job"] = job
            args = (rank, world, port, str(folder), what, phase, str(self.log(rank)))
            self.processes.append(CONTEXT.Process(target=target, args=args, kwargs=keep))
        for process in self.processes:
            process.start()

    def log(self, rank):
        return self.folder / f"{self.label}-{rank}.log"

    def text(self, rank):
        return self.log(rank).read_text(errors="replace") if self.log(rank).exists() else ""

    def end(self, within, but=None):
        """Statuses, of all ranks but one; None for one that has not ended in time."""
        deadline = time.monotonic() + within
        others = [process for rank, process in zip(self.ranks, self.processes, strict=True) if rank != but]
        for process in others:
            process.join(max(0.0, deadline - time.monotonic()))
        return [process.exitcode for process in others]

    def kill(self):
        for process in self.processes:
            process.kill()
            process.join()

    def losses(self):
        """By call or iteration, as printed by the last rank."""
        pattern = r"call (\d+) loss (\S+)" if self.script == "plain" else r"iteration +(\d+)/.*?lm loss: (\S+)"
        return dict(re.findall(pattern, self.text(self.ranks[-1])))


class Campaign:
    """Runs cases; undisturbed runs of both scripts come first."""

    def __init__(self, folder):
        self.folder = folder
        self.expected, self.whole = {}, {}

    def undisturbed(self, script):
        folder = self.folder / f"undisturbed-{script}"
        folder.mkdir()
        self.whole[script] = folder / "save"
        with held_port() as port:
            ranks = Ranks(script, folder, self.whole[script], port)
            statuses = ranks.end(180)
            ranks.kill()
        if statuses != [0] * WORLD[script]:
            sys.exit(f"the undisturbed {script} run ended with {statuses}:\n" + ranks.text(0) + ranks.text(-1))
        self.expected[script] = ranks.losses()

    def run(self, case):
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        result = Result(case)
        start = time.monotonic()
        try:
            with held_port() as port:
                _FAULTS.get(case.fault, Campaign._strike)(self, case, result, folder, port)
        except Exception as error:
            result.faults.append(f"the driver: {type(error).__name__}: {error}")
        if result.faults:
            print(f"    (logs of '{case.name}': {folder})", flush=True)
        print(f"{'ok  ' if not result.faults else 'FAIL'} {case.name} [{time.monotonic() - start:.0f} s] "
              f"{'; '.join(result.faults)}", flush=True)  # fmt: skip
        return result

    # ---- faults ------------------------------------------------------------------------------------------

    def _strike(self, case, result, folder, port):
        """A signal, in the phase where the victim waits for it."""
        ranks = Ranks(case.script, folder, folder / "save", port, struck=(case.stage, case.phase))
        victim = ranks.processes[case.stage]
        try:
            if not _wait(lambda: (folder / "reached").exists() or victim.exitcode is not None, 90) or victim.exitcode:
                result.faults.append(f"never came to {case.phase}:\n{ranks.text(case.stage)[-2000:]}")
                return
            os.kill(victim.pid, signal.SIGKILL if case.fault == "kill" else signal.SIGSTOP)
            told = time.monotonic()
            result.statuses = ranks.end(BOUND[case.script], but=case.stage)
            result.seconds = time.monotonic() - told
            survivors = [rank for rank in ranks.ranks if rank != case.stage]
            if case.fault == "stop, continue":
                (folder / "reached").unlink()
                os.kill(victim.pid, signal.SIGCONT)
                victim.join(BOUND[case.script])
                if victim.exitcode != 1:
                    result.faults.append(f"the stopped one, continued, ended with {victim.exitcode}")
                survivors.append(case.stage)
        finally:
            ranks.kill()
        self._judge(case, result, ranks, survivors)
        self._nothing_lost(case, result, folder)

    def _never_started(self, case, result, folder, port):
        others = [rank for rank in range(WORLD["gpt"]) if rank != case.stage]
        self._until_the_end(case, result, Ranks("gpt", folder, folder / "save", port, ranks=others))

    def _mute(self, case, result, folder, port):
        with socket.create_server(("127.0.0.1", 0)) as mute:
            self._until_the_end(case, result, Ranks("gpt", folder, folder / "save", mute.getsockname()[1], ranks=[1]))

    def _taken(self, case, result, folder, port):
        with socket.create_server(("", 0)) as other:
            self._until_the_end(case, result, Ranks("gpt", folder, folder / "save", other.getsockname()[1], ranks=[0]))

    def _another_run(self, case, result, folder, port):
        self._intruder(case, result, folder, port, {"ranks": [1], "job": "6"}, save=folder / "other", status=1)

    def _twice(self, case, result, folder, port):
        self._intruder(case, result, folder, port, {"ranks": [1]}, save=folder / "save", status=1)

    def _intruder(self, case, result, folder, port, who, save, status):
        """Rank 0 and then one that does not belong; the run must go on to its end."""
        first = Ranks("gpt", folder, folder / "save", port, struck=(0, "start-up"))
        intruder = None
        try:
            assert _wait(lambda: (folder / "reached").exists(), 90)
            intruder = Ranks("gpt", folder, save, port, label="intruder", **who)
            turned_away = intruder.end(BOUND["gpt"])
            (folder / "reached").unlink()
            if turned_away != [status]:
                result.faults.append(f"the one that does not belong ended with {turned_away}")
            result.statuses = first.end(BOUND["gpt"])
        finally:
            first.kill()
            if intruder:
                intruder.kill()
        self._judge(case, result, first, first.ranks, also=intruder)
        if first.losses() != self.expected["gpt"]:
            result.faults.append("the run's losses are not those of an undisturbed run")

    def _two_writers(self, case, result, folder, port):
        first = Ranks("gpt", folder, folder / "save", port, struck=(0, "saving"))
        second = None
        try:
            assert _wait(lambda: (folder / "reached").exists(), 90)
            with held_port() as other:
                second = Ranks("gpt", folder, folder / "save", other, label="second")
                refused = second.end(45)  # the first one's other rank waits for it in a collective, for 60 s
                (folder / "reached").unlink()
            if refused != [2, 2]:
                result.faults.append(f"the second run ended with {refused}, expected 2")
            result.statuses = first.end(BOUND["gpt"])
        finally:
            first.kill()
            if second:
                second.kill()
        self._judge(case, result, second, [])
        self._judge(case, result, first, first.ranks, also=second)
        if first.losses() != self.expected["gpt"]:
            result.faults.append("the first run's losses are not those of an undisturbed run")

    def _full_disk(self, case, result, folder, port):
        ranks = Ranks("gpt", folder, folder / "save", port, struck=(case.stage, ""), full_disk=True)
        start = time.monotonic()
        self._until_the_end(case, result, ranks)
        result.seconds = time.monotonic() - start
        self._nothing_lost(case, result, folder)

    def _corrupt(self, case, result, folder, port):
        shutil.copytree(self.whole["gpt"], folder / "save")
        case.corrupt(folder / "save")
        before = _hashes(folder / "save")
        self._until_the_end(case, result, Ranks("gpt", folder, folder / "save", port))
        if _hashes(folder / "save") != before:
            result.faults.append("the folder is not as it was")
        result.resumed = "refused, folder untouched"

    # ---- what must be true -------------------------------------------------------------------------------

    def _until_the_end(self, case, result, ranks):
        start = time.monotonic()
        try:
            result.statuses = ranks.end(BOUND["gpt"])
            result.seconds = time.monotonic() - start
        finally:
            ranks.kill()
        self._judge(case, result, ranks, ranks.ranks)

    def _judge(self, case, result, ranks, survivors, also=None):
        """Exits and accusations of the ``survivors``."""
        texts = {rank: ranks.text(rank) for rank in survivors}
        if None in result.statuses:
            result.faults.append(f"not ended within {BOUND[case.script]:g} s: {result.statuses}")
        elif survivors and not set(result.statuses) <= set(case.statuses):
            result.faults.append(f"ended with {result.statuses}, expected {case.statuses}")
        for rank, text in texts.items():
            told = {int(found) for found in ACCUSED.findall(text)}
            result.accused |= told
            if told - {case.stage}:
                result.faults.append(f"rank {rank} accuses {sorted(told - {case.stage})}")
        if survivors and case.must_name and result.accused != {case.stage}:
            result.faults.append("nobody names the stage")
        if case.names and survivors:
            said = "".join(texts.values()) + ("".join(also.text(rank) for rank in also.ranks) if also else "")
            wanted = case.names.format(save=ranks.folder / "save")
            # A refusal is one line, or a line a fault below one.
            ours = ("noflush: ", "  - ")
            lines = [line for line in said.splitlines() if line.startswith(ours) and wanted in line]
            if not lines:
                result.faults.append(f"no line of noflush says '{wanted}'")
        if case.statuses == (2,) and any("Traceback" in text for text in texts.values()):
            result.faults.append("a traceback beside the refusal")

    def _nothing_lost(self, case, result, folder):
        """``latest`` names a checkpoint that loads, and the run goes on to the losses of an undisturbed one."""
        struck = Ranks.losses(_Logs(case.script, folder, WORLD[case.script] - 1))
        tag = newest_complete(folder / "save") if (folder / "save").is_dir() else None
        with held_port() as port:
            again = Ranks(case.script, folder, folder / "save", port, label="again")
            statuses = again.end(120)
            again.kill()
        if statuses != [0] * WORLD[case.script]:
            result.faults.append(f"started again from {tag} it ended with {statuses}")
            return
        expected, losses = self.expected[case.script], struck | again.losses()
        # The struck run may not have printed what it had not saved, and the resumed one starts at its checkpoint.
        if losses != expected:
            result.faults.append(f"losses after going on from {tag} are not those of an undisturbed run")
        result.resumed = f"same losses from {tag}" if tag else "same losses anew"


class _Logs:
    """The logs of a run that is over, for `Ranks.losses`."""

    def __init__(self, script, folder, last):
        self.script, self.ranks, self._path = script, [last], folder / f"run-{last}.log"

    def text(self, rank):
        return self._path.read_text(errors="replace") if self._path.exists() else ""


_FAULTS = {
    "never started": Campaign._never_started,
    "a mute listener on MASTER_PORT": Campaign._mute,
    "MASTER_PORT is taken": Campaign._taken,
    "a rank of another run comes": Campaign._another_run,
    "rank 1 is started twice": Campaign._twice,
    "two runs save into one folder": Campaign._two_writers,
    "full disk": Campaign._full_disk,
    **{case.fault: Campaign._corrupt for case in CASES if case.corrupt},
}


def _wait(condition, seconds):
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return False


def _hashes(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


def table(results):
    """The results as docs/faults.md."""
    bad = sum(bool(result.faults) for result in results)
    lines = [
        "# What happens when something breaks",
        "",
        "Written by `make faults` (`tests/faults/campaign.py`), which strikes real processes and reads how they end:",
        f"{len(results)} runs, {len(results) - bad} as they must be. `plain` is a DeepSpeed script of three stages",
        "under noflush, `gpt` is `launch/pretrain_gpt.py` of two. *After* is the time from the fault (where it has no",
        f"moment, from the start) to the end of the last survivor, timeouts included: {plain.PEER_TIMEOUT_S} s for a",
        f"silent neighbour and {plain.MEETING_TIMEOUT_S} s for a collective in `plain`, {gpt.PEER_TIMEOUT_S} s and "
        f"{60 * gpt.TIMEOUT_MINUTES} s in `gpt`.",
        "*Accused* is every stage that any survivor names; `-` is nobody.",
        "",
        "| run | others end with | after | accused | started again | as it must be |",
        "|---|---|---|---|---|---|",
    ]
    for result in results:
        statuses = " ".join(map(str, result.statuses)) or "-"
        accused = ", ".join(f"stage {rank}" for rank in sorted(result.accused)) or "-"
        verdict = "yes" if not result.faults else "**no**: " + "; ".join(result.faults).splitlines()[0]
        after = f"{result.seconds:.0f} s" if result.seconds else "-"
        lines.append(f"| {result.case.name} | {statuses} | {after} | {accused} | {result.resumed or '-'} | {verdict} |")
    return "\n".join(lines) + "\n"


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", action="append", help="run only cases whose names hold these words; may be repeated")
    p.add_argument("--jobs", type=int, default=2, help="runs at a time")
    p.add_argument("--list", action="store_true", help="print the names of the cases")
    p.add_argument("--write", help="a file for the table")
    args = p.parse_args()
    cases = [case for case in CASES if not args.only or any(words in case.name for words in args.only)]
    if args.list or not cases:
        print(*(case.name for case in CASES), sep="\n")
        return 0 if args.list else 2
    start = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="noflush-faults-"))
    campaign = Campaign(folder)
    for script in sorted({case.script for case in cases}):
        campaign.undisturbed(script)
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        results = list(pool.map(campaign.run, cases))
    bad = [result for result in results if result.faults]
    print(f"{len(results)} runs, {len(results) - len(bad)} as they must be, in {time.monotonic() - start:.0f} s")
    if args.write:
        Path(args.write).write_text(table(results))
    if not bad:
        shutil.rmtree(folder)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
