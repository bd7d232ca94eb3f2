"""Attention by torch's own kernel, in the place of megatron-core's, whose masks and random states need CUDA.

It keeps no score matrix: on a GPU torch takes FlashAttention or its memory-efficient kernel.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.transformer import MegatronModule, TransformerConfig
from torch import Tensor
from torch.nn.attention import SDPBackend


def takes_groups(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float) -> bool:
    """Whether a kernel that keeps no score matrix takes fewer heads of ``key`` and ``value`` than of ``query``.

    On a GPU FlashAttention does, but not the memory-efficient kernel, which is torch's for float32 and where a ``mask``
    is given. Tensors are [b, heads, s, d].
    """
    chosen = torch._fused_sdp_choice(query, key, value, mask, dropout, mask is None, enable_gqa=True)
    return chosen != SDPBackend.MATH.value


def repeat_groups(groups: Tensor, heads: int) -> Tensor:
    """``groups`` [b, groups, s, d] copied to [b, heads, s, d], each for as many query heads as share it.

    With multi-head attention's memory: heads / groups times that of ``groups``, until the backward. The gradient of a
    group is the sum over its copies.
    """
    batch, count, sequence, width = groups.shape
    copies = groups.unsqueeze(2).expand(batch, count, heads // count, sequence, width)
    return copies.reshape(batch, heads, sequence, width)


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
        mask = None if attention_mask is None else ~attention_mask
        grouped = q.shape[1] != k.shape[1]
        if grouped and not takes_groups(q, k, v, mask, dropout):
            # torch would fall back to its plain arithmetic, score matrix and all.
            k, v = repeat_groups(k, q.shape[1]), repeat_groups(v, q.shape[1])
            grouped = False
        options: dict[str, Any] = {"scale": self._scale, "enable_gqa": grouped, "dropout_p": dropout}
        if mask is None:
            options["is_causal"] = True
        else:
            options["attn_mask"] = mask
        if dropout:
            with tensor_parallel.get_cuda_rng_tracker().fork():
                mixed = F.scaled_dot_product_attention(q, k, v, **options)
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, **options)
        sequence, batch = query.shape[:2]
        return mixed.permute(2, 0, 1, 3).reshape(sequence, batch, -1)
