"""Modules and parameters that several stages hold and that no `TiedLayerSpec` ties: copies that drift apart.

On one device a module listed twice is one module. Over a pipeline every stage has a copy, and nobody adds their
gradients up; DeepSpeed says nothing.
"""

from __future__ import annotations

from typing import Any

from torch import nn


def shared_untied(model: Any) -> list[str]:
    """A line for every parameter that stands in layers of several stages of the ``PipelineModule`` without a tie."""
    holders: dict[int, list[int]] = {}
    names: dict[int, str] = {}
    for index, layer in enumerate(model._layer_specs):
        if isinstance(layer, nn.Module):  # what a LayerSpec will build is nobody else's
            for name, parameter in layer.named_parameters():
                holders.setdefault(id(parameter), []).append(index)
                names.setdefault(id(parameter), f"{type(layer).__name__}.{name}")
    lines = []
    for shared, layers in holders.items():
        stages = sorted({stage_of(model.parts, layer) for layer in layers})
        if len(stages) > 1:
            lines.append(
                f"{names[shared]} is shared by layers {' and '.join(map(str, layers))}, which lie on stages "
                f"{' and '.join(map(str, stages))}: each stage trains a copy of its own; share it by TiedLayerSpec"
            )
    return lines


def stage_of(parts: list[int], layer: int) -> int:
    """The stage whose layers [parts[s], parts[s + 1]) hold ``layer``."""
    return next(s for s in range(len(parts) - 1) if parts[s] <= layer < parts[s + 1])
