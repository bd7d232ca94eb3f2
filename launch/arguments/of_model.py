"""What the arguments say of the model and of the ranks it is spread over."""

from __future__ import annotations

from typing import Any

from noflush.launch.arguments.settings import Model, Ranks
from noflush.launch.arguments.values import Values


def read_ranks(of: Values, world: int) -> Ranks:
    tensor, pipeline = of.needed("tensor_model_parallel_size"), of.needed("pipeline_model_parallel_size")
    if of.dry_run:
        world = of.world_size or max(world, tensor * pipeline)
    elif of.world_size is not None:
        of.faults.append("--world-size goes with --dry-run alone: a run has the ranks it was started with")
    if world < 1 or world % (tensor * pipeline):
        of.faults.append(
            f"{world} ranks for --tensor-model-parallel-size {tensor} x --pipeline-model-parallel-size {pipeline}: the "
            "number of ranks must be a multiple of their product"
        )
    if of.no_pipeline_parallel and pipeline > 1:
        of.faults.append(f"--no-pipeline-parallel with --pipeline-model-parallel-size {pipeline}: take one out")
    return Ranks(**of.taken("ranks"), world=world, tensor=tensor, pipeline=pipeline)


def read_model(of: Values, ranks: Ranks) -> Model:
    of.values["num_layers"] = of.one_of("num_layers", "encoder_num_layers")
    of.values["seq_length"] = of.one_of("seq_length", "encoder_seq_length")
    layers, hidden, heads = of.needed("num_layers"), of.needed("hidden_size"), of.needed("num_attention_heads")
    sequence = of.needed("seq_length")
    sized = of.known("hidden_size", "num_attention_heads", "kv_channels")
    if of.kv_channels is None and hidden % heads and sized:
        of.faults.append(
            f"--hidden-size {hidden} with --num-attention-heads {heads}: it must be a multiple of the heads (or give "
            "--kv-channels)"
        )
    groups = _query_groups(of, heads)
    counts = {"--num-attention-heads": heads} | ({"--num-query-groups": groups} if groups != heads else {})
    for name, count in counts.items():
        if count % ranks.tensor and of.known("num_attention_heads"):
            of.faults.append(
                f"{name} {count} on --tensor-model-parallel-size {ranks.tensor}: it must be a multiple of it"
            )
    gated = bool(of.swiglu)
    ffn = of.ffn_hidden_size or (int((4 * hidden * 2 / 3) / 64) * 64 if gated else 4 * hidden)
    if not of.known("hidden_size", "ffn_hidden_size"):
        pass
    elif ffn < 1:
        of.faults.append(
            f"--swiglu with --hidden-size {hidden} makes the ffn hidden size 0 (8/3 of it, in whole 64s): give "
            "--ffn-hidden-size"
        )
    elif ffn % ranks.tensor:
        of.faults.append(
            f"--ffn-hidden-size {ffn} on --tensor-model-parallel-size {ranks.tensor}: it must be a multiple of it"
        )
    positions = _positions(of)
    max_positions = of.needed("max_position_embeddings")
    if sequence > max_positions and of.known("max_position_embeddings"):
        of.faults.append(
            f"--seq-length {sequence} is more than --max-position-embeddings {max_positions}: raise the second to it"
        )
    activations = [n for n in ("swiglu", "openai_gelu", "squared_relu", "quick_geglu", "relu") if of.values[n]]
    if len(activations) > 1:
        of.faults.append(f"{' and '.join(of.named[n] for n in activations)}: give one")
    names = {"swiglu": "silu", "quick_geglu": "quick_gelu"}
    activation = names.get(activations[0], activations[0]) if activations else "gelu"
    rotary = "rotary_base", "rope_theta", "rotary_percent", "rotary_interleaved", "rotary_seq_len_interpolation_factor"
    of.note_without(positions == "rope", "--position-embedding-type rope", *rotary, "use_rope_scaling")
    of.note_without(of.use_rope_scaling, "--use-rope-scaling", "rope_scaling_factor")
    kv_channels = of.kv_channels or max(1, hidden // heads)
    turned = int(kv_channels * of.rotary_percent)
    if positions == "rope" and sized and (turned < 2 or turned % 2):
        of.faults.append(
            f"--rotary-percent {of.rotary_percent} of {kv_channels} channels a head is {turned}: rotary positions need "
            "an even number of 2 or more; change --rotary-percent, or the hidden size by the heads (--kv-channels)"
        )
    of.note_without(of.pad_vocab_size, "padding of the vocabulary", "make_vocab_size_divisible_by")
    if (of.padded_vocab_size or 0) % ranks.tensor:
        of.faults.append(
            f"--padded-vocab-size {of.padded_vocab_size} on --tensor-model-parallel-size {ranks.tensor}: it must be a "
            "multiple of it"
        )
    if of.transformer_impl == "transformer_engine" and of.reset_attention_mask:
        of.faults.append(
            "--transformer-impl transformer_engine with --reset-attention-mask: its causal attention would overlook "
            "the mask; use --transformer-impl local"
        )
    return Model(
        **of.taken("model"),
        layers=layers,
        hidden=hidden,
        ffn_hidden=ffn,
        heads=heads,
        query_groups=groups,
        kv_channels=kv_channels,
        sequence=sequence,
        max_positions=max_positions,
        positions=positions,
        tied=not of.untie_embeddings_and_output_weights,
        normalization="RMSNorm" if of.normalization.lower() == "rmsnorm" else "LayerNorm",
        activation=activation,
        gated=gated or bool(of.quick_geglu),
        rope_base=of.one_of("rotary_base", "rope_theta"),
        rope_scaling=of.rope_scaling_factor if of.use_rope_scaling else None,
        pad_vocabulary_to=of.make_vocab_size_divisible_by * ranks.tensor if of.pad_vocab_size else 1,
        vocabulary=of.padded_vocab_size or 0,
    )


def _query_groups(of: Values, heads: int) -> int:
    given = [of.named[name] for name in ("num_key_value_heads", "num_query_groups") if name in of.named]
    if len(given) > 1:
        of.faults.append(f"{' and '.join(given)} mean the same: give one")
    of.note_without(of.group_query_attention, "--group-query-attention", "num_query_groups")
    if "num_key_value_heads" in of.named:  # Megatron-DeepSpeed's name
        groups = of.num_key_value_heads
    elif of.group_query_attention:
        groups = of.num_query_groups
    else:
        return heads
    if not of.known("num_attention_heads", "num_key_value_heads", "num_query_groups"):
        return heads
    if groups is None or groups < 1 or heads % groups:
        of.faults.append(
            f"{groups} key-value heads for --num-attention-heads {heads}: the heads must be a multiple of them"
        )
        return heads
    return int(groups)


def _positions(of: Values) -> Any:
    if of.use_rotary_position_embeddings:  # both parsers' older name
        if "position_embedding_type" in of.named and of.position_embedding_type != "rope":
            of.faults.append(
                f"--use-rotary-position-embeddings, --position-embedding-type {of.position_embedding_type}: give one"
            )
        return "rope"
    kind = of.position_embedding_type
    if not of.add_position_embedding and kind == "learned_absolute":
        return "none"
    return kind
