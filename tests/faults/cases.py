"""The fault campaign as data: who is struck how, in which phase, and what must be true of the others. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

PHASES = ("meeting", "start-up", "first call", "steady state", "evaluating", "saving", "ending")


@dataclass(frozen=True)
class Case:
    """One run with a fault.

    Attributes:
        script: "plain", a DeepSpeed script of three stages, or "gpt", launch/pretrain_gpt.py of two.
        fault: what happens: "kill" (SIGKILL), "stop" (SIGSTOP), "stop, continue" (after the others have ended), or one
            of the launcher's own (see `campaign`).
        stage: whom it happens to; None if to no stage.
        phase: when; "" if before the run.
        must_name: whether some survivor must name the stage, and not only accuse no other.
        statuses: what every survivor may end with.
        names: words that a line of some survivor must hold.
        corrupt: what is done to a complete checkpoint folder before the run.
    """

    script: str
    fault: str
    stage: int | None = None
    phase: str = ""
    must_name: bool = False
    statuses: tuple[int, ...] = (1,)
    names: str = ""
    corrupt: Callable[[Path], object] | None = None

    @property
    def name(self) -> str:
        """Its name in the table and on the command line."""
        stage = "" if self.stage is None else f", stage {self.stage}"
        return f"{self.script}: {self.fault}{f', {self.phase}' if self.phase else ''}{stage}"


def _must_name(phase: str) -> bool:
    # Before it, no connection of its own can fail; in collectives nobody's in particular does.
    return phase in ("first call", "steady state")


def _truncate(path: Path, keep: float = 0.5) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])


def _newest(save: Path) -> Path:
    return save / (save / "latest").read_text().strip()


def _first(save: Path, pattern: str) -> Path:
    return sorted(_newest(save).glob(pattern))[0]


def _folder_for_latest(save: Path) -> None:
    (save / "latest").unlink()
    (save / "latest").mkdir()


_PLAIN = [
    Case("plain", fault, stage, phase, must_name=_must_name(phase))
    for phase in PHASES
    for fault in ("kill", "stop")
    for stage in range(3)
] + [Case("plain", "stop, continue", stage, "steady state", must_name=True) for stage in range(3)]

_GPT = [
    *(
        Case("gpt", "kill", stage, phase, must_name=phase == "call 3")
        for phase in ("call 3", "saving")
        for stage in (0, 1)
    ),
    *(Case("gpt", "stop", stage, "call 3", must_name=True) for stage in (0, 1)),
    *(Case("gpt", "kill", 1, phase) for phase in ("start-up", "evaluating")),
    Case("gpt", "kill", 1, "ending", statuses=(0, 1)),  # all is done and saved by then
    Case("gpt", "stop", 0, "start-up", names="stage 0 (rank 0)"),
    *(Case("gpt", "never started", stage, names=f"rank {stage}") for stage in (0, 1)),
    Case("gpt", "a mute listener on MASTER_PORT", names="somebody accepts connections there, and does not answer"),
    Case("gpt", "MASTER_PORT is taken", names="cannot listen on port"),
    Case("gpt", "a rank of another run comes", statuses=(0,), names="has come to another run"),
    Case("gpt", "rank 1 is started twice", statuses=(0,), names="two processes are rank 1"),
    Case("gpt", "two runs save into one folder", statuses=(0,), names="{save}"),
    *(Case("gpt", "full disk", stage, "saving", statuses=(1, 2), names="{save}/global_step4") for stage in (0, 1)),
]

_CORRUPT = {
    "a layer file cut in half": ("layer_01-", lambda save: _truncate(_first(save, "layer_01-*"))),
    "a layer file empty": ("layer_01-", lambda save: _truncate(_first(save, "layer_01-*"), 0)),
    "a layer file missing": ("layer_01-", lambda save: _first(save, "layer_01-*").unlink()),
    "a stage's file cut in half": ("mp_rank_00", lambda save: _truncate(_first(save, "mp_rank_00*"))),
    "a stage's file missing": ("mp_rank_", lambda save: _first(save, "mp_rank_01*").unlink()),
    "latest empty": ("latest", lambda save: (save / "latest").write_text("")),
    "latest missing": ("latest", lambda save: (save / "latest").unlink()),
    "latest a folder": ("latest", _folder_for_latest),
    "latest names what is not there": ("global_step99", lambda save: (save / "latest").write_text("global_step99")),
}

CASES = [
    *_PLAIN,
    *_GPT,
    *(Case("gpt", fault, statuses=(2,), names=names, corrupt=corrupt) for fault, (names, corrupt) in _CORRUPT.items()),
]
assert len({case.name for case in CASES}) == len(CASES)
