"""From a command line to a run's settings: Megatron-LM's and Megatron-DeepSpeed's names made one, and checked across.

Reads no file but the DeepSpeed config; what the data and tokenizer files hold is checked by `files`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

from noflush.checkpoint import newest_complete
from noflush.launch.arguments.deepspeed_config import complete, read_config
from noflush.launch.arguments.parser import ArgumentsError, Given, defaults, read
from noflush.launch.arguments.settings import (
    Batch,
    Checkpoints,
    Data,
    Logs,
    Model,
    Optimizer,
    Ranks,
    Settings,
    Steps,
    Tokens,
)
from noflush.launch.signals import exit_signals

# What numbers must be, by attribute; those that are needed are checked where they are read.
_RANGES: tuple[tuple[str, str, Callable[[float], bool]], ...] = (
    (
        "ffn_hidden_size kv_channels num_query_groups num_key_value_heads make_vocab_size_divisible_by vocab_size "
        "padded_vocab_size rotary_base rope_theta rotary_seq_len_interpolation_factor recompute_num_layers "
        "checkpoint_num_layers train_iters train_samples train_tokens exit_interval exit_duration_in_mins "
        "log_interval save_interval eval_interval tensorboard_log_interval tensorboard_queue_size world_size "
        "distributed_timeout_minutes initial_loss_scale loss_scale_window hysteresis",
        "1 or more",
        lambda value: value >= 1,
    ),
    (
        "vocab_extra_ids lr_decay_iters lr_decay_samples lr_decay_tokens lr_warmup_iters lr_warmup_samples "
        "lr_warmup_tokens lr_warmup_init lr_wsd_decay_iters lr_wsd_decay_samples min_lr weight_decay "
        "start_weight_decay end_weight_decay clip_grad loss_scale min_loss_scale init_method_std "
        "embedding_init_method_std num_workers eval_iters ckpt_step zero_stage",
        "0 or more",
        lambda value: value >= 0,
    ),
    ("lr layernorm_epsilon adam_eps rope_scaling_factor", "more than 0", lambda value: value > 0),
    (
        "attention_dropout hidden_dropout adam_beta1 adam_beta2 sgd_momentum lr_warmup_fraction",
        "at least 0 and below 1",
        lambda value: 0 <= value < 1,
    ),
    ("rotary_percent", "more than 0 and at most 1", lambda value: 0 < value <= 1),
    ("seed", "between 0 and 2^32 - 1", lambda value: 0 <= value < 2**32),
)


class _Reader:
    """The values of a command line, and the faults found in them."""

    def __init__(self, given: Given) -> None:
        self.values = given.values
        self.named = given.named
        self.faults = list(given.faults)
        self.notes: list[str] = []
        self._unknown: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        return self.values[name]

    def needed(self, name: str) -> int:
        """A whole number of one or more that must be given; 1 where it is not, with a fault."""
        value = self.values[name]
        option = "--" + name.replace("_", "-")
        if value is None:
            self.faults.append(f"{option} is missing: every Megatron GPT run needs it")
        elif value < 1:
            self.faults.append(f"{option} is {value}: it must be 1 or more")
        else:
            return int(value)
        self._unknown.add(name)
        return 1

    def known(self, *names: str) -> bool:
        """Whether no fault was found in any of the values: else what follows from them is no second fault."""
        return not self._unknown & {*names}

    def one_of(self, *names: str) -> Any:
        """The value of the options that mean the same, of which at most one may be given."""
        given = [name for name in names if name in self.named]
        if len(given) > 1:
            both = " and ".join(self.named[name] for name in given)
            self.faults.append(f"{both} mean the same: give one")
        return self.values[given[0] if given else names[0]]

    def check_ranges(self) -> None:
        """Faults of numbers out of range; the default stands in for them, so that each is one fault."""
        for name, rule, holds in ((name, rule, holds) for names, rule, holds in _RANGES for name in names.split()):
            value = self.values[name]
            if name in self.named and value is not None and not (math.isfinite(value) and holds(value)):
                self.faults.append(f"{self.named[name]} is {value}: it must be {rule}")
                self._unknown.add(name)
                self.values[name] = defaults()[name]
                del self.named[name]

    def at_most_one(self, *names: str) -> None:
        """A fault where several were given of which one says it all."""
        given = [name for name in names if name in self.named and self.values[name]]
        if len(given) > 1:
            shown = " and ".join(f"{self.named[name]} {self.values[name]}" for name in given)
            self.faults.append(f"{shown}: they say the same in different units; give one")

    def note_without(self, condition: bool, missing: str, *names: str) -> None:
        """A note of the options that were given and take effect only with ``missing``, which ``condition`` is."""
        given = [self.named[name] for name in names if name in self.named]
        if given and not condition:
            self.notes.append(f"{' '.join(given)}: without effect, for there is no {missing}")


def understand(argv: list[str], world: int) -> tuple[Settings, dict[str, list[str]]]:
    """The settings that ``argv`` stands for on ``world`` ranks, and the options without meaning, by kind.

    Raises ArgumentsError listing every fault.
    """
    given = read(argv)
    of = _Reader(given)
    of.check_ranges()
    config = read_config(of.deepspeed_config, of.faults)
    ranks = _ranks(of, world)
    model = _model(of, ranks)
    batch = _batch(of, config, ranks)
    steps, optimizer = _steps(of, batch, model)
    precision: Literal["fp32", "bf16", "fp16"] = "fp16" if of.fp16 else "bf16" if of.bf16 else "fp32"
    if of.fp16 and of.bf16:
        of.faults.append("--fp16 and --bf16: give one")
    if not of.named.keys() & {"fp16", "bf16"}:
        precision = _precision_of(config)
    of.note_without(precision != "fp32", "--fp16 or --bf16", "fp16_lm_cross_entropy")
    deepspeed = complete(of, config, ranks, batch, optimizer, precision, model.tied)
    settings = Settings(
        model=model,
        ranks=ranks,
        batch=batch,
        steps=steps,
        optimizer=optimizer,
        data=_data(of),
        tokens=_tokens(of),
        checkpoints=_checkpoints(of),
        logs=_logs(of),
        precision=precision,
        deepspeed=deepspeed,
        dry_run=of.dry_run,
        notes=tuple(of.notes),
    )
    if of.faults:
        raise ArgumentsError(of.faults)
    return settings, given.without_meaning


def _precision_of(config: Mapping[str, Any]) -> Any:
    for name in ("fp16", "bf16"):
        section = config.get(name, {})
        if isinstance(section, Mapping) and section.get("enabled") is True:
            return name
    return "fp32"


def _ranks(of: _Reader, world: int) -> Ranks:
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
    return Ranks(world, tensor, pipeline, of.distributed_backend, of.distributed_timeout_minutes)


def _model(of: _Reader, ranks: Ranks) -> Model:
    of.values["num_layers"] = of.one_of("num_layers", "encoder_num_layers")
    of.values["seq_length"] = of.one_of("seq_length", "encoder_seq_length")
    layers, hidden, heads = of.needed("num_layers"), of.needed("hidden_size"), of.needed("num_attention_heads")
    sequence = of.needed("seq_length")
    if layers % ranks.pipeline and of.known("num_layers"):
        of.faults.append(
            f"--num-layers {layers} on --pipeline-model-parallel-size {ranks.pipeline}: every stage gets the same "
            f"number of layers; use {layers - layers % ranks.pipeline or ranks.pipeline} layers, or another size"
        )
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
    activations = [n for n in ("swiglu", "openai_gelu", "squared_relu", "quick_geglu") if of.values[n]]
    if len(activations) > 1:
        of.faults.append(f"{' and '.join(of.named[n] for n in activations)}: give one")
    names = {"swiglu": "silu", "quick_geglu": "quick_gelu"}
    activation = names.get(activations[0], activations[0]) if activations else "gelu"
    if of.mlp_type != "standard":
        of.faults.append(f"--mlp-type {of.mlp_type}: mixture of experts is not supported; use standard")
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
    if (of.padded_vocab_size or 0) % ranks.tensor:
        of.faults.append(
            f"--padded-vocab-size {of.padded_vocab_size} on --tensor-model-parallel-size {ranks.tensor}: it must be a "
            "multiple of it"
        )
    return Model(
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
        norm_epsilon=of.layernorm_epsilon,
        activation=activation,
        gated=gated or bool(of.quick_geglu),
        bias=of.add_bias_linear,
        qkv_bias=of.add_qkv_bias,
        qk_norm=of.qk_layernorm,
        post_norm_residual=of.apply_residual_connection_post_layernorm,
        softmax_in_fp32=of.attention_softmax_in_fp32,
        loss_in_low_precision=of.fp16_lm_cross_entropy,
        attention_dropout=of.attention_dropout,
        hidden_dropout=of.hidden_dropout,
        init_std=of.init_method_std,
        embedding_init_std=of.embedding_init_method_std,
        xavier_init=of.init_method_xavier_uniform,
        rope_base=of.one_of("rotary_base", "rope_theta"),
        rope_percent=of.rotary_percent,
        rope_interleaved=of.rotary_interleaved,
        rope_interpolation=of.rotary_seq_len_interpolation_factor,
        rope_scaling=of.rope_scaling_factor if of.use_rope_scaling else None,
        pad_vocabulary_to=of.make_vocab_size_divisible_by * ranks.tensor,
        vocabulary=of.padded_vocab_size or 0,
    )


def _query_groups(of: _Reader, heads: int) -> int:
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


def _positions(of: _Reader) -> Any:
    if of.use_rotary_position_embeddings:  # both parsers' older name
        if "position_embedding_type" in of.named and of.position_embedding_type != "rope":
            of.faults.append(
                f"--use-rotary-position-embeddings, --position-embedding-type {of.position_embedding_type}: give one"
            )
        return "rope"
    kind = of.position_embedding_type
    if kind not in ("learned_absolute", "rope", "none"):
        of.faults.append(f"--position-embedding-type {kind}: use learned_absolute, rope or none")
    if not of.add_position_embedding and kind == "learned_absolute":
        return "none"
    return kind


def _batch(of: _Reader, config: Mapping[str, Any], ranks: Ranks) -> Batch:
    in_config = config.get("train_micro_batch_size_per_gpu")
    if of.micro_batch_size is None and isinstance(in_config, int):
        of.values["micro_batch_size"] = in_config
    micro = of.needed("micro_batch_size")
    unit = micro * max(1, ranks.data)
    if of.global_batch_size is None:
        gas = config.get("gradient_accumulation_steps")
        there = config.get("train_batch_size")
        of.values["global_batch_size"] = (
            there if isinstance(there, int) else (gas if isinstance(gas, int) else 1) * unit
        )
    size = of.needed("global_batch_size")
    known = of.known("micro_batch_size", "global_batch_size")
    if size % unit and known:
        of.faults.append(
            f"--global-batch-size {size} is no multiple of --micro-batch-size {micro} x {ranks.data} data-parallel "
            f"replicas = {unit}: use {max(unit, size // unit * unit)} or {(size // unit + 1) * unit}"
        )
    rampup = None
    if of.rampup_batch_size:
        if len(of.rampup_batch_size) != 3:
            of.faults.append(f"--rampup-batch-size {of.rampup_batch_size}: give start size, increment and samples")
        else:
            start, increment, samples = rampup = tuple(of.rampup_batch_size)
            if known and (
                min(start, increment, samples) < 1
                or start % unit
                or increment % unit
                or start > size
                or (size - start) % increment
            ):
                of.faults.append(
                    f"--rampup-batch-size {start} {increment} {samples}: start and increment must be multiples of "
                    f"{unit} (micro-batch size x replicas) and lead to the global batch size {size}, over 1 sample or "
                    "more"
                )
    return Batch(micro, size, rampup)


def _steps(of: _Reader, batch: Batch, model: Model) -> tuple[Steps, Optimizer]:
    size = batch.global_size
    lengths = [n for n in ("train_iters", "train_samples", "train_tokens") if of.values[n]]
    samples = of.train_samples or (of.train_tokens or 0) // model.sequence
    # Megatron-DeepSpeed's scripts give a number of samples that is never reached beside the tokens that count.
    by_samples = bool(samples) and not of.train_iters
    if of.train_tokens and of.train_samples:
        samples = min(of.train_samples, of.train_tokens // model.sequence)
    known = of.known("train_iters", "train_samples", "train_tokens", "seq_length", "global_batch_size")
    if not lengths and known:
        of.faults.append("neither --train-iters nor --train-samples nor --train-tokens: say how long to train")
    elif of.train_iters and len(lengths) > 1:
        other = lengths[1]
        of.faults.append(f"--train-iters {of.train_iters} and {of.named[other]} {of.values[other]}: give one")
    iterations = of.train_iters or samples // size
    if lengths and known and iterations < 1 and not batch.rampup:
        of.faults.append(f"{samples} samples are less than one global batch of {size}: train for longer")
    iterations = max(1, iterations)
    if not by_samples:
        samples = iterations * size
    optimizer = _optimizer(of, size, samples, model.sequence, known)
    recompute, recompute_layers = _recompute(of)
    signals: tuple[int, ...] = ()
    if of.exit_signal_handler:
        try:
            signals = exit_signals(of.exit_signal)
        except ValueError as error:
            of.faults.append(str(error))
    of.note_without(of.exit_signal_handler, "--exit-signal-handler", "exit_signal")
    return (
        Steps(
            iterations=iterations,
            samples=samples,
            by_samples=by_samples,
            eval_every=of.eval_interval or 1000,
            eval_iterations=of.eval_iters,
            save_every=of.save_interval,
            log_every=of.log_interval,
            exit_every=of.exit_interval,
            exit_after_minutes=of.exit_duration_in_mins,
            exit_signals=signals,
            skip_train=of.skip_train,
            seed=of.seed,
            recompute=recompute,
            recompute_layers=recompute_layers,
        ),
        optimizer,
    )


def _recompute(of: _Reader) -> tuple[str | None, int]:
    old = of.checkpoint_activations or of.deepspeed_activation_checkpointing
    layers = of.recompute_num_layers if "recompute_num_layers" in of.named else of.checkpoint_num_layers
    layers = layers or 1
    full = of.recompute_granularity == "full" or old
    of.note_without(bool(full), "--recompute-granularity full", "recompute_num_layers", "checkpoint_num_layers")
    if full:
        return of.recompute_method or "uniform", layers
    if of.recompute_method:
        of.faults.append(f"--recompute-method {of.recompute_method} without --recompute-granularity full: add it")
    if of.recompute_granularity == "selective" or of.recompute_activations:
        of.notes.append(
            "selective recomputation: attention here never keeps its score matrix, so there is nothing to recompute"
        )
    return None, 1


def _optimizer(of: _Reader, size: int, samples: int, sequence: int, known: bool) -> Optimizer:
    """``known``: whether the run's own length is."""

    def in_samples(iterations: int | None, given: int | None, tokens: int | None) -> int | None:
        if iterations:
            return iterations * size
        return given or (tokens // sequence if tokens else None)

    if of.lr is None and of.known("lr"):
        of.faults.append("--lr is missing: every Megatron GPT run needs it")
    lr = of.lr if of.lr is not None else 1.0
    min_lr = of.min_lr or 0.0
    if min_lr > lr and of.known("lr"):
        of.faults.append(f"--min-lr {min_lr} with --lr {lr}: it must be between 0 and that")
    if of.lr_warmup_init > lr and of.known("lr"):
        of.faults.append(f"--lr-warmup-init {of.lr_warmup_init} is more than --lr {lr}")
    of.at_most_one("lr_decay_iters", "lr_decay_samples", "lr_decay_tokens")
    of.at_most_one("lr_wsd_decay_iters", "lr_wsd_decay_samples")
    decay = in_samples(of.lr_decay_iters, of.lr_decay_samples, of.lr_decay_tokens) or samples
    warmups = [
        n for n in ("lr_warmup_fraction", "lr_warmup_iters", "lr_warmup_samples", "lr_warmup_tokens") if of.values[n]
    ]
    if len(warmups) > 1:
        of.faults.append(f"{' and '.join(of.named[n] for n in warmups)}: give one length of warm-up")
    if of.lr_warmup_fraction is not None:
        warmup = int(of.lr_warmup_fraction * decay)
    else:
        warmup = in_samples(of.lr_warmup_iters, of.lr_warmup_samples, of.lr_warmup_tokens) or 0
    if warmup >= decay and known:
        of.faults.append(
            f"{warmup} samples of warm-up for a decay over {decay}: it must be less; shorten the warm-up or set "
            "--lr-decay-iters"
        )
    wsd = in_samples(of.lr_wsd_decay_iters, of.lr_wsd_decay_samples, None)
    if of.lr_decay_style == "WSD" and wsd is None:
        of.faults.append("--lr-decay-style WSD needs --lr-wsd-decay-iters or --lr-wsd-decay-samples")
    of.note_without(
        of.lr_decay_style == "WSD",
        "--lr-decay-style WSD",
        "lr_wsd_decay_style",
        "lr_wsd_decay_iters",
        "lr_wsd_decay_samples",
    )
    decays = of.start_weight_decay, of.end_weight_decay
    if of.weight_decay_incr_style == "constant":
        of.note_without(False, "--weight-decay-incr-style", "start_weight_decay", "end_weight_decay")
        decays = of.weight_decay, of.weight_decay
    elif None in decays or not 0 <= decays[0] <= decays[1]:
        of.faults.append(
            f"--start-weight-decay {decays[0]} and --end-weight-decay {decays[1]}: both are needed with a "
            "--weight-decay-incr-style, the second no less than the first"
        )
        decays = (0.0, 0.0)
    if of.optimizer not in ("adam", "sgd"):
        of.faults.append(f'--optimizer {of.optimizer}: use adam or sgd, or an "optimizer" section in ds_config.json')
    if of.override_opt_param_scheduler and of.use_checkpoint_opt_param_scheduler:
        of.faults.append("--override-opt_param-scheduler and --use-checkpoint-opt_param-scheduler: give one")
    return Optimizer(
        name=of.optimizer,
        lr=lr,
        min_lr=min_lr,
        lr_init=of.lr_warmup_init,
        decay_style=of.lr_decay_style,
        warmup_samples=warmup,
        decay_samples=decay,
        wsd_style=of.lr_wsd_decay_style,
        wsd_samples=wsd,
        weight_decay=decays,
        weight_decay_style=of.weight_decay_incr_style,
        betas=(of.adam_beta1, of.adam_beta2),
        eps=of.adam_eps,
        momentum=of.sgd_momentum,
        override_schedule=of.override_opt_param_scheduler,
        checkpoint_schedule=of.use_checkpoint_opt_param_scheduler,
    )


def _data(of: _Reader) -> Data:
    from noflush.launch.arguments.files import paths_from_files

    blend = of.data_path
    splits = of.train_data_path, of.valid_data_path, of.test_data_path
    blend, splits = paths_from_files(of.data_args_path, of.per_split_data_args_path, blend, splits, of.faults)
    by_split = any(splits)
    if sum((bool(blend), by_split, bool(of.mock_data))) > 1:
        of.faults.append("--data-path, --train-data-path ... and --mock-data: give one of the three")
    if not (blend or by_split or of.mock_data or of.data_args_path or of.per_split_data_args_path):
        of.faults.append(
            "no data: give --data-path PREFIX of a .bin/.idx pair (preprocess_data.py makes it), or --mock-data"
        )
    if by_split and not splits[0]:
        of.faults.append("--valid-data-path or --test-data-path without --train-data-path: add it")
    if of.dataloader_type == "external":
        of.faults.append("--dataloader-type external: use single or cyclic")
    if of.data_impl not in (None, "mmap", "infer"):
        of.faults.append(f"--data-impl {of.data_impl}: only mmap is read; preprocess the data with preprocess_data.py")
    return Data(
        blend=tuple(blend) if blend else None,
        splits=tuple(tuple(s) if s else None for s in splits) if by_split else None,
        split=None if by_split else of.split,
        cache=of.data_cache_path,
        mock=bool(of.mock_data),
        order=of.dataloader_type or "single",
        workers=of.num_workers,
        reset_positions=of.reset_position_ids,
        reset_mask=of.reset_attention_mask,
        mask_eod=of.eod_mask_loss,
        mmap=of.mmap_bin_files,
    )


def _tokens(of: _Reader) -> Tokens:
    kind = of.tokenizer_type
    if kind is None and of.vocab_file and of.merge_file:
        kind = "GPT2BPETokenizer"
    if kind == "HFTokenizer":  # Megatron-DeepSpeed's name
        kind = "HuggingFaceTokenizer"
    if kind is None and of.vocab_size:
        kind = "NullTokenizer"
    return Tokens(
        type=kind,
        model=of.tokenizer_model,
        vocab_file=of.vocab_file,
        merge_file=of.merge_file,
        vocab_size=of.vocab_size,
        extra_ids=of.vocab_extra_ids,
        trust_remote_code=of.trust_remote_code,
    )


def _checkpoints(of: _Reader) -> Checkpoints:
    tag = of.load_tag or (f"global_step{of.ckpt_step}" if of.ckpt_step is not None else None)
    load, finetune = of.load, of.finetune
    # As Megatron: where to begin, until there is a checkpoint of the run's own to go on from.
    if of.pretrained_checkpoint and not (load and newest_complete(load)):
        load, finetune, tag = of.pretrained_checkpoint, True, None
    of.note_without(bool(load), "--load", "load_tag", "ckpt_step")
    of.note_without(bool(of.save), "--save", "save_interval")
    return Checkpoints(
        save=of.save,
        load=load,
        tag=tag,
        finetune=finetune,
        load_optimizer=not (finetune or of.no_load_optim),
        load_rng=not (finetune or of.no_load_rng),
        save_rng=not of.no_save_rng,
        must_exist=of.exit_on_missing_checkpoint,
    )


def _logs(of: _Reader) -> Logs:
    project = of.wandb_project or None
    of.note_without(bool(project), "--wandb-project", "wandb_exp_name", "wandb_save_dir", "wandb_entity")
    if project and not of.wandb_exp_name:
        of.faults.append(f"--wandb-project {project} without --wandb-exp-name: name the experiment")
    return Logs(
        tensorboard_dir=of.tensorboard_dir,
        tensorboard_every=of.tensorboard_log_interval,
        tensorboard_queue=of.tensorboard_queue_size,
        timers=of.log_timers_to_tensorboard,
        memory=of.log_memory_to_tensorboard,
        world_size=of.log_world_size_to_tensorboard,
        learning_rate=of.log_learning_rate_to_tensorboard,
        loss_scale=of.log_loss_scale_to_tensorboard,
        validation_perplexity=of.log_validation_ppl_to_tensorboard,
        throughput=of.log_throughput,
        wandb_project=project,
        wandb_name=of.wandb_exp_name or None,
        wandb_dir=of.wandb_save_dir or None,
        wandb_entity=of.wandb_entity or None,
    )
