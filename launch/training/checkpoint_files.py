"""What lies in a checkpoint beside DeepSpeed's files: the model, its tokenizer, a list of all files, and whether it
holds weights alone.

Imports no torch and no host.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from noflush.checkpoint import newest_complete
from noflush.launch.arguments.settings import Model, Tokens

MODEL = "model.json"
TOKENS = "tokenizer.json"
WEIGHTS_ALONE = "weights_alone"
"""Marks a checkpoint without optimizer state."""
MANIFEST = "manifest.json"
"""Names and sizes of the checkpoint's other files."""


def write_manifest(checkpoint: Path) -> None:
    """Lists every file that is in ``checkpoint``, with its size in bytes."""
    sizes = {path.name: path.stat().st_size for path in sorted(checkpoint.iterdir()) if path.is_file()}
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
    """Puts beside the weights which tokenizer they were trained with; its files are named, not copied."""
    (checkpoint / TOKENS).write_text(json.dumps(dataclasses.asdict(tokens), indent=1))


def read_tokens(checkpoint: Path) -> Tokens | None:
    """The tokenizer that the checkpoint was trained with; None if it does not say."""
    try:
        return Tokens(**json.loads((checkpoint / TOKENS).read_text()))
    except (OSError, ValueError, TypeError):
        return None


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
