"""Attention by torch's own kernel, in the place of megatron-core's, whose masks and random states need CUDA.

It keeps no score matrix: on a GPU torch takes FlashAttention or its memory-efficient kernel.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.transformer import MegatronModule, TransformerConfig
from torch import Tensor


class CausalAttention(MegatronModule):  # type: ignore[misc]
    """softmax(q k' / sqrt(d)) v, a token seeing itself and those before it.

    Takes the arguments that megatron-core gives a ``core_attention``. Scaling by the layer's number changes nothing
    here, since the scores are float32 within the kernel.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: Any = None,
    ) -> None:
        super().__init__(config=config)
        self._scale = softmax_scale
        self._dropout = config.attention_dropout if attention_dropout is None else attention_dropout

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """Attention of ``query`` [s, b, heads, d] over ``key`` and ``value`` [s, b, groups, d]: [s, b, heads * d].

        ``attention_mask``: bool [b, 1, s, s], true where a token may not look; None for causal.
        """
        assert attention_bias is None, "no bias is ever given"
        assert packed_seq_params is None, "sequences are never packed"
        q, k, v = (t.permute(1, 2, 0, 3) for t in (query, key, value))
        dropout = self._dropout if self.training else 0.0
        options: dict[str, Any] = {"scale": self._scale, "enable_gqa": q.shape[1] != k.shape[1], "dropout_p": dropout}
        if attention_mask is None:
            options["is_causal"] = True
        else:
            options["attn_mask"] = ~attention_mask
        if dropout:
            with tensor_parallel.get_cuda_rng_tracker().fork():
                mixed = F.scaled_dot_product_attention(q, k, v, **options)
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, **options)
        sequence, batch = query.shape[:2]
        return mixed.permute(2, 0, 1, 3).reshape(sequence, batch, -1)
