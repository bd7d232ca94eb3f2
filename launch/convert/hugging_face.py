"""Weights and configuration between megatron-core's names and transformers' GPT-2 and Llama layouts.

Pure mappings: no file, no host, no transformers. What neither layout can express is a ValueError.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from noflush.launch.arguments.settings import Model

Layout = Literal["gpt2", "llama"]
State = dict[str, Tensor]

_ACTIVATIONS: dict[Layout, dict[str, str]] = {
    "gpt2": {"gelu": "gelu", "openai_gelu": "gelu_new", "relu": "relu", "squared_relu": "relu2"},
    "llama": {"silu": "silu", "quick_gelu": "quick_gelu"},
}
_SYNONYMS = {"gelu_pytorch_tanh": "gelu_new", "gelu_fast": "gelu_new", "swish": "silu"}
# megatron-core's constants of --use-rope-scaling
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_NORMS = {"input_layernorm": ("ln_1", "input_layernorm"), "pre_mlp_layernorm": ("ln_2", "post_attention_layernorm")}
_BUFFERS = re.compile(r".*(\.attn\.(masked_)?bias|rotary_emb\.inv_freq)$")
_QKV, _PROJ = "self_attention.linear_qkv", "self_attention.linear_proj"
_FC1, _FC2 = "mlp.linear_fc1", "mlp.linear_fc2"
_WORDS, _POSITIONS, _NORM = "embedding.word_embeddings", "embedding.position_embeddings", "decoder.final_layernorm"


def layout_of(model: Model) -> Layout:
    """The layout that expresses ``model``. Raises ValueError naming what fits neither."""
    if model.normalization == "LayerNorm" and model.positions == "learned_absolute":
        layout: Layout = "gpt2"
        wrong = {
            f"{model.query_groups} key-value heads for {model.heads} heads": model.query_groups != model.heads,
            f"{model.heads} heads of {model.kv_channels} channels for a width of {model.hidden}": (
                model.heads * model.kv_channels != model.hidden
            ),
            "a gated MLP": model.gated,
        }
    elif model.normalization == "RMSNorm" and model.positions == "rope":
        layout = "llama"
        wrong = {
            "an MLP that is not gated": not model.gated,
            f"rotary positions on {model.rope_percent:g} of a head": model.rope_percent != 1.0,
            "interleaved rotary positions": model.rope_interleaved,
            "both a position interpolation and --use-rope-scaling": (
                model.rope_interpolation is not None and model.rope_scaling is not None
            ),
        }
    else:
        raise ValueError(
            f"{model.normalization} with {model.positions} positions fits neither of transformers' layouts: GPT-2 is "
            "LayerNorm with learned_absolute positions, Llama RMSNorm with rope"
        )
    wrong[f"the activation {model.activation}"] = not model.gated and model.activation not in _ACTIVATIONS["gpt2"]
    if layout == "llama" and model.gated:
        wrong[f"the activation {model.activation}"] = model.activation not in _ACTIVATIONS["llama"]
    wrong["a norm of queries and keys"] = model.qk_norm
    wrong["a residual connection behind the norm"] = model.post_norm_residual
    if found := [what for what, is_wrong in wrong.items() if is_wrong]:
        name = "GPT-2" if layout == "gpt2" else "Llama"
        raise ValueError(f"transformers' {name} layout has no place for {', '.join(found)}")
    return layout


# ---- out -------------------------------------------------------------------------------------------------


def to_hugging_face(state: Mapping[str, Tensor], model: Model, eod: int | None = None) -> tuple[dict[str, Any], State]:
    """(config.json, weights) of ``state`` in megatron-core's names.

    ``eod``: id of the token that ends a text. Biases that the layout has and the model has not are zeros. The
    vocabulary is cut to the token ids: transformers would give its padding a probability. Raises ValueError where the
    layouts do not fit.
    """
    vocabularies = f"{_WORDS}.weight", "output_layer.weight"
    for name in vocabularies:
        if name in state and len(state[name]) != model.vocabulary:
            raise ValueError(f"{name} has {len(state[name])} rows, and the model a vocabulary of {model.vocabulary}")
    state = {name: weight[: model.token_ids] if name in vocabularies else weight for name, weight in state.items()}
    layout = layout_of(model)
    config = _gpt2_config(model) if layout == "gpt2" else _llama_config(model)
    try:
        weights = _to_gpt2(state, model) if layout == "gpt2" else _to_llama(state, model)
        if not model.tied:
            weights["lm_head.weight"] = state["output_layer.weight"]
    except KeyError as error:
        raise ValueError(f"the weight {error} is missing: the checkpoint is not of the model that it says") from None
    dtype = str(state[f"{_WORDS}.weight"].dtype).removeprefix("torch.")
    config |= {
        "initializer_range": model.init_std,
        "tie_word_embeddings": model.tied,
        "vocab_size": model.token_ids,
        "torch_dtype": dtype,
        "bos_token_id": eod,
        "eos_token_id": eod,
    }
    # Each with memory of its own, as safetensors wants it.
    return config, {name: weight.clone(memory_format=torch.contiguous_format) for name, weight in weights.items()}


def _gpt2_config(model: Model) -> dict[str, Any]:
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "n_layer": model.layers,
        "n_embd": model.hidden,
        "n_inner": model.ffn_hidden,
        "n_head": model.heads,
        "n_positions": model.max_positions,
        "activation_function": _ACTIVATIONS["gpt2"][model.activation],
        "layer_norm_epsilon": model.norm_epsilon,
        "attn_pdrop": model.attention_dropout,
        "embd_pdrop": model.hidden_dropout,
        "resid_pdrop": model.hidden_dropout,
    }


def _llama_config(model: Model) -> dict[str, Any]:
    scaling: dict[str, Any] | None = None
    if model.rope_interpolation is not None:
        scaling = {"rope_type": "linear", "factor": float(model.rope_interpolation)}
    elif model.rope_scaling is not None:
        scaling = {"rope_type": "llama3", "factor": float(model.rope_scaling), **_LLAMA3}
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": model.layers,
        "hidden_size": model.hidden,
        "intermediate_size": model.ffn_hidden,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.query_groups,
        "head_dim": model.kv_channels,
        "max_position_embeddings": model.max_positions,
        "hidden_act": _ACTIVATIONS["llama"][model.activation],
        "rms_norm_eps": model.norm_epsilon,
        "attention_bias": model.bias or model.qkv_bias,
        "mlp_bias": model.bias,
        "attention_dropout": model.attention_dropout,
        # The names of transformers 4, which its version 5 reads too.
        "rope_theta": float(model.rope_base),
        "rope_scaling": scaling,
    }


def _heads(weight: Tensor, model: Model) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of queries, keys and values: megatron-core keeps them by group, each its query heads, then k, then v."""
    shared = model.heads // model.query_groups
    grouped = weight.reshape(model.query_groups, shared + 2, model.kv_channels, *weight.shape[1:])
    q, k, v = grouped[:, :shared], grouped[:, shared], grouped[:, shared + 1]
    return q.flatten(0, 2), k.flatten(0, 1), v.flatten(0, 1)


def _grouped(parts: Sequence[Tensor], model: Model) -> Tensor:
    """`_heads`, back, of (queries, keys, values)."""
    parts = [rows.reshape(model.query_groups, -1, model.kv_channels, *rows.shape[1:]) for rows in parts]
    return torch.cat(parts, 1).flatten(0, 2)


def _to_gpt2(state: Mapping[str, Tensor], model: Model) -> State:
    out = {
        "transformer.wte.weight": state[f"{_WORDS}.weight"],
        "transformer.wpe.weight": state[f"{_POSITIONS}.weight"],
        "transformer.ln_f.weight": state[f"{_NORM}.weight"],
        "transformer.ln_f.bias": state[f"{_NORM}.bias"],
    }
    for layer in range(model.layers):
        ours, theirs = f"decoder.layers.{layer}.", f"transformer.h.{layer}."
        for norm, (name, _) in _NORMS.items():
            for kind in ("weight", "bias"):
                out[f"{theirs}{name}.{kind}"] = state[f"{ours}{norm}.{kind}"]
        for linear, name in ((_QKV, "attn.c_attn"), (_PROJ, "attn.c_proj"), (_FC1, "mlp.c_fc"), (_FC2, "mlp.c_proj")):
            weight = state[f"{ours}{linear}.weight"]
            bias = state.get(f"{ours}{linear}.bias", weight.new_zeros(len(weight)))
            if linear == _QKV:
                weight, bias = torch.cat(_heads(weight, model)), torch.cat(_heads(bias, model))
            out[f"{theirs}{name}.weight"] = weight.T  # GPT-2's Conv1D keeps its weights as [in, out]
            out[f"{theirs}{name}.bias"] = bias
    return out


def _to_llama(state: Mapping[str, Tensor], model: Model) -> State:
    out = {"model.embed_tokens.weight": state[f"{_WORDS}.weight"], "model.norm.weight": state[f"{_NORM}.weight"]}
    for layer in range(model.layers):
        ours, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        for norm, (_, name) in _NORMS.items():
            out[f"{theirs}{name}.weight"] = state[f"{ours}{norm}.weight"]
        for kind in ("weight", "bias"):
            if (qkv := state.get(f"{ours}{_QKV}.{kind}")) is not None:
                for name, rows in zip("qkv", _heads(qkv, model), strict=True):
                    out[f"{theirs}self_attn.{name}_proj.{kind}"] = rows
            if (fc1 := state.get(f"{ours}{_FC1}.{kind}")) is not None:
                out[f"{theirs}mlp.gate_proj.{kind}"], out[f"{theirs}mlp.up_proj.{kind}"] = fc1.chunk(2)
            for linear, name in ((_PROJ, "self_attn.o_proj"), (_FC2, "mlp.down_proj")):
                if (value := state.get(f"{ours}{linear}.{kind}")) is not None:
                    out[f"{theirs}{name}.{kind}"] = value
        if model.qkv_bias and not model.bias:
            # Llama's attention_bias is of the output projection too.
            out[f"{theirs}self_attn.o_proj.bias"] = state[f"{_NORM}.weight"].new_zeros(model.hidden)
    return out


# ---- in --------------------------------------------------------------------------------------------------


def from_hugging_face(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> tuple[State, Model]:
    """(weights in megatron-core's names, model) of a config.json and its weights.

    Raises ValueError naming what the launcher's models cannot express, and weights that are missing or left over.
    """
    kind = config.get("model_type")
    left = _Weights({name: weight for name, weight in weights.items() if not _BUFFERS.fullmatch(name)})
    if kind not in ("gpt2", "llama"):
        raise ValueError(f"model_type {kind}: only gpt2 and llama can be read")
    try:
        model = _gpt2_model(config) if kind == "gpt2" else _llama_model(config)
    except KeyError as error:
        raise ValueError(
            f"the config has no {error}: save the model with from_pretrained and save_pretrained"
        ) from None
    state = _from_gpt2(left, model) if kind == "gpt2" else _from_llama(left, model)
    head = left.pop("lm_head.weight", None)
    if not model.tied:
        if head is None:
            raise ValueError("lm_head.weight is missing, and the config's tie_word_embeddings is false")
        state["output_layer.weight"] = head
    if left:
        raise ValueError(f"weights with no place in a {kind} model: {', '.join(sorted(left)[:4])}")
    rows = len(state[f"{_WORDS}.weight"])
    if rows != model.vocabulary:
        raise ValueError(f"the config's vocab_size is {model.vocabulary}, the word embedding has {rows} rows")
    return state, model


class _Weights(dict[str, Tensor]):
    """Weights that are taken out one by one."""

    def take(self, name: str) -> Tensor:
        if name not in self:
            raise ValueError(f"the weight {name} is missing")
        return self.pop(name)


def _model(config: Mapping[str, Any], layout: Layout, **fields: Any) -> Model:
    """A model of the fields that both layouts share, and ``fields``."""
    name = config.get("activation_function", "gelu_new") if layout == "gpt2" else config.get("hidden_act", "silu")
    name = _SYNONYMS.get(name, name)
    activations = {theirs: ours for ours, theirs in _ACTIVATIONS[layout].items()}
    if name not in activations:
        raise ValueError(f"activation {name}: of a {layout} model only {', '.join(activations)} can be read")
    rope = {"rope_base": 10000, "rope_interpolation": None, "rope_scaling": None}
    return Model(
        **{
            **rope,
            "activation": activations[name],
            "qkv_bias": False,
            "qk_norm": False,
            "post_norm_residual": False,
            "softmax_in_fp32": False,
            "loss_in_low_precision": False,
            "init_std": config.get("initializer_range", 0.02),
            "embedding_init_std": None,
            "xavier_init": False,
            "rope_percent": 1.0,
            "rope_interleaved": False,
            "pad_vocabulary_to": 1,
            "vocabulary": config["vocab_size"],
            "tied": config.get("tie_word_embeddings", layout == "gpt2"),
            **fields,
        }
    )


def _refuse(config: Mapping[str, Any], **expected: Any) -> None:
    for name, value in expected.items():
        if config.get(name, value) not in (value, None):
            raise ValueError(f"the config's {name} is {config[name]}: only {value} can be expressed")


def _gpt2_model(config: Mapping[str, Any]) -> Model:
    _refuse(config, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    hidden, heads = config["n_embd"], config["n_head"]
    return _model(
        config,
        "gpt2",
        layers=config["n_layer"],
        hidden=hidden,
        ffn_hidden=config.get("n_inner") or 4 * hidden,
        heads=heads,
        query_groups=heads,
        kv_channels=hidden // heads,
        sequence=config["n_positions"],
        max_positions=config["n_positions"],
        positions="learned_absolute",
        normalization="LayerNorm",
        norm_epsilon=config.get("layer_norm_epsilon", 1e-5),
        gated=False,
        bias=True,
        attention_dropout=config.get("attn_pdrop", 0.1),
        hidden_dropout=config.get("resid_pdrop", 0.1),
    )


def _llama_model(config: Mapping[str, Any]) -> Model:
    _refuse(config, partial_rotary_factor=1.0)
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    attention_bias, bias = bool(config.get("attention_bias")), bool(config.get("mlp_bias"))
    if bias and not attention_bias:
        raise ValueError("mlp_bias without attention_bias: a model has biases in both or in its QKV projections alone")
    return _model(
        config,
        "llama",
        layers=config["num_hidden_layers"],
        hidden=hidden,
        ffn_hidden=config["intermediate_size"],
        heads=heads,
        query_groups=config.get("num_key_value_heads") or heads,
        kv_channels=config.get("head_dim") or hidden // heads,
        sequence=config["max_position_embeddings"],
        max_positions=config["max_position_embeddings"],
        positions="rope",
        normalization="RMSNorm",
        norm_epsilon=config.get("rms_norm_eps", 1e-6),
        gated=True,
        bias=bias,
        qkv_bias=attention_bias and not bias,
        attention_dropout=config.get("attention_dropout", 0.0),
        hidden_dropout=0.0,
        **_rope(config),
    )


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary fields, of transformers 4's config (rope_theta, rope_scaling) or 5's (rope_parameters)."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = rope.get("rope_theta", config.get("rope_theta", 10000))
    kind, factor = rope.get("rope_type", rope.get("type", "default")), float(rope.get("factor", 1.0))
    _refuse(rope, partial_rotary_factor=1.0)
    found: dict[str, Any] = {"rope_base": int(theta)}
    if kind == "linear" and factor.is_integer():
        found["rope_interpolation"] = int(factor)
    elif kind == "llama3" and all(math.isclose(rope.get(name, value), value) for name, value in _LLAMA3.items()):
        found["rope_scaling"] = factor
    elif kind != "default":
        raise ValueError(f"rotary positions {dict(rope)}: of rope types only default, linear and llama3 as Llama 3.0's")
    if theta != int(theta):
        raise ValueError(f"rope_theta is {theta}: only whole numbers can be expressed")
    return found


def _from_gpt2(weights: _Weights, model: Model) -> State:
    # The first files on the hub have the names without the prefix.
    prefix = "transformer." if "transformer.wte.weight" in weights else ""
    state = {
        f"{_WORDS}.weight": weights.take(f"{prefix}wte.weight"),
        f"{_POSITIONS}.weight": weights.take(f"{prefix}wpe.weight"),
        f"{_NORM}.weight": weights.take(f"{prefix}ln_f.weight"),
        f"{_NORM}.bias": weights.take(f"{prefix}ln_f.bias"),
    }
    for layer in range(model.layers):
        ours, theirs = f"decoder.layers.{layer}.", f"{prefix}h.{layer}."
        for norm, (name, _) in _NORMS.items():
            for kind in ("weight", "bias"):
                state[f"{ours}{norm}.{kind}"] = weights.take(f"{theirs}{name}.{kind}")
        for linear, name in ((_QKV, "attn.c_attn"), (_PROJ, "attn.c_proj"), (_FC1, "mlp.c_fc"), (_FC2, "mlp.c_proj")):
            weight, bias = weights.take(f"{theirs}{name}.weight").T, weights.take(f"{theirs}{name}.bias")
            if linear == _QKV:
                weight, bias = _grouped(weight.chunk(3), model), _grouped(bias.chunk(3), model)
            state[f"{ours}{linear}.weight"], state[f"{ours}{linear}.bias"] = weight.contiguous(), bias
    return state


def _from_llama(weights: _Weights, model: Model) -> State:
    state = {
        f"{_WORDS}.weight": weights.take("model.embed_tokens.weight"),
        f"{_NORM}.weight": weights.take("model.norm.weight"),
    }
    for layer in range(model.layers):
        ours, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        for norm, (_, name) in _NORMS.items():
            state[f"{ours}{norm}.weight"] = weights.take(f"{theirs}{name}.weight")
        for kind in ("weight", "bias"):
            whole = kind == "weight" or model.bias
            if whole or model.qkv_bias:
                qkv = [weights.take(f"{theirs}self_attn.{name}_proj.{kind}") for name in "qkv"]
                state[f"{ours}{_QKV}.{kind}"] = _grouped(qkv, model)
            if whole:
                state[f"{ours}{_PROJ}.{kind}"] = weights.take(f"{theirs}self_attn.o_proj.{kind}")
                gate, up = (weights.take(f"{theirs}mlp.{name}_proj.{kind}") for name in ("gate", "up"))
                state[f"{ours}{_FC1}.{kind}"] = torch.cat([gate, up])
                state[f"{ours}{_FC2}.{kind}"] = weights.take(f"{theirs}mlp.down_proj.{kind}")
        if model.qkv_bias and weights.take(f"{theirs}self_attn.o_proj.bias").any():
            raise ValueError(f"{theirs}self_attn.o_proj.bias is not zero: with biases in attention alone it must be")
    return state
