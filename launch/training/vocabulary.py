"""Which rows of the model's vocabulary are token ids: the tokenizer's; the others are padding, without probability.

Imports no torch and no host.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from noflush.launch.arguments.settings import Checkpoints, Model, Settings
from noflush.launch.data.tokenizer import padded_vocabulary
from noflush.launch.training.beside_weights import MODEL
from noflush.stage.checkpoint import newest_complete


def with_vocabulary(settings: Settings, token_ids: int) -> Settings:
    """``settings`` with the model's vocabulary known, for a tokenizer of ``token_ids`` ids; notes say what is unusual.

    A run that resumes a checkpoint from before padding was told apart goes on as it began: all rows have a probability.
    Raises ValueError if the tokenizer has more ids than there are rows, or rows do not divide by the tensor slices.
    """
    given = settings.model
    rows = given.vocabulary or padded_vocabulary(token_ids, given.pad_vocabulary_to)
    if rows < token_ids:
        raise ValueError(
            f"--padded-vocab-size {rows} for a tokenizer with {token_ids} token ids: it must be that or more; leave it "
            "out to have it worked out"
        )
    if rows % settings.ranks.tensor:
        raise ValueError(
            f"--no-pad-vocab-size with a tokenizer of {token_ids} token ids on --tensor-model-parallel-size "
            f"{settings.ranks.tensor}: they must be a multiple of it; leave the first out"
        )
    model = dataclasses.replace(given, vocabulary=rows, vocabulary_padding=rows - token_ids)
    there = _loaded_model(settings.checkpoints)
    notes = settings.notes
    if there.get("vocabulary") == rows:
        if settings.checkpoints.finetune:
            notes += _of_another_tokenizer(settings.checkpoints, there, model)
        elif "vocabulary_padding" not in there and model.vocabulary_padding:
            notes += (
                f"--load {settings.checkpoints.load}: its {model.vocabulary_padding} rows of padding were trained as "
                "token ids, and so they go on; --finetune takes the weights alone and leaves padding no probability",
            )
            model = dataclasses.replace(model, vocabulary_padding=0)
    return dataclasses.replace(settings, model=model, notes=notes)


def _loaded_model(settings: Checkpoints) -> Mapping[str, Any]:
    """The fields of the model to load; none where there is none to read, which is `model_faults`' to say."""
    tag = settings.load and (settings.tag or newest_complete(settings.load))
    if not settings.load or not tag:
        return {}
    try:
        found = json.loads((Path(settings.load) / tag / MODEL).read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _of_another_tokenizer(settings: Checkpoints, there: Mapping[str, Any], model: Model) -> tuple[str, ...]:
    """Says that the weights to load know fewer token ids than ``model`` has, or more."""
    known = model.vocabulary - int(there.get("vocabulary_padding", 0))
    if known == model.token_ids:
        return ()
    what = (
        f"the last {model.token_ids - known} are rows of padding there, and begin untrained"
        if known < model.token_ids
        else f"the last {known - model.token_ids} of its ids have no probability from here on"
    )
    return (f"--load {settings.load}: its model has {known} token ids, the tokenizer {model.token_ids}: {what}",)
