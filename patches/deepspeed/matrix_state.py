"""State of matrices that has other shapes than theirs, as SOAP's covariances and bases, in a shard of ZeRO's.

Such state lies in a row, a matrix after the other, so that DeepSpeed's map of a shard says nothing about it. A stage's
file says where it lies, by parameter, in whichever shard has the parameter: matrices are never cut in two.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.nn import Parameter

from noflush.methods.flat_state import lay_out, span
from noflush.methods.matrices import is_gap, piece_of
from noflush.methods.optimizer import DelayAwareOptimizer
from noflush.stage.layout import FlatLayout

Spans = dict[str, dict[str, tuple[int, int]]]
"""By name of a parameter, by name of a state tensor: first and last + 1 of its numbers in a shard's."""


def rows_in_shard(
    rule: Any, group: Mapping[str, Any], layout: FlatLayout, start: int, length: int
) -> dict[str, dict[Parameter, slice]]:
    """By name of a state tensor that lies in a row: where each parameter's part of it is.

    Args:
        rule: the optimizer; others than noflush's have none.
        group: the parameter group.
        layout: where its parameters lie in the flat tensor of all shards.
        start, length: the shard's elements in that.
    """
    if not isinstance(rule, DelayAwareOptimizer) or (method := rule.method_of_group(group)).row.unit == "element":
        return {}
    found = zip(layout.params, layout.offsets, strict=True)
    params = [p for p, offset in found if not is_gap(p) and start <= offset < start + length]
    matrices = [piece_of(p).matrices() for p in params]
    laid = lay_out(method, [matrix for own in matrices for matrix in own], length, group)
    owned = laid.owned([len(own) for own in matrices])
    rows = {}
    for k, (name, alike) in enumerate(zip(method.row.state, laid.alike, strict=True)):
        if not alike:
            spans = [span([places[k] for places in own]) for own in owned]
            rows[name] = {p: slice(first, first + count) for p, (first, count) in zip(params, spans, strict=True)}
    return rows


def spans_of(weights: Any, names: Mapping[Any, str], replicas: int) -> Spans:
    """Where the parameters' state in a row lies, each in the shard of whichever of ``replicas`` has it.

    ``weights``: a stage's, with masters (`_MasterWeights`).
    """
    found: Spans = {}
    for group, (master, _, layout) in zip(weights.rule.param_groups, weights.master_shards(), strict=True):
        for replica in range(replicas):
            rows = rows_in_shard(weights.rule, group, layout, replica * master.numel(), master.numel())
            for name, of_params in rows.items():
                for p, where in of_params.items():
                    found.setdefault(names[p], {})[name] = where.start, where.stop
    return found


def was_laid_otherwise(weights: Any) -> bool:
    """Whether a file without `spans_of` has state of this shard elsewhere: that of square matrices lay as they do."""
    for group, (master, start, layout) in zip(weights.rule.param_groups, weights.master_shards(), strict=True):
        rows = rows_in_shard(weights.rule, group, layout, start, master.numel())
        shapes = {m.shape for row in rows.values() for p in row for m in piece_of(p).matrices()}
        if rows and all(height == width for height, width in shapes):
            return True
    return False
