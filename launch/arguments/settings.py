"""What a run is, after the arguments were understood: plain frozen data, in Megatron's names and units."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from noflush.config import AsyncPipelineConfig

Normalization = Literal["LayerNorm", "RMSNorm"]
Positions = Literal["learned_absolute", "rope", "none"]
Implementation = Literal["local", "transformer_engine"]


@dataclass(frozen=True)
class Model:
    """A GPT.

    Attributes:
        positions: kind of position embedding; ``max_positions`` counts learned ones.
        activation: ``gelu``, ``openai_gelu``, ``relu``, ``squared_relu``, ``quick_gelu`` or ``silu``; ``gated``: a GLU
            of it.
        query_groups: key-value heads; as many as heads without grouped-query attention.
        tied: whether the output layer shares the word embedding's weights.
        vocabulary: rows of the embedding and of the output layer; 0 until the tokenizer is known.
        rope_base, rope_percent, rope_interleaved, rope_interpolation, rope_scaling: rotary positions as Megatron's
            ``--rotary-*`` and ``--rope-scaling-factor`` (None: no scaling).
        vocabulary_padding: so many of the vocabulary's last rows are no token's and have no probability.
        transformer_impl: whose modules the layers are made of, and so what their weights are called.
    """

    layers: int
    hidden: int
    ffn_hidden: int
    heads: int
    query_groups: int
    kv_channels: int
    sequence: int
    max_positions: int
    positions: Positions
    tied: bool
    normalization: Normalization
    norm_epsilon: float
    activation: str
    gated: bool
    bias: bool
    qkv_bias: bool
    qk_norm: bool
    post_norm_residual: bool
    softmax_in_fp32: bool
    loss_in_low_precision: bool
    attention_dropout: float
    hidden_dropout: float
    init_std: float
    embedding_init_std: float | None
    xavier_init: bool
    rope_base: int
    rope_percent: float
    rope_interleaved: bool
    rope_interpolation: int | None
    rope_scaling: float | None
    pad_vocabulary_to: int
    vocabulary: int
    vocabulary_padding: int = 0
    transformer_impl: Implementation = "local"

    @property
    def token_ids(self) -> int:
        """Token ids there are; they are the vocabulary's first rows."""
        return self.vocabulary - self.vocabulary_padding


@dataclass(frozen=True)
class Ranks:
    """How many ranks share the work: tensor x pipeline x data = world."""

    world: int
    tensor: int
    pipeline: int
    backend: str | None
    timeout_minutes: int

    @property
    def data(self) -> int:
        """Data-parallel replicas."""
        return self.world // (self.tensor * self.pipeline)


@dataclass(frozen=True)
class Batch:
    """Batch sizes in samples: ``global_size`` = ``micro`` x replicas x K.

    Attributes:
        rampup: (start, increment, samples over which it grows), or None.
        schedule: (consumed samples, global batch size from there on), the first from 0, the last ``global_size``;
            empty where nothing says so.
    """

    micro: int
    global_size: int
    rampup: tuple[int, int, int] | None
    schedule: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Steps:
    """How long to train, and what happens on the way; all in iterations but where named otherwise.

    Attributes:
        iterations, samples: at the run's end, those done before it was resumed among them; one was given, the other
            follows from it (`progress`).
        by_samples: whether samples (or tokens) were given.
        in_iterations: options that gave a length in iterations, with their values.
        eval_from: first iteration after which validation is run, if ``eval_every`` names it too; None for 0. The one at
            the end is run in any case.
        eval_micro, eval_size: samples of its micro-batches and of its global batches, of which it takes
            ``eval_iterations``.
        recompute: ``None``, ``uniform`` or ``block``; ``recompute_layers`` a chunk, or so many of each stage.
    """

    iterations: int
    samples: int
    by_samples: bool
    in_iterations: tuple[str, ...]
    eval_every: int
    eval_iterations: int
    eval_from: int | None
    eval_micro: int
    eval_size: int
    save_every: int | None
    log_every: int
    exit_every: int | None
    exit_after_minutes: float | None
    exit_signals: tuple[int, ...]
    skip_train: bool
    seed: int
    recompute: str | None
    recompute_layers: int


@dataclass(frozen=True)
class Optimizer:
    """Megatron's optimizer and the course of its rates; lengths in samples, as Megatron's scheduler counts.

    Attributes:
        name: ``adam``, ``sgd``, ``muon``, ``dist_muon`` or ``soap``.
        rates_of_arguments, rates_of_checkpoint: whose course of learning rate and weight decay counts where the two
            differ; with neither, that is a fault.
        decay_all: whether biases and norms decay too.
        muon_momentum, nesterov, scale_mode, scale_factor, ns_steps: Muon's.
        split_qkv: whether query, key and value are matrices each, for a rule of matrices.
    """

    name: str
    lr: float
    min_lr: float
    lr_init: float
    decay_style: str
    warmup_samples: int
    decay_samples: int
    wsd_style: str
    wsd_samples: int | None
    weight_decay: tuple[float, float]
    weight_decay_style: str
    decay_all: bool
    betas: tuple[float, float]
    eps: float
    momentum: float
    muon_momentum: float
    nesterov: bool
    scale_mode: str
    scale_factor: float
    ns_steps: int
    split_qkv: bool
    rates_of_arguments: bool
    rates_of_checkpoint: bool


@dataclass(frozen=True)
class Data:
    """Where samples come from.

    Attributes:
        blend: prefixes, with weights before them if blended, that ``split`` divides; or None.
        splits: prefixes for training, validation and test, in place of ``blend``; or None.
        mock: made-up data.
    """

    blend: tuple[str, ...] | None
    splits: tuple[tuple[str, ...] | None, ...] | None
    split: str | None
    cache: str | None
    mock: bool
    order: str
    workers: int
    reset_positions: bool
    reset_mask: bool
    mask_eod: bool
    mmap: bool


@dataclass(frozen=True)
class Tokens:
    """The tokenizer: Megatron's type name and its files."""

    type: str | None
    model: str | None
    vocab_file: str | None
    merge_file: str | None
    vocab_size: int | None
    extra_ids: int
    trust_remote_code: bool


@dataclass(frozen=True)
class Checkpoints:
    """Where checkpoints go and come from.

    Attributes:
        tag: name of the one to load; None for the newest complete one.
        finetune: take the weights alone and start at iteration 0.
        trusted: load files that may run code.
    """

    save: str | None
    load: str | None
    tag: str | None
    finetune: bool
    load_optimizer: bool
    load_rng: bool
    save_rng: bool
    must_exist: bool
    trusted: bool


@dataclass(frozen=True)
class Logs:
    """What is written where besides the log lines."""

    tensorboard_dir: str | None
    tensorboard_every: int
    tensorboard_queue: int
    timers: bool
    memory: bool
    world_size: bool
    learning_rate: bool
    loss_scale: bool
    validation_perplexity: bool
    throughput: bool
    wandb_project: str | None
    wandb_name: str | None
    wandb_dir: str | None
    wandb_entity: str | None


@dataclass(frozen=True)
class Settings:
    """A run.

    Attributes:
        layers_by_stage: transformer layers of every stage, in order. The embedding is the first one's, the final norm
            and the output layer are the last one's.
        deepspeed: the config that ``deepspeed.initialize`` gets.
        block: its ``async_pipeline`` block; None where DeepSpeed's own pipeline runs.
        notes: what to say at the start.
    """

    model: Model
    ranks: Ranks
    layers_by_stage: tuple[int, ...]
    batch: Batch
    steps: Steps
    optimizer: Optimizer
    data: Data
    tokens: Tokens
    checkpoints: Checkpoints
    logs: Logs
    precision: Literal["fp32", "bf16", "fp16"]
    deepspeed: dict[str, Any]
    block: AsyncPipelineConfig | None
    dry_run: bool
    notes: tuple[str, ...]

    @property
    def gas(self) -> int:
        """K, micro-batches an update, at the full batch size."""
        return self.batch.global_size // (self.batch.micro * self.ranks.data)
