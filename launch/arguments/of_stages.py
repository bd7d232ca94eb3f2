"""What the arguments say of how many transformer layers each pipeline stage has.

The embedding is the first stage's, the final norm and the output layer are the last one's, whatever the split.
"""

from __future__ import annotations

import re

from noflush.launch.arguments.settings import Ranks
from noflush.launch.arguments.values import Values

_ENDS = "decoder_first_pipeline_num_layers", "decoder_last_pipeline_num_layers"
_COUNTED = "account_for_embedding_in_pipeline_split", "account_for_loss_in_pipeline_split"
_LAYOUT = "pipeline_model_parallel_layout"
_EXAMPLE = "Et|(tt|)*2tL is four stages of 1, 2, 2 and 1 layers"


def read_layers_by_stage(of: Values, layers: int, ranks: Ranks) -> tuple[int, ...]:
    """Transformer layers of every stage, in order: as many each, or as Megatron's options of uneven stages say.

    Adds to the faults what cannot be; the answer means nothing then.
    """
    ways = [
        [of.named[name] for name in names if name in of.named and of.values[name] not in (None, False)]
        for names in ((_LAYOUT,), _ENDS, _COUNTED)
    ]
    given = [" ".join(names) for names in ways if names]
    if not of.known("num_layers", "pipeline_model_parallel_size", *_ENDS):
        return (layers,)
    if len(given) > 1:
        fault: str | None = f"{' and '.join(given)} each say which layers a stage has: give one"
        found: tuple[int, ...] = ()
    elif of.pipeline_model_parallel_layout is not None:
        found, fault = _of_layout(of.pipeline_model_parallel_layout, layers, ranks.pipeline)
    elif ways[1]:
        found, fault = _of_ends(of.values[_ENDS[0]], of.values[_ENDS[1]], layers, ranks.pipeline)
    else:
        found, fault = _even(of.values[_COUNTED[0]], of.values[_COUNTED[1]], layers, ranks.pipeline)
    if fault is not None:
        of.faults.append(fault)
        return (layers,)
    return found


def _on(layers: int, stages: int) -> str:
    return f"--num-layers {layers} on --pipeline-model-parallel-size {stages}"


def _even(embedding: bool, loss: bool, layers: int, stages: int) -> tuple[tuple[int, ...], str | None]:
    """As many layers each; the embedding, or the output layer with the loss, counts as one of them where that is so."""
    counted = layers + embedding + loss
    if counted % stages:
        best = max(counted - counted % stages, stages) - embedding - loss
        what = "".join(
            f" with {option}" for option, there in zip(_written(_COUNTED), (embedding, loss), strict=True) if there
        )
        fewer = f"use {best} layers, or" if best > 0 else "use"
        return (), (
            f"{_on(layers, stages)}{what}: every stage gets the same number of layers; {fewer} another size, or say "
            "how many each stage gets by --pipeline-model-parallel-layout"
        )
    by_stage = [counted // stages] * stages
    by_stage[0] -= embedding
    by_stage[-1] -= loss
    return tuple(by_stage), None


def _of_ends(first: int | None, last: int | None, layers: int, stages: int) -> tuple[tuple[int, ...], str | None]:
    """So many in the first stage and in the last one; the rest shared out evenly among the others."""
    ends = [count for count in (first, last) if count is not None]
    rest, others = layers - sum(ends), stages - len(ends)
    if others < 0 or (rest != 0 if others == 0 else rest < others or rest % others):
        options = zip(_written(_ENDS), (first, last), strict=True)
        said = " and ".join(f"{option} {count}" for option, count in options if count is not None)
        return (), (
            f"{said} leave {rest} of --num-layers {layers} for the {max(0, others)} other stages of "
            f"--pipeline-model-parallel-size {stages}: they share the rest evenly, one layer or more each (none where "
            "there is no other stage); change the counts, or give --pipeline-model-parallel-layout"
        )
    between = [rest // others] * others if others else []
    return (*([] if first is None else [first]), *between, *([] if last is None else [last])), None


def _of_layout(layout: str, layers: int, stages: int) -> tuple[tuple[int, ...], str | None]:
    """As a layout of Megatron's says: ``E`` embedding, ``t`` transformer layer, ``L`` loss, ``|`` between stages."""
    rows = _parsed(layout, layers + stages)
    if rows is None:
        fault = (
            "it is made of E (embedding), t (a transformer layer), L (output layer and loss) and | (between stages), "
            f"with x*N or (...)*N for N times, not nested, N at most {layers + stages}; {_EXAMPLE}"
        )
    elif "m" in "".join(rows):
        fault = "m is a layer of multi-token prediction, which is not supported; take it out"
    elif len(rows) != stages:
        fault = (
            f"it has {len(rows)} stages, and --pipeline-model-parallel-size is {stages}: give as many (several stages "
            f"interleaved on one rank would hide a bubble that is not there); {_EXAMPLE}"
        )
    elif not re.fullmatch("Et*L", "".join(rows)):
        fault = "E comes first and L last, once each: the embedding is the first stage's, the loss the last one's"
    elif (count := "".join(rows).count("t")) != layers:
        fault = f"it has {count} transformer layers, and --num-layers is {layers}: make them as many"
    elif "" in rows:
        fault = f"stage {rows.index('')} has nothing in it: give it a layer, or take a stage less"
    else:
        return tuple(row.count("t") for row in rows), None
    return (), f"--pipeline-model-parallel-layout {layout}: {fault}"


def _parsed(layout: str, most: int) -> list[str] | None:
    """What ``layout`` has in each stage, written out, by megatron-core's own parser; None where it cannot be read."""
    from megatron.core.transformer.enums import LayerType
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    letters = {LayerType.embedding: "E", LayerType.decoder: "t", LayerType.loss: "L", LayerType.mtp: "m"}
    if any(len(number) > 9 or int(number) > most for number in re.findall(r"\*(\d+)", layout)):
        return None  # the parser writes everything out
    try:
        rows = PipelineParallelLayerLayout.parse_str_to_list(layout)
    except AssertionError:
        return None
    return ["".join(letters[kind] for kind in row) for row in rows]


def _written(names: tuple[str, ...]) -> list[str]:
    return ["--" + name.replace("_", "-") for name in names]
