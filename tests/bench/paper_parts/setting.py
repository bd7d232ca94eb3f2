"""What is trained, the launcher's arguments for it, and what must be the same when a folder is gone on with. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.bench.paper_parts.contestants import Contestant, config_of, scaled

CONFIGS = Path(__file__).parents[3] / "launch" / "configs"
ARGUMENTS = CONFIGS / "gpt-134m-paper.args"
CONFIG = CONFIGS / "gpt-134m-paper.json"
_WARMUP = 3_000


@dataclass(frozen=True)
class Setting:
    """The same for all contestants.

    Attributes:
        iterations: of every contestant, a multiple of ten.
        data: the launcher's arguments of data and vocabulary.
        held: what they are beside their names, as --data's size in bytes: it must stay.
        stages, batch, sequence: P; samples and tokens of a batch.
        size: the launcher's arguments that make the model another than the paper's, for a rehearsal.
    """

    iterations: int
    data: tuple[str, ...]
    held: tuple[tuple[str, str], ...] = ()
    seed: int = 1337
    stages: int = 8
    batch: int = 8
    sequence: int = 512
    size: tuple[str, ...] = ()


@dataclass(frozen=True)
class Run:
    """A contestant at a learning rate: its whole training, or a trial of a tenth of it.

    Attributes:
        folder: of its checkpoints and logs.
        tuned_over: the rates that its own was chosen from.
    """

    contestant: Contestant
    lr: float
    iterations: int
    folder: Path
    tuned_over: tuple[float, ...] = ()
    trial: bool = False


def main_run(one: Contestant, lr: float, setting: Setting, out: Path, tuned_over: Sequence[float] = ()) -> Run:
    """The training that is reported."""
    return Run(one, lr, setting.iterations, out / one.name, tuple(tuned_over))


def trials(one: Contestant, rates: Sequence[float], setting: Setting, out: Path) -> list[Run]:
    """A tenth of the training by each rate: warm-up, decay and discount are a tenth as long, too."""
    folder = out / one.name / "tune"
    return [Run(one, lr, setting.iterations // 10, folder / f"{lr:g}", trial=True) for lr in rates]


def every(run: Run) -> int:
    """Iterations between two evaluations: fifty in a training, as the paper has it, or ten in one too short for that.

    A trial is evaluated at its end.
    """
    if run.trial:
        return run.iterations
    return run.iterations // (50 if run.iterations % 50 == 0 else 10)


def arguments(setting: Setting, run: Run) -> list[str]:
    """The launcher's, without the folder's and a slice's; later ones win."""
    return [
        *setting.size,
        *setting.data,
        *("--pipeline-model-parallel-size", str(setting.stages), "--seed", str(setting.seed)),
        *("--train-iters", str(run.iterations), "--eval-interval", str(every(run))),
        *("--lr", f"{run.lr:g}", "--min-lr", f"{run.lr / 10:g}"),
        *("--lr-warmup-iters", str(min(scaled(_WARMUP, run.iterations), run.iterations - 1))),
        *run.contestant.arguments,
    ]


def ds_config(run: Run) -> dict:
    """The DeepSpeed config."""
    return config_of(run.contestant, json.loads(CONFIG.read_text()), run.iterations)


def words(setting: Setting, run: Run) -> list[str]:
    """All of a run's arguments but how long a slice is."""
    folder = str(run.folder)
    return [
        f"@{ARGUMENTS}",
        *arguments(setting, run),
        *("--deepspeed_config", str(run.folder / "ds_config.json")),
        *("--save", folder, "--load", folder, "--exit-signal-handler"),
    ]


def described(setting: Setting, run: Run, papers: Sequence[str]) -> dict[str, str]:
    """What makes the run the one it is: its options as the last of each says, and its config.

    ``papers``: the words of the paper's file of arguments.
    """
    options = _options([*papers, *arguments(setting, run)])
    del options["--deepspeed_config"]  # its content stands below
    config = ds_config(run)
    rates = {"tuned over": " ".join(f"{lr:g}" for lr in run.tuned_over)} if run.tuned_over else {}
    return options | dict(setting.held) | {key: json.dumps(config[key], sort_keys=True) for key in config} | rates


def differences(there: Mapping[str, str], here: Mapping[str, str]) -> list[str]:
    """What a folder's settings and this run's differ in, a line each."""
    return [
        f"{key} is {there.get(key, 'not given')!r} there, and {here.get(key, 'not given')!r} here"
        for key in sorted({*there, *here})
        if there.get(key) != here.get(key)
    ]


def _options(found: Sequence[str]) -> dict[str, str]:
    options: dict[str, str] = {}
    name = ""
    for word in found:
        if word.startswith("--"):
            name = word
            options[name] = ""
        else:
            options[name] = f"{options[name]} {word}".strip()
    return options
