"""How a module's weights are divided into tensor-parallel slices, which only its maker knows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class SliceRule(Protocol):
    """By a parameter's name, which ends as in the module that has it."""

    def merge(self, name: str, slices: Sequence[Tensor]) -> Tensor:
        """The whole of all ``slices``, in order; of a parameter that every slice has whole, any."""

    def split(self, name: str, weight: Tensor, count: int) -> list[Tensor]:
        """Its reverse: ``count`` slices."""


def rule_of(module: Any) -> SliceRule | None:
    """The rule that ``module``'s maker gave it (`CutPipelineModule`)."""
    rule: SliceRule | None = getattr(module, "slice_rule", None)
    return rule


def shape_among(rule: SliceRule, name: str, shape: Sequence[int], slices: int, others: int) -> torch.Size:
    """The shape that a slice of parameter ``name`` has among ``others``, where it has ``shape`` among ``slices``."""
    whole = rule.merge(name, [torch.empty(tuple(shape), device="meta")] * slices)
    return rule.split(name, whole, others)[0].shape


def resliced(rule: SliceRule, name: str, slices: Sequence[Tensor], rank: int, count: int) -> Tensor:
    """Slice ``rank`` of ``count`` of a parameter, or of what has its shape, from all ``slices`` that it had."""
    # Cloned: a view would keep the whole.
    return rule.split(name, rule.merge(name, slices), count)[rank].clone()
