"""From a command line to a run's settings: Megatron-LM's and Megatron-DeepSpeed's names made one, and checked across.

Reads no file but the DeepSpeed config; what the data and tokenizer files hold is checked by `files`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

from noflush.launch.arguments.deepspeed_config import complete, read_config
from noflush.launch.arguments.parser import ArgumentsError, Given, read
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


class _Reader:
    """The values of a command line, and the faults found in them."""

    def __init__(self, given: Given) -> None:
        self.values = given.values
        self.named = given.named
        self.faults = list(given.faults)
        self.notes: list[str] = []

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
        return 1

    def one_of(self, *names: str) -> Any:
        """The value of the options that mean the same, of which at most one may be given."""
        given = [name for name in names if name in self.named]
        if len(given) > 1:
            both = " and ".join(self.named[name] for name in given)
            self.faults.append(f"{both} mean the same: give one")
        return self.values[given[0] if given else names[0]]


def understand(argv: list[str], world: int) -> tuple[Settings, dict[str, list[str]]]:
    """The settings that ``argv`` stands for on ``world`` ranks, and the options without meaning, by kind.

    Raises ArgumentsError listing every fault.
    """
    given = read(argv)
    of = _Reader(given)
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
    if world % (tensor * pipeline):
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
    if layers % ranks.pipeline:
        of.faults.append(
            f"--num-layers {layers} on --pipeline-model-parallel-size {ranks.pipeline}: every stage gets the same "
            f"number of layers; use {layers - layers % ranks.pipeline or ranks.pipeline} layers, or another size"
        )
    if of.kv_channels is None and hidden % heads:
        of.faults.append(
            f"--hidden-size {hidden} with --num-attention-heads {heads}: it must be a multiple of the heads (or give "
            "--kv-channels)"
        )
    groups = _query_groups(of, heads)
    for name, count in (("--num-attention-heads", heads), ("--num-query-groups", groups)):
        if count % ranks.tensor:
            of.faults.append(
                f"{name} {count} on --tensor-model-parallel-size {ranks.tensor}: it must be a multiple of it"
            )
    gated = bool(of.swiglu)
    ffn = of.ffn_hidden_size or (int((4 * hidden * 2 / 3) / 64) * 64 if gated else 4 * hidden)
    if ffn % ranks.tensor or ffn < 1:
        of.faults.append(
            f"--ffn-hidden-size {ffn} on --tensor-model-parallel-size {ranks.tensor}: it must be a multiple of it"
        )
    positions = _positions(of)
    max_positions = of.needed("max_position_embeddings")
    if sequence > max_positions:
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
    for name in ("attention_dropout", "hidden_dropout"):
        if not 0 <= of.values[name] < 1:
            of.faults.append(f"{of.named[name]} is {of.values[name]}: it must be at least 0 and below 1")
    return Model(
        layers=layers,
        hidden=hidden,
        ffn_hidden=ffn,
        heads=heads,
        query_groups=groups,
        kv_channels=of.kv_channels or max(1, hidden // heads),
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
        # Megatron-DeepSpeed's --no-... is the only other spelling, and says the same as not asking for it.
        query_key_layer_scaling=of.named.get("apply_query_key_layer_scaling") == "--apply-query-key-layer-scaling",
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
    if "num_key_value_heads" in of.named:  # Megatron-DeepSpeed's name
        groups = of.num_key_value_heads
    elif of.group_query_attention:
        groups = of.num_query_groups
    else:
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
        of.values["global_batch_size"] = config.get("train_batch_size") or (gas if isinstance(gas, int) else 1) * unit
    size = of.needed("global_batch_size")
    if size % unit:
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
            if start % unit or increment % unit or increment < 1 or start > size or (size - start) % increment:
                of.faults.append(
                    f"--rampup-batch-size {start} {increment} {samples}: start and increment must be multiples of "
                    f"{unit} (micro-batch size x replicas) and lead to the global batch size {size}"
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
    if not lengths:
        of.faults.append("neither --train-iters nor --train-samples nor --train-tokens: say how long to train")
    elif of.train_iters and of.train_samples:
        of.faults.append(f"--train-iters {of.train_iters} and --train-samples {of.train_samples}: give one")
    iterations = of.train_iters or samples // size
    if lengths and iterations < 1 and not batch.rampup:
        of.faults.append(f"{samples} samples are less than one global batch of {size}: train for longer")
    iterations = max(1, iterations)
    if not by_samples:
        samples = iterations * size
    optimizer = _optimizer(of, size, samples, model.sequence)
    recompute, recompute_layers = _recompute(of)
    signals: tuple[int, ...] = ()
    if of.exit_signal_handler:
        try:
            signals = exit_signals(of.exit_signal)
        except ValueError as error:
            of.faults.append(str(error))
    for name in ("log_interval", "eval_iters", "save_interval", "exit_interval", "eval_interval"):
        value = of.values[name]
        if value is not None and value < (0 if name == "eval_iters" else 1):
            of.faults.append(f"{of.named.get(name, name)} is {value}: it must be positive")
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
    if of.recompute_granularity == "full" or old:
        return of.recompute_method or "uniform", layers
    if of.recompute_method:
        of.faults.append(f"--recompute-method {of.recompute_method} without --recompute-granularity full: add it")
    if of.recompute_granularity == "selective" or of.recompute_activations:
        of.notes.append(
            "selective recomputation: attention here never keeps its score matrix, so there is nothing to recompute"
        )
    return None, 1


def _optimizer(of: _Reader, size: int, samples: int, sequence: int) -> Optimizer:
    def in_samples(iterations: int | None, given: int | None, tokens: int | None) -> int | None:
        if iterations:
            return iterations * size
        return given or (tokens // sequence if tokens else None)

    if of.lr is None:
        of.faults.append("--lr is missing: every Megatron GPT run needs it")
    lr = of.lr if of.lr is not None else 1.0
    min_lr = of.min_lr or 0.0
    if not 0 <= min_lr <= lr or not math.isfinite(lr):
        of.faults.append(f"--min-lr {min_lr} with --lr {lr}: it must be between 0 and that")
    if of.lr_warmup_init > lr:
        of.faults.append(f"--lr-warmup-init {of.lr_warmup_init} is more than --lr {lr}")
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
    if warmup >= decay:
        of.faults.append(
            f"{warmup} samples of warm-up for a decay over {decay}: it must be less; shorten the warm-up or set "
            "--lr-decay-iters"
        )
    wsd = in_samples(of.lr_wsd_decay_iters, of.lr_wsd_decay_samples, None)
    if of.lr_decay_style == "WSD" and wsd is None:
        of.faults.append("--lr-decay-style WSD needs --lr-wsd-decay-iters or --lr-wsd-decay-samples")
    decays = of.start_weight_decay, of.end_weight_decay
    if of.weight_decay_incr_style == "constant" and decays == (None, None):
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
    if not (blend or by_split or of.mock_data):
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
    if of.pretrained_checkpoint and not load:
        load, finetune = of.pretrained_checkpoint, True
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
