"""Which matrices megatron-core's weights are, for a rule that sees whole matrices.

A layer's fused weights are several, one below the other in the rows of this rank's slice:

- ``linear_qkv``: for each group of query heads its queries, its key, its value, as megatron-core's attention splits
  them (transformer/attention.py, `get_query_key_value_tensors`, in 0.16.1 as in 0.19.2): (heads / groups) d + d + d
  rows, with d ``kv_channels``. Its own Muon cuts there too, unless told ``--muon-no-split-qkv``.
- ``linear_fc1`` of a gated MLP: gate over up (transformer/mlp.py, `torch.chunk` by two). Its own Muon does not cut.

A tensor-parallel rank has whole groups, and its part of gate over its part of up.
"""

from __future__ import annotations

from torch import nn

from noflush.launch.arguments.settings import Model
from noflush.methods.matrices import set_cut, set_matrix

_NONE = ("word_embeddings.weight", "position_embeddings.weight", "output_layer.weight")


def mark_matrices(module: nn.Module, model: Model, tensor_parallel: int = 1, split_qkv: bool = True) -> None:
    """Marks the parameters of ``module``, which holds layers of ``model`` or one rank's slice of them.

    ``split_qkv``: whether query, key and value are matrices each, or one together.
    """
    for name, p in module.named_parameters():
        if name.endswith(_NONE):
            set_matrix(p, False)
        elif name.endswith("self_attention.linear_qkv.weight") and split_qkv:
            queries = model.heads // model.query_groups * model.kv_channels
            set_cut(p, model.query_groups // tensor_parallel, (queries, model.kv_channels, model.kv_channels))
        elif name.endswith("mlp.linear_fc1.weight") and model.gated:
            set_cut(p, 1, (p.shape[0] // 2, p.shape[0] // 2))
