"""A `PipelineModule` that is cut into stages where its maker says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from deepspeed.pipe import PipelineModule

_METHOD = "parts:"


class CutPipelineModule(PipelineModule):  # type: ignore[misc]
    """As DeepSpeed's, whose ``partition_method`` weighs layers and cannot say where to cut.

    Args:
        parts: stage s has the entries of the layer list from ``parts[s]`` up to ``parts[s + 1]``; the first is 0, the
            last the list's length.
        kwargs: DeepSpeed's own, but ``partition_method``.
    """

    def __init__(self, *, parts: Sequence[int], **kwargs: Any) -> None:
        # DeepSpeed cuts within its constructor, before anything of this class could be set.
        super().__init__(partition_method=_METHOD + ",".join(map(str, parts)), **kwargs)

    def _partition_layers(self, method: str = "uniform") -> None:
        parts = [int(part) for part in method.removeprefix(_METHOD).split(",")]
        assert parts[0] == 0, parts
        assert parts[-1] == len(self._layer_specs), (parts, len(self._layer_specs))
        assert len(parts) == self.num_stages + 1, (parts, self.num_stages)
        assert parts == sorted(set(parts)), parts
        self.parts = parts
        self._set_bounds(start=parts[self.stage_id], stop=parts[self.stage_id + 1])
