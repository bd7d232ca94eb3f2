"""What lies in a checkpoint beside DeepSpeed's files: the model, its tokenizer, where it stands, a list of these files,
and whether it holds weights alone.

Imports no torch and no host.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from noflush.launch.arguments.progress import Position, position_in
from noflush.launch.arguments.settings import Model, Tokens
from noflush.stage.checkpoint import newest_complete

MODEL = "model.json"
TOKENS = "tokenizer.json"
POSITION = "position.json"
WEIGHTS_ALONE = "weights_alone"
"""Marks a checkpoint without optimizer state."""
_TRUST = "trust_remote_code"
MANIFEST = "manifest.json"
"""Names and sizes of DeepSpeed's files in the checkpoint."""


def write_manifest(checkpoint: Path) -> None:
    """Lists DeepSpeed's files in ``checkpoint``, each with its size in bytes."""
    sizes = {path.name: path.stat().st_size for path in sorted(checkpoint.glob("*.pt"))}
    (checkpoint / MANIFEST).write_text(json.dumps(sizes, indent=1))


def read_manifest(checkpoint: Path) -> dict[str, int]:
    """Size in bytes by name, as `write_manifest` listed them; empty for a checkpoint that has no list.

    Raises ValueError if the list is no such.
    """
    try:
        sizes = json.loads((checkpoint / MANIFEST).read_text())
        return {str(name): int(size) for name, size in sizes.items()}
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"{checkpoint / MANIFEST} is no list of files: {error}") from None


def write_model(checkpoint: Path, model: Model) -> None:
    """Puts ``model`` beside its weights."""
    (checkpoint / MODEL).write_text(json.dumps(dataclasses.asdict(model), indent=1))


def read_model(checkpoint: Path) -> Model:
    """The model of a checkpoint. Raises ValueError if it is none that `write_model` wrote."""
    try:
        return Model(**json.loads((checkpoint / MODEL).read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{checkpoint} does not say what its model is ({MODEL}: {error})") from None


def write_tokens(checkpoint: Path, tokens: Tokens) -> None:
    """Puts beside the weights which tokenizer they were trained with; its files are named, not copied.

    Whether its code was trusted is not written: that is for whoever reads the checkpoint to say.
    """
    fields = dataclasses.asdict(tokens)
    del fields[_TRUST]
    (checkpoint / TOKENS).write_text(json.dumps(fields, indent=1))


def read_tokens(checkpoint: Path) -> Tokens | None:
    """The tokenizer that the checkpoint was trained with, its code not trusted; None if it does not say."""
    try:
        found = Tokens(**{**json.loads((checkpoint / TOKENS).read_text()), _TRUST: False})
    except (OSError, ValueError, TypeError):
        return None
    names = found.type, found.model, found.vocab_file, found.merge_file
    numbers = found.vocab_size or 0, found.extra_ids
    fits = all(isinstance(name, str | None) for name in names) and all(type(number) is int for number in numbers)
    return found if fits else None


def write_position(checkpoint: Path, position: Position) -> None:
    """Puts beside the weights where the run stands, to be known before anything is built."""
    (checkpoint / POSITION).write_text(json.dumps(dataclasses.asdict(position)))


def read_position(checkpoint: Path) -> Position | None:
    """Where the run stands that wrote ``checkpoint``; None if it does not say so here.

    Raises ValueError if the file is none that `write_position` wrote.
    """
    path = checkpoint / POSITION
    if not path.is_file():
        return None
    try:
        return position_in(json.loads(path.read_text()))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be used ({error})") from None


def checkpoint_in(folder: str | Path) -> Path:
    """The newest complete checkpoint in ``folder``, or ``folder`` itself if it is one.

    Raises ValueError if there is none.
    """
    path = Path(folder)
    if (path / MODEL).is_file():
        return path
    tag = newest_complete(path)
    if tag is None:
        raise ValueError(f"{folder} holds no checkpoint: give the folder that was the run's --save")
    if not (path / tag / MODEL).is_file():
        raise ValueError(f"{path / tag} is no checkpoint of pretrain_gpt.py: it has no {MODEL}")
    return path / tag
