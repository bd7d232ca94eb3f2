"""What the arguments say of batches, lengths, the optimizer and its learning rate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from noflush.launch.arguments.progress import Course, Position
from noflush.launch.arguments.rampup import batch_size_at, read_schedule
from noflush.launch.arguments.settings import Batch, Model, Optimizer, Ranks, Steps
from noflush.launch.arguments.values import Values
from noflush.launch.signals import exit_signals


def read_batch(of: Values, config: Mapping[str, Any], ranks: Ranks) -> Batch:
    in_config = config.get("train_micro_batch_size_per_gpu")
    if of.micro_batch_size is None and isinstance(in_config, int):
        of.values["micro_batch_size"] = in_config
    micro = of.needed("micro_batch_size")
    unit = micro * max(1, ranks.data)
    schedule = _read_schedule(of, unit)
    if schedule:
        of.values["global_batch_size"] = schedule[-1][1]
    if of.global_batch_size is None:
        gas = config.get("gradient_accumulation_steps")
        there = config.get("train_batch_size")
        of.values["global_batch_size"] = (
            there if isinstance(there, int) else (gas if isinstance(gas, int) else 1) * unit
        )
    size = of.needed("global_batch_size")
    known = of.known("micro_batch_size", "global_batch_size")
    if size % unit and known and not schedule:
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
            if (
                min(start, increment, samples) < 1
                or start % unit
                or increment % unit
                or start > size
                or (size - start) % increment
            ):
                rampup = None  # there is no end to what leads nowhere
                if known:
                    of.faults.append(
                        f"--rampup-batch-size {start} {increment} {samples}: start and increment must be multiples of "
                        f"{unit} (micro-batch size x replicas) and lead to the global batch size {size}, over 1 sample "
                        "or more"
                    )
    return Batch(micro, size, rampup, schedule)


def _read_schedule(of: Values, unit: int) -> tuple[tuple[int, int], ...]:
    """``--step-batch-size-schedule``; sizes that ``unit`` samples do not make up are a fault."""
    text = of.step_batch_size_schedule
    if text is None:
        return ()
    option = f"--step-batch-size-schedule {text!r}"
    if ramp := of.named.get("rampup_batch_size"):
        of.faults.append(f"{option}, {ramp}: give one")
    sequence = of.seq_length
    if not isinstance(sequence, int) or sequence < 1:
        return ()  # a fault of its own
    try:
        schedule = read_schedule(text, sequence)
    except ValueError as error:
        of.faults.append(f"{option}: {error}")
        return ()
    wrong = [str(size) for _, size in schedule if size < 1 or size % unit]
    if wrong:
        of.faults.append(f"{option}: {', '.join(wrong)}: use multiples of {unit} (micro-batch size x replicas)")
    size, given = schedule[-1][1], of.global_batch_size
    if given not in (None, size):
        of.faults.append(f"{option} leads to {size}, --global-batch-size {given} says otherwise: leave that out")
    return () if wrong or ramp else schedule


def _read_evaluation(of: Values, batch: Batch, ranks: Ranks) -> tuple[int, int]:
    """Micro-batch and global batch of an evaluation, in samples: training's where nothing else is said."""
    micro, size = of.eval_micro_batch_size or batch.micro, of.eval_global_batch_size or batch.global_size
    unit = micro * max(1, ranks.data)
    trains = batch.global_size % (batch.micro * max(1, ranks.data)) == 0  # else that is the fault
    if size % unit and trains and of.known("micro_batch_size", "global_batch_size"):
        of.faults.append(
            f"evaluation by --eval-micro-batch-size {micro} x {ranks.data} data-parallel replicas and "
            f"--eval-global-batch-size {size} (training's sizes where not given): the second must be a multiple of "
            f"{unit}; use {max(unit, size // unit * unit)} or {(size // unit + 1) * unit}"
        )
        return batch.micro, batch.global_size
    return micro, size


def read_steps(of: Values, batch: Batch, model: Model, ranks: Ranks, start: Position) -> tuple[Steps, Optimizer]:
    """``start``: where the run goes on, so that iterations are turned into the samples that they take there."""
    eval_micro, eval_size = _read_evaluation(of, batch, ranks)
    course = Course(batch, start)
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
    if by_samples:
        iterations = max(start.iteration, course.iterations_at(samples))
    else:
        iterations = of.train_iters or 1
        samples = course.samples_at(iterations)
    if lengths and known and iterations < 1:
        first = batch_size_at(batch, 0)
        of.faults.append(f"{samples} samples are less than one global batch of {first}: train for longer")
    optimizer = _optimizer(of, course, samples, model.sequence, known)
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
            **of.taken("steps"),
            iterations=iterations,
            samples=samples,
            by_samples=by_samples,
            in_iterations=_in_iterations(of),
            eval_every=of.eval_interval or 1000,
            eval_micro=eval_micro,
            eval_size=eval_size,
            exit_signals=signals,
            recompute=recompute,
            recompute_layers=recompute_layers,
        ),
        optimizer,
    )


def _recompute(of: Values) -> tuple[str | None, int]:
    old = of.checkpoint_activations or of.deepspeed_activation_checkpointing
    layers = of.recompute_num_layers if "recompute_num_layers" in of.named else of.checkpoint_num_layers
    layers = layers or 1
    full = of.recompute_granularity == "full" or old
    of.note_without(bool(full), "--recompute-granularity full", "recompute_num_layers", "checkpoint_num_layers")
    if full:
        method = of.recompute_method or "uniform"
        if method == "uniform" and layers > 1:
            of.notes.append(f"every layer is recomputed by itself, not {layers} together: it keeps each layer's input")
        return method, layers
    if of.recompute_method:
        of.faults.append(f"--recompute-method {of.recompute_method} without --recompute-granularity full: add it")
    if of.recompute_granularity == "selective" or of.recompute_activations:
        of.notes.append(
            "selective recomputation: attention here never keeps its score matrix, so there is nothing to recompute"
        )
    return None, 1


def _in_iterations(of: Values) -> tuple[str, ...]:
    names = ["train_iters", "lr_decay_iters", "lr_warmup_iters"]
    if of.lr_decay_style == "WSD":
        names.append("lr_wsd_decay_iters")
    return tuple(f"{of.named[name]} {of.values[name]}" for name in names if name in of.named and of.values[name])


def _optimizer(of: Values, course: Course, samples: int, sequence: int, known: bool) -> Optimizer:
    """``known``: whether the run's own length is."""

    def in_samples(iterations: int | None, given: int | None, tokens: int | None) -> int | None:
        if iterations:
            return course.samples_at(iterations)
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
    wsd = of.lr_wsd_decay_samples
    if of.lr_wsd_decay_iters:  # the last ones of the decay
        wsd = decay - course.samples_at(max(0, course.iterations_at(decay) - of.lr_wsd_decay_iters))
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
    if of.override_opt_param_scheduler and of.use_checkpoint_opt_param_scheduler:
        of.faults.append("--override-opt_param-scheduler and --use-checkpoint-opt_param-scheduler: give one")
    return Optimizer(
        **of.taken("optimizer"),
        lr=lr,
        min_lr=min_lr,
        warmup_samples=warmup,
        decay_samples=decay,
        wsd_samples=wsd,
        weight_decay=decays,
        betas=(of.adam_beta1, of.adam_beta2),
    )
