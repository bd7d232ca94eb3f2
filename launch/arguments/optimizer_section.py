"""The "optimizer" section of a run's DeepSpeed config: the user's, or what Megatron's ``--optimizer`` stands for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from noflush.config import BLOCK
from noflush.launch.arguments.pipelining import asked_for
from noflush.launch.arguments.settings import Optimizer, Ranks
from noflush.methods.table import METHODS
from noflush.patches.deepspeed import muon_section

if TYPE_CHECKING:
    from noflush.launch.arguments.deepspeed_config import Found

_OF_MUON = (
    *("muon_momentum", "muon_use_nesterov", "muon_scale_mode", "muon_num_ns_steps", "muon_extra_scale_factor"),
    "muon_tp_mode",
)
_OWN = ("adam_beta1", "adam_beta2", "adam_eps", "sgd_momentum", *_OF_MUON)
"""Options that a section of the config leaves without effect."""


_TP_MODES = {"blockwise": "blockwise", "duplicated": "gathered", "distributed": "gathered"}
"""Megatron's two ways to the whole matrix differ in who computes, not in the result."""


def set_optimizer(of: Found, ds: dict[str, Any], optimizer: Optimizer, ranks: Ranks) -> None:
    """Sets the section of ``ds``; one that is there names the method, and counts.

    Learning rate and decay are Megatron's schedule's in any case.
    """
    if "scheduler" in ds:
        of.faults.append(
            "the DeepSpeed config has a scheduler, and so have Megatron's arguments (--lr-decay-style ...): take the "
            "section out"
        )
    section = ds.get("optimizer")
    if isinstance(section, Mapping):
        ds["optimizer"] = _completed(of, section, optimizer)
    else:
        ds["optimizer"] = _of_arguments(of, ds, optimizer)
    _say_slices(of, ds["optimizer"], ranks)


def _completed(of: Found, section: Mapping[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    params = dict(section.get("params") or {})
    for key, option, value in (
        ("lr", "--lr", optimizer.lr),
        ("weight_decay", "--weight-decay", optimizer.weight_decay[0]),
    ):
        if params.get(key, "auto") not in ("auto", value) and key in of.named:
            of.faults.append(
                f"optimizer.params.{key} is {params[key]} in the DeepSpeed config, but {option} says {value}: take "
                "one out"
            )
        params[key] = value
    if muon_section.names_it(section):
        of.faults += [
            f"optimizer.params.{key} is {params[key]} in the DeepSpeed config, but --lr and its schedule are of all "
            "parameters: take it out"
            for key in ("muon_lr", "adam_lr")
            if key in params
        ]
    for name in _OWN:
        if name in of.named:
            of.notes.append(f"{of.named[name]}: the optimizer is the one in the DeepSpeed config, with its own")
    return {**section, "params": params}


def _of_arguments(of: Found, ds: Mapping[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    rates: dict[str, Any] = {"lr": optimizer.lr, "weight_decay": optimizer.weight_decay[0]}
    adams = {"betas": list(optimizer.betas), "eps": optimizer.eps}
    schedule = asked_for(ds)
    by_matrix = {"muon": "DelayAwareMuon", "dist_muon": "DelayAwareMuon", "soap": "DelayAwareSOAP"}.get(optimizer.name)
    if by_matrix != "DelayAwareMuon" and (given := [of.named[name] for name in _OF_MUON if name in of.named]):
        of.notes.append(f"{' '.join(given)}: without effect, for there is no --optimizer muon")
    if by_matrix is not None and schedule is None:
        of.faults.append(
            f"--optimizer {optimizer.name}: it is noflush's {by_matrix}, and {BLOCK} is not enabled: enable it "
            '(with "schedule": "1f1b_flush" for the synchronous twin), or use --optimizer adam'
        )
    elif by_matrix is not None:
        own: dict[str, Any] = dict(adams)
        if by_matrix == "DelayAwareMuon":
            own |= {
                "momentum": optimizer.muon_momentum,
                "nesterov": optimizer.nesterov,
                "scale_mode": optimizer.scale_mode,
                "extra_scale_factor": optimizer.scale_factor,
                "ns_steps": optimizer.ns_steps,
                "tensor_parallel": _TP_MODES[of.values["muon_tp_mode"]],
            }
        of.notes.append(_said_of(optimizer.name, by_matrix, own, looks=schedule == "1f1b_no_flush"))
        return {"type": by_matrix, "params": {**rates, **own}}
    if optimizer.name == "sgd":
        return {"type": "SGD", "params": {**rates, "momentum": optimizer.momentum}}
    if schedule is None:
        return {"type": "AdamW", "params": {**rates, **adams, "torch_adam": True}}
    if schedule == "1f1b_no_flush":
        of.notes.append(
            "training with Adam, as --optimizer says. For the delay-aware method add to the DeepSpeed config: "
            '"optimizer": {"type": "DelayAwareMuon", "params": {"look_ahead": 0.9}}'
        )
    return {"type": "PipeDreamAdamW", "params": {**rates, **adams}}


def _said_of(asked: str, method: str, own: Mapping[str, Any], looks: bool) -> str:
    said = ", ".join(f"{key} {value}" for key, value in own.items() if key not in ("betas", "eps"))
    line = f"--optimizer {asked} is {method}{': ' if said else ''}{said}; the rest by {METHODS[method].rest}"
    if looks:
        section = json.dumps({"type": method, "params": {**own, "look_ahead": 0.9}})
        line += f'. For forwards that look ahead put into the DeepSpeed config: "optimizer": {section}'
    return line


def _say_slices(of: Found, section: Mapping[str, Any], ranks: Ranks) -> None:
    """What a rule of matrices does with the slices that tensor-parallel ranks hold."""
    row = METHODS.get(muon_section.RULE if muon_section.names_it(section) else section.get("type", ""))
    if row is None or row.unit != "matrix" or ranks.tensor == 1:
        return
    if section["params"].get("tensor_parallel") == "gathered":
        return  # as one rank would
    line = f"each of {ranks.tensor} tensor-parallel ranks takes its own slice of a weight for the matrix"
    if "tensor_parallel" in row.params:
        line += (
            ", with the whole weight's scale (Megatron's --muon-tp-mode blockwise has the slice's); --muon-tp-mode "
            'duplicated, or "tensor_parallel": "gathered" in the DeepSpeed config, is exact'
        )
    of.notes.append(line)
