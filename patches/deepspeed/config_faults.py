"""What of a DeepSpeed config's own keys noflush refuses: each with the value seen, the rule and the fix. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from noflush.methods.table import METHODS
from noflush.patches.deepspeed import muon_section
from noflush.patches.deepspeed.optimizers import refusal


def at(config: Mapping[str, Any], *path: str) -> Any:
    """The value at ``path`` of nested objects; None where there is none."""
    value: Any = config
    for key in path:
        if not isinstance(value, Mapping):
            return None
        value = value.get(key)
    return value


def is_number(value: Any, whole: bool = False, least: float = 0.0) -> bool:
    """Whether ``value`` is a finite number of at least ``least``."""
    kind = int if whole else (int, float)
    return isinstance(value, kind) and not isinstance(value, bool) and least <= value < math.inf


def faults_of_host_config(ds: Mapping[str, Any]) -> list[str]:
    """What of DeepSpeed's own keys noflush cannot train with, a line each."""
    faults = []
    for key in ("gradient_accumulation_steps", "train_micro_batch_size_per_gpu", "train_batch_size"):
        # "auto" is for whoever completes the config (the launcher, transformers); DeepSpeed sees a number.
        size = ds.get(key, "auto")
        if size not in ("auto", None) and not is_number(size, whole=True, least=1):
            faults.append(f"{key} is {size!r}: it must be a whole number, 1 or more")
    clipping = ds.get("gradient_clipping", 1.0)
    if clipping != "auto" and not is_number(clipping):
        faults.append(f"gradient_clipping is {clipping!r}: it must be a finite number, 0 (off) or more")
    for section, key in (
        ("fp16", "loss_scale"),
        ("fp16", "initial_scale_power"),
        ("fp16", "loss_scale_window"),
        ("fp16", "hysteresis"),
        ("fp16", "min_loss_scale"),
    ):
        value = at(ds, section, key)
        if value not in ("auto", None) and not is_number(value):
            faults.append(f"{section}.{key} is {value!r}: it must be a finite number, 0 or more")
    zero = at(ds, "zero_optimization", "stage")
    if ds.get("zero_optimization") is True:  # an old spelling of stage 1
        zero = 1
    if zero in (2, 3):
        faults.append(
            f"zero_optimization.stage is {zero}: ZeRO-2 and ZeRO-3 shard what a pipeline stage needs whole between "
            "micro-batches (DeepSpeed's pipeline refuses them too); use stage 0 or 1"
        )
    elif zero not in (None, 0, 1):
        faults.append(f"zero_optimization.stage is {zero!r}: it must be 0 or 1")
    faults += _faults_of_precision(ds, zero or 0)
    for key in ("offload_optimizer", "offload_param", "cpu_offload", "cpu_offload_param", "zenflow"):
        value = at(ds, "zero_optimization", key)
        if value and not (isinstance(value, Mapping) and value.get("device", "none") in (None, "none")):
            faults.append(
                f"zero_optimization.{key} is set: the next weight version is written on the device; take it out"
            )
    if at(ds, "zero_optimization", "elastic_checkpoint"):
        faults.append(
            "zero_optimization.elastic_checkpoint is true: DeepSpeed cannot load what it then saves; take it out"
        )
    if at(ds, "checkpoint", "writer", "decoupled"):
        faults.append(
            "checkpoint.writer.decoupled is true: DeepSpeed waits for that writer before an update, which no stage "
            "may; take it out, and set async_pipeline.async_save"
        )
    if at(ds, "amp", "enabled"):
        faults.append("amp.enabled is true: its gradient scaler spans the pipeline; use bf16 or fp16")
    faults += _faults_of_data_efficiency(ds)
    if at(ds, "compile", "deepcompile"):
        faults.append("compile.deepcompile is true: it rewrites where parameters live; switch it off")
    if ds.get("managed_gradient_accumulation", True) is not True:
        faults.append("managed_gradient_accumulation is false: noflush owns the update interval; leave it out")
    named = at(ds, "optimizer", "type")
    muon = muon_section.names_it(ds.get("optimizer"))
    if named in METHODS or muon:
        given = at(ds, "optimizer", "params") or {}
        if isinstance(given, Mapping):
            check = muon_section.faults if muon else METHODS[named].faults
            wrong = check({key: value for key, value in given.items() if value != "auto"})
            faults += [f"optimizer.params of {named}: {fault}" for fault in wrong]
        else:
            faults.append(f"optimizer.params is {given!r}: it must be a JSON object")
    if why := refusal(named, flattened_by(ds)):
        faults.append(f"optimizer.type is {named!r}: {why}")
    return faults


def flattened_by(ds: Mapping[str, Any]) -> str | None:
    """What hands an optimizer flat tensors, shards of many parameters in a row; None: nothing."""
    zero = at(ds, "zero_optimization", "stage") == 1 or ds.get("zero_optimization") is True
    return "fp16" if at(ds, "fp16", "enabled") else "bf16" if _bf16(ds) else "ZeRO-1" if zero else None


_ACCUMULATE = {"fp32": "fp32", "float32": "fp32", "bf16": "bf16", "bfloat16": "bf16", "fp16": "fp16", "float16": "fp16"}


_DATA_EFFICIENCY = {
    "curriculum_learning": (
        "curriculum learning is enabled: it changes the shape of micro-batches while others are in flight; switch it "
        "off, and pad micro-batches to one length"
    ),
    "data_efficiency.data_sampling.curriculum_learning": (
        "curriculum learning is enabled: which samples come, and of what length, follows the number of calls, and its "
        "sampler speaks with other replicas in between; switch it off, and pad micro-batches to one length"
    ),
    "data_efficiency.data_sampling.dynamic_batching": (
        "dynamic batching is enabled: it changes the shape of micro-batches while others are in flight; switch it off"
    ),
    "data_efficiency.data_routing.random_ltd": (
        "random layerwise token dropping is enabled: how many tokens its layers keep follows the number of calls, not "
        "that of a micro-batch in flight; switch it off"
    ),
}


def _faults_of_data_efficiency(ds: Mapping[str, Any]) -> list[str]:
    """Of what changes micro-batches, or what layers take of them, as training goes on.

    DeepSpeed reads each inner section's ``enabled``, whatever ``data_efficiency.enabled`` says.
    """
    given = [path for path in _DATA_EFFICIENCY if at(ds, *path.split("."), "enabled")]
    faults = [f"{path}.enabled is true: {_DATA_EFFICIENCY[path]}" for path in given]
    if not faults and at(ds, "data_efficiency", "enabled"):
        return ["data_efficiency.enabled is true, and none of its parts can be had without a flush; take it out"]
    return faults


def _faults_of_precision(ds: Mapping[str, Any], zero: int) -> list[str]:
    """What DeepSpeed has no optimizer for, or one that noflush cannot redirect."""
    faults = []
    low = "fp16" if at(ds, "fp16", "enabled") else "bf16" if _bf16(ds) else "fp32"
    named = at(ds, "data_types", "grad_accum_dtype")
    accumulate = low if named is None else _ACCUMULATE.get(str(named))
    if low == "fp16" and zero == 0:
        faults.append(
            "fp16.enabled is true with ZeRO stage 0: under noflush fp16's master weights are kept by ZeRO-1, which "
            'costs nothing on one data-parallel rank; set "zero_optimization": {"stage": 1}'
        )
    if low == "bf16" and accumulate == "fp32" and zero == 0:
        faults.append(
            "data_types.grad_accum_dtype is 'fp32' with bf16 and ZeRO stage 0, which DeepSpeed has no optimizer for; "
            'set "zero_optimization": {"stage": 1}'
        )
    elif accumulate not in {"fp32": ("fp32",), "bf16": ("bf16", "fp32"), "fp16": ("fp16",)}[low]:
        allowed = "'bf16' or 'fp32'" if low == "bf16" else repr(low)
        faults.append(f"data_types.grad_accum_dtype is {named!r}: weights in {low} accumulate in {allowed}")
    for section, key in (
        ("fp16", "fp16_master_weights_and_grads"),
        ("bf16", "bf16_master_weights_and_grads"),
        ("bf16", "bf16_optimizer_states"),
    ):
        if at(ds, section, key):
            faults.append(f"{section}.{key} is true: noflush keeps float32 master weights; take it out")
    if at(ds, "torch_autocast", "enabled"):
        faults.append("torch_autocast.enabled is true: its gradient scaler spans the pipeline; use bf16 or fp16")
    return faults


def _bf16(ds: Mapping[str, Any]) -> bool:
    return bool(at(ds, "bf16", "enabled") or at(ds, "bfloat16", "enabled"))
