"""Which matrices Megatron-DeepSpeed's fused weights are, for a rule that sees whole matrices.

The layout of ``query_key_value`` is another in other commits, at the same shape, so the attention's own code is asked:

- at commit 4efb479d its forward cuts the rows of a rank's slice into thirds (``each_hidden_size``): query over key over
  value;
- commits before that cut each group of query heads (``split_tensor``): its queries, its key, its value.

Of an attention that does neither the weight stays one matrix. ``dense_h_to_4h`` of a SwiGLU is gate over up
(`torch.chunk` by two). Embeddings and output layer are found as in any model (`methods.matrices`).
"""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from noflush.methods.matrices import set_cut

logger = logging.getLogger("noflush")


def mark_matrices(model: nn.Module, args: Any) -> None:
    """Marks the fused weights of ``model``; ``args`` are Megatron's."""
    for name, p in model.named_parameters():
        module, _, leaf = name.removesuffix(".weight").rpartition(".")
        if name.endswith("query_key_value.weight"):
            if cut := _groups_of(model.get_submodule(module), p.shape[0]):
                set_cut(p, *cut)
            else:
                logger.warning("noflush: the layout of %s is not known here: it is one matrix", name)
        elif leaf == "dense_h_to_4h" and p.dim() == 2 and getattr(args, "swiglu", False):
            set_cut(p, 1, (p.shape[0] // 2, p.shape[0] // 2))


def _groups_of(attention: Any, rows: int) -> tuple[int, tuple[int, ...]] | None:
    """Groups of the fused weight and the rows of each; None if its code says neither."""
    code = getattr(type(attention).forward, "__code__", None)
    if code is None:
        return None
    if "split_tensor" in code.co_names:
        head: int = attention.hidden_size_per_attention_head
        queries = attention.num_key_value_groups * head
        return rows // (queries + 2 * head), (queries, head, head)
    return (1, (rows // 3,) * 3) if "each_hidden_size" in code.co_varnames else None
