"""Tiny models for the tests of launch/, and weights for them in megatron-core's names."""

from __future__ import annotations

import dataclasses

import torch

from noflush.launch.arguments.settings import Model

GPT2 = Model(
    layers=2, hidden=32, ffn_hidden=80, heads=4, query_groups=4, kv_channels=8, sequence=16, max_positions=24,
    positions="learned_absolute", tied=False, normalization="LayerNorm", norm_epsilon=1e-5, activation="openai_gelu",
    gated=False, bias=True, qkv_bias=False, qk_norm=False, post_norm_residual=False,
    softmax_in_fp32=False, loss_in_low_precision=False, attention_dropout=0.0, hidden_dropout=0.0, init_std=0.02,
    embedding_init_std=None, xavier_init=False, rope_base=10000, rope_percent=1.0, rope_interleaved=False,
    rope_interpolation=None, rope_scaling=None, pad_vocabulary_to=1, vocabulary=96,
)  # fmt: skip
LLAMA = dataclasses.replace(
    GPT2, query_groups=2, kv_channels=16, positions="rope", normalization="RMSNorm", activation="silu", gated=True,
    bias=False, norm_epsilon=1e-6, rope_base=500000,
)  # fmt: skip
MODELS = {
    "gpt2": GPT2,
    "gpt2 tied, exact gelu": dataclasses.replace(GPT2, tied=True, activation="gelu", norm_epsilon=1e-3),
    "gpt2 relu": dataclasses.replace(GPT2, activation="relu"),
    "gpt2 relu squared": dataclasses.replace(GPT2, activation="squared_relu"),
    "llama": LLAMA,
    "llama tied, qkv bias": dataclasses.replace(LLAMA, tied=True, qkv_bias=True, norm_epsilon=1e-2),
    "llama biases, quick gelu": dataclasses.replace(LLAMA, bias=True, activation="quick_gelu", query_groups=1),
    "llama interpolated": dataclasses.replace(LLAMA, rope_interpolation=4),
    "llama 3": dataclasses.replace(LLAMA, rope_scaling=8.0, max_positions=16384, kv_channels=32, rope_base=10000),
}


def shapes(model: Model) -> dict[str, tuple[int, ...]]:
    """Shapes of all weights, by megatron-core's names."""
    h, f, v = model.hidden, model.ffn_hidden, model.vocabulary
    projection = model.heads * model.kv_channels
    qkv, fc1 = projection + 2 * model.query_groups * model.kv_channels, f * (1 + model.gated)
    found: dict[str, tuple[int, ...]] = {"embedding.word_embeddings.weight": (v, h)}
    if model.positions == "learned_absolute":
        found["embedding.position_embeddings.weight"] = (model.max_positions, h)
    norm = ("weight", "bias") if model.normalization == "LayerNorm" else ("weight",)
    for layer in range(model.layers):
        start = f"decoder.layers.{layer}."
        found |= {f"{start}{name}.{kind}": (h,) for name in ("input_layernorm", "pre_mlp_layernorm") for kind in norm}
        found |= {
            f"{start}self_attention.linear_qkv.weight": (qkv, h),
            f"{start}self_attention.linear_proj.weight": (h, projection),
            f"{start}mlp.linear_fc1.weight": (fc1, h),
            f"{start}mlp.linear_fc2.weight": (h, f),
        }
        if model.bias or model.qkv_bias:
            found[f"{start}self_attention.linear_qkv.bias"] = (qkv,)
        if model.bias:
            found[f"{start}self_attention.linear_proj.bias"] = (h,)
            found[f"{start}mlp.linear_fc1.bias"] = (fc1,)
            found[f"{start}mlp.linear_fc2.bias"] = (h,)
    found |= {f"decoder.final_layernorm.{kind}": (h,) for kind in norm}
    if not model.tied:
        found["output_layer.weight"] = (v, h)
    return found


def weights(model: Model, seed: int = 1) -> dict[str, torch.Tensor]:
    """Random weights, large enough for every one to move the logits; float32."""
    draw = torch.Generator().manual_seed(seed)
    state = {}
    for name, shape in shapes(model).items():
        state[name] = torch.randn(shape, generator=draw) * (0.2 if len(shape) > 1 else 0.3)
        if "norm" in name and name.endswith("weight"):
            state[name] += 1
    return state
