"""The DeepSpeed config of a run: the user's file, completed by Megatron's arguments.

Megatron-DeepSpeed's scripts write some numbers in both places; where the two differ, nobody is right.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from noflush.config import BLOCK
from noflush.launch.arguments.optimizer_section import set_optimizer
from noflush.launch.arguments.pipelining import SWITCHED_ON
from noflush.launch.arguments.settings import Batch, Optimizer, Ranks


class Found(Protocol):
    """The command line's values, which options were given, and where faults and notes go."""

    values: dict[str, Any]
    named: dict[str, str]
    faults: list[str]
    notes: list[str]


def read_config(path: str | None, faults: list[str]) -> dict[str, Any]:
    """The config in ``path``; without one, noflush switched on and nothing else."""
    if path is None:
        return dict(SWITCHED_ON)
    import hjson  # DeepSpeed's own reader, which allows comments

    try:
        found = hjson.loads(Path(path).read_text())
    except OSError as error:
        faults.append(f"--deepspeed_config {path} cannot be read: {error.strerror}")
    except hjson.HjsonDecodeError as error:
        faults.append(f"--deepspeed_config {path} is no JSON: {error}")
    else:
        if isinstance(found, Mapping):
            return _with_sections(dict(found), faults)
        faults.append(f"--deepspeed_config {path} holds a {type(found).__name__}: it must be a JSON object")
    return {}


def _with_sections(config: dict[str, Any], faults: list[str]) -> dict[str, Any]:
    """``config`` with its sections as objects, under one name; a fault for one that is something else."""
    if "bfloat16" in config:  # DeepSpeed's older name
        config.setdefault("bf16", config.pop("bfloat16"))
    if config.get("zero_optimization") is True:
        config["zero_optimization"] = {"stage": 1}
    elif config.get("zero_optimization") is False:
        config["zero_optimization"] = {"stage": 0}
    for name in ("fp16", "bf16", "zero_optimization", "optimizer", "data_types"):
        section = config.get(name, {})
        if not isinstance(section, Mapping):
            faults.append(f"{name} is {section!r} in the DeepSpeed config: it must be a JSON object {{...}}")
            del config[name]
    params = config.get("optimizer", {}).get("params", {})
    if not isinstance(params, Mapping):
        faults.append(f'optimizer.params is {params!r} in the DeepSpeed config: it must be a JSON object {{"lr": ...}}')
        config["optimizer"] = {**config["optimizer"], "params": {}}
    return config


def complete(
    of: Found,
    config: Mapping[str, Any],
    ranks: Ranks,
    batch: Batch,
    optimizer: Optimizer,
    precision: str,
) -> dict[str, Any]:
    """``config`` with what the arguments say; adds faults where they differ."""
    ds = copy.deepcopy(dict(config))
    size = batch.schedule[0][1] if batch.schedule else batch.rampup[0] if batch.rampup else batch.global_size
    unit = batch.micro * max(1, ranks.data)
    # A script keeps its config while the number of ranks changes, so the ramp-up's size and K are ours to set.
    _agree(of, ds, "train_micro_batch_size_per_gpu", batch.micro, "--micro-batch-size", "micro_batch_size")
    _agree(of, ds, "train_batch_size", batch.global_size, "--global-batch-size", "global_batch_size")
    _agree(of, ds, "gradient_accumulation_steps", batch.global_size // unit, "--global-batch-size", "global_batch_size")
    ds["train_batch_size"], ds["gradient_accumulation_steps"] = max(1, size), max(1, size // unit)
    _agree(of, ds, "gradient_clipping", of.values["clip_grad"], "--clip-grad", "clip_grad")
    ds.setdefault("steps_per_print", 1_000_000_000)
    _set_precision(of, ds, precision)
    if precision == "bf16":
        _sum_in_float32(of, ds)
    _set_zero(of, ds, precision)
    set_optimizer(of, ds, optimizer, ranks)
    grows = "--rampup-batch-size" if batch.rampup else "--step-batch-size-schedule" if batch.schedule else None
    if grows and _reroutes(ds.get(BLOCK)):
        of.faults.append(
            f"{grows} with {BLOCK}.replicas.reroute in the DeepSpeed config: another group's stage may be serving "
            "this one's micro-batches, so the batch size must stay; take one of the two out"
        )
    if of.values["async_save"] and isinstance(ds.get(BLOCK), Mapping):
        ds[BLOCK] = {"async_save": True, **ds[BLOCK]}
    elif of.values["async_save"]:
        of.notes.append(f"--async-save: without effect where {BLOCK} is not in the DeepSpeed config")
    return ds


def _reroutes(block: Any) -> bool:
    replicas = block.get("replicas") if isinstance(block, Mapping) else None
    return isinstance(replicas, Mapping) and replicas.get("reroute") is True


def _agree(of: Found, ds: dict[str, Any], key: str, value: Any, option: str, name: str) -> None:
    """Sets ``ds[key]``; an option that was given and a config that says otherwise are a fault."""
    there = ds.get(key, "auto")
    if there in ("auto", None):
        ds[key] = value
    elif there != value and name in of.named:
        of.faults.append(
            f"{key} is {there} in the DeepSpeed config, but {option} makes it {value}: take one of them out"
        )


def _set_precision(of: Found, ds: dict[str, Any], precision: str) -> None:
    for name in ("fp16", "bf16"):
        section = dict(ds.get(name, {}))
        enabled = section.get("enabled", "auto")
        if enabled not in ("auto", None) and bool(enabled) != (precision == name):
            of.faults.append(
                f"{name}.enabled is {enabled} in the DeepSpeed config, but the arguments say {precision}: "
                f"{'add' if enabled else 'take out'} --{name}, or change the config"
            )
        if precision == name:
            ds[name] = {**section, "enabled": True}
        else:
            ds.pop(name, None)
    if precision == "fp16":
        scaling = ds["fp16"]
        dynamic = scaling.keys() & {"initial_scale_power", "loss_scale_window", "hysteresis", "min_loss_scale"}
        if dynamic:  # they say how, so that it is one
            scaling.setdefault("loss_scale", 0)
        for key, name in (
            ("loss_scale", "loss_scale"),
            ("loss_scale_window", "loss_scale_window"),
            ("hysteresis", "hysteresis"),
            ("min_loss_scale", "min_loss_scale"),
        ):
            if name in of.named and scaling.get(key, of.values[name]) != of.values[name]:
                # Not a fault: under Megatron-DeepSpeed too the config decides, and its scripts count on that.
                of.notes.append(
                    f"{of.named[name]} {of.values[name]}: fp16.{key} is {scaling[key]} in the DeepSpeed config, which "
                    "counts"
                )
        static = of.values["loss_scale"]
        scaling.setdefault("loss_scale", static or 0)
        if not scaling["loss_scale"]:
            initial = int(of.values["initial_loss_scale"]).bit_length() - 1
            # DeepSpeed starts at a power of two, and Megatron's own default of 2^32 overflows 16 times in a row.
            scaling.setdefault("initial_scale_power", initial if "initial_loss_scale" in of.named else 16)
            scaling.setdefault("loss_scale_window", int(of.values["loss_scale_window"]))
            scaling.setdefault("hysteresis", of.values["hysteresis"])
            scaling.setdefault("min_loss_scale", of.values["min_loss_scale"])
    elif "loss_scale" in of.named:
        of.notes.append(f"--loss-scale {of.values['loss_scale']}: only --fp16 scales the loss")
    if of.values["accumulate_allreduce_grads_in_fp32"]:
        option = of.named["accumulate_allreduce_grads_in_fp32"]
        if precision != "bf16":
            of.notes.append(f"{option}: without effect in {precision}; it is for bf16")
        elif ds.get("data_types", {}).get("grad_accum_dtype", "fp32") not in ("fp32", "float32"):
            of.faults.append(
                f"data_types.grad_accum_dtype is {ds['data_types']['grad_accum_dtype']} in the DeepSpeed config, but "
                f"{option} makes it fp32: take one of them out"
            )


def _sum_in_float32(of: Found, ds: dict[str, Any]) -> None:
    """bf16 gradients are added up and reduced in float32, as Megatron's are unless it is told otherwise."""
    zero = ds.get("zero_optimization", {})
    if zero.get("stage") == 0:
        of.notes.append(
            "zero_optimization.stage is 0: DeepSpeed's optimizer for that adds bf16 gradients up in bf16; leave it out "
            "(or 1) to have them added up in float32"
        )
    else:
        types = ds["data_types"] = dict(ds.get("data_types", {}))
        types.setdefault("grad_accum_dtype", "fp32")
    ds.setdefault("communication_data_type", "fp32")


def _set_zero(of: Found, ds: dict[str, Any], precision: str) -> None:
    named, values = of.named, of.values
    asked = None
    if values["use_distributed_optimizer"] and "zero_stage" in named and values["zero_stage"] < 1:
        of.faults.append("--use-distributed-optimizer is ZeRO-1, but --zero-stage is 0: take one of them out")
    if "zero_stage" in named:
        asked = int(values["zero_stage"])
    elif values["use_distributed_optimizer"] or values["optimizer"] == "dist_muon":
        asked = 1
    section = ds.get("zero_optimization")
    there = section.get("stage") if isinstance(section, Mapping) else None
    if asked is not None and there is not None and there != asked:
        of.faults.append(
            f"zero_optimization.stage is {there} in the DeepSpeed config, but the arguments say {asked}: take one out"
        )
    # fp16's master weights, and float32 sums of bf16 gradients, are ZeRO-1's; it costs nothing on one replica.
    sums = ds.get("data_types", {}).get("grad_accum_dtype") == "fp32"
    if there is None and (precision == "fp16" or (precision == "bf16" and sums)):
        asked = max(1, asked or 0)
    if there is None and asked is not None:
        ds["zero_optimization"] = {**(section if isinstance(section, Mapping) else {}), "stage": asked}
