"""A model as the options of pretrain_gpt.py that describe it. Pure."""

from __future__ import annotations

from noflush.launch.arguments.settings import Model


def arguments_of(model: Model) -> list[str]:
    """Options, each with its value in one string, so that ``@FILE`` of them trains ``model``."""
    lines = [
        f"--num-layers {model.layers}",
        f"--hidden-size {model.hidden}",
        f"--ffn-hidden-size {model.ffn_hidden}",
        f"--num-attention-heads {model.heads}",
        f"--kv-channels {model.kv_channels}",
        f"--seq-length {model.sequence}",
        f"--max-position-embeddings {model.max_positions}",
        f"--position-embedding-type {model.positions}",
        f"--normalization {model.normalization}",
        f"--norm-epsilon {model.norm_epsilon!r}",
        f"--attention-dropout {model.attention_dropout}",
        f"--hidden-dropout {model.hidden_dropout}",
        f"--init-method-std {model.init_std}",
        f"--padded-vocab-size {model.vocabulary}",
    ]
    if model.query_groups != model.heads:
        lines += ["--group-query-attention", f"--num-query-groups {model.query_groups}"]
    if model.positions == "rope":
        lines += [f"--rotary-base {model.rope_base}", f"--rotary-percent {model.rope_percent}"]
        if model.rope_interpolation is not None:
            lines.append(f"--rotary-seq-len-interpolation-factor {model.rope_interpolation}")
        if model.rope_scaling is not None:
            lines += ["--use-rope-scaling", f"--rope-scaling-factor {model.rope_scaling}"]
    options = {
        "--swiglu": model.gated and model.activation == "silu",
        "--quick-geglu": model.gated and model.activation == "quick_gelu",
        "--openai-gelu": model.activation == "openai_gelu",
        "--relu": model.activation == "relu",
        "--squared-relu": model.activation == "squared_relu",
        "--disable-bias-linear": not model.bias,
        "--add-qkv-bias": model.qkv_bias,
        "--untie-embeddings-and-output-weights": not model.tied,
    }
    return lines + [option for option, given in options.items() if given]
