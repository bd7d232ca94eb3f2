"""megatron-core's configuration of a GPT, and which of its implementations the layers are built from."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.fusions.fused_bias_geglu import quick_gelu
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.utils import init_method_normal

from noflush.launch.arguments.settings import Model
from noflush.launch.gpt.attention import CausalAttention


def _openai_gelu(x: torch.Tensor) -> torch.Tensor:
    return F.gelu(x, approximate="tanh")


def _squared_relu(x: torch.Tensor) -> torch.Tensor:
    return F.relu(x).square()


_ACTIVATIONS = {
    "gelu": F.gelu,
    "openai_gelu": _openai_gelu,
    "relu": F.relu,
    "squared_relu": _squared_relu,
    "quick_gelu": quick_gelu,
    "silu": F.silu,
}


def transformer_config(model: Model, tensor_parallel: int) -> TransformerConfig:
    """What megatron-core's layers are built by.

    Weights are float32 and drawn on the CPU, so that they do not depend on how the model is split; DeepSpeed casts
    them. The pipeline is DeepSpeed's too: each layer is told that it stands alone.
    """
    options: dict[str, Any] = {}
    if model.xavier_init:
        options["init_method"] = torch.nn.init.xavier_uniform_
    if model.embedding_init_std is not None:
        options["embedding_init_method"] = init_method_normal(model.embedding_init_std)
    return TransformerConfig(
        num_layers=model.layers,
        hidden_size=model.hidden,
        ffn_hidden_size=model.ffn_hidden,
        num_attention_heads=model.heads,
        num_query_groups=model.query_groups,
        kv_channels=model.kv_channels,
        normalization=model.normalization,
        layernorm_epsilon=model.norm_epsilon,
        activation_func=_ACTIVATIONS[model.activation],
        gated_linear_unit=model.gated,
        add_bias_linear=model.bias,
        add_qkv_bias=model.qkv_bias,
        qk_layernorm=model.qk_norm,
        apply_residual_connection_post_layernorm=model.post_norm_residual,
        attention_softmax_in_fp32=model.softmax_in_fp32,
        attention_dropout=model.attention_dropout,
        hidden_dropout=model.hidden_dropout,
        init_method_std=model.init_std,
        rotary_interleaved=model.rope_interleaved,
        tensor_model_parallel_size=tensor_parallel,
        pipeline_model_parallel_size=1,
        use_cpu_initialization=True,
        # Each needs an extension of apex's or Transformer Engine's.
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        **options,
    )


def layer_spec(model: Model) -> ModuleSpec:
    """What a transformer layer is made of: Transformer Engine's modules, or torch's and megatron-core's own."""
    if model.transformer_impl == "transformer_engine":
        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=model.qk_norm)
    spec = get_gpt_layer_local_spec(qk_layernorm=model.qk_norm, normalization=model.normalization)
    parts = spec.submodules
    # Where anything called apex can be imported, megatron-core's own choice is a norm that needs its extension.
    parts.input_layernorm = parts.pre_mlp_layernorm = WrappedTorchNorm
    attention = parts.self_attention.submodules
    attention.core_attention = CausalAttention
    if model.qk_norm:
        attention.q_layernorm = attention.k_layernorm = WrappedTorchNorm
    return spec
