"""What rank 0 says of a run before its first iteration."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from noflush.config import BLOCK
from noflush.launch.arguments.settings import Settings
from noflush.launch.gpt.size import describe


def start_lines(settings: Settings, parameters: int, without_meaning: Mapping[str, Sequence[str]]) -> list[str]:
    """The model, the ranks, what is noteworthy, and the options without meaning by what they are about."""
    model, ranks, steps = settings.model, settings.ranks, settings.steps
    vocabulary = f"{model.token_ids}"
    if model.vocabulary_padding:
        vocabulary += f" (and {model.vocabulary_padding} rows of padding, without probability)"
    by_stage, layers = settings.layers_by_stage, ""
    if len(set(by_stage)) > 1:
        layers = f"layers by stage [{', '.join(map(str, by_stage))}]; "
    length = f"{steps.samples} samples"
    if not steps.by_samples:
        length = f"{steps.iterations} iterations, {length}"
    lines = [
        f"GPT of {parameters:,} parameters: {model.layers} layers, hidden {model.hidden}, {model.heads} heads, "
        f"sequence {model.sequence}, vocabulary {vocabulary}; {', '.join(describe(model))}",
        f"{ranks.world} ranks: pipeline {ranks.pipeline} x data {ranks.data} x tensor {ranks.tensor}; {layers}"
        f"micro-batch {settings.batch.micro}, global batch {settings.batch.global_size} (K = {settings.gas}); "
        f"{settings.precision}; {length}",
    ]
    if settings.block is None:
        lines.append(f"{BLOCK} is not enabled: DeepSpeed's own schedule, with its flush")
    lines += settings.notes
    for kind, names in without_meaning.items():
        lines.append(f"without meaning here ({kind}): {' '.join(names)}")
    return lines
