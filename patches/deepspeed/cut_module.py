"""A `PipelineModule` that is cut into stages where its maker says, and loads weights of other slices than its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from deepspeed.pipe import PipelineModule

from noflush.patches.deepspeed.slice_rule import SliceRule, resliced

_METHOD = "parts:"


class CutPipelineModule(PipelineModule):  # type: ignore[misc]
    """As DeepSpeed's, whose ``partition_method`` weighs layers and cannot say where to cut.

    Args:
        parts: stage s has the entries of the layer list from ``parts[s]`` up to ``parts[s + 1]``; the first is 0, the
            last the list's length.
        slice_rule: how its weights are divided into slices; None: a checkpoint must have as many as the run.
        kwargs: DeepSpeed's own, but ``partition_method``.
    """

    def __init__(self, *, parts: Sequence[int], slice_rule: SliceRule | None = None, **kwargs: Any) -> None:
        # DeepSpeed cuts within its constructor, before anything of this class could be set.
        super().__init__(partition_method=_METHOD + ",".join(map(str, parts)), **kwargs)
        self.slice_rule = slice_rule

    def _partition_layers(self, method: str = "uniform") -> None:
        parts = [int(part) for part in method.removeprefix(_METHOD).split(",")]
        assert parts[0] == 0, parts
        assert parts[-1] == len(self._layer_specs), (parts, len(self._layer_specs))
        assert len(parts) == self.num_stages + 1, (parts, self.num_stages)
        assert parts == sorted(set(parts)), parts
        self.parts = parts
        self._set_bounds(start=parts[self.stage_id], stop=parts[self.stage_id + 1])

    def load_state_dir(self, load_dir: Any, checkpoint_engine: Any, strict: bool = True) -> None:
        """As DeepSpeed's, also from another number of slices, by ``slice_rule``."""
        grid = self._grid
        rank, count = grid.get_slice_parallel_rank(), grid.get_slice_parallel_world_size()
        layers = [(at, layer) for at, layer in enumerate(self.forward_funcs) if hasattr(layer, "load_state_dict")]
        files = {at: self.ckpt_layer_path_list(load_dir, at) for at, _ in layers}
        if self.slice_rule is None or all(len(found) == count for found in files.values()):
            super().load_state_dir(load_dir, checkpoint_engine, strict=strict)
            return
        for at, layer in layers:
            slices = [checkpoint_engine.load(path, map_location="cpu") for path in files[at]]
            layer.load_state_dict(
                {
                    name: resliced(self.slice_rule, name, [of[name] for of in slices], rank, count)
                    if isinstance(value, torch.Tensor)
                    else value
                    for name, value in slices[0].items()
                },
                strict=strict,
            )
        self._synchronize_tied_weights()
