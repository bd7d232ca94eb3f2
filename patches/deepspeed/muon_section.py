"""DeepSpeed's own Muon, named in the config: the delay-aware form of it, with DeepSpeed's keys, defaults and scale.

DeepSpeed 0.19.8 (runtime/engine.py `_muon_param_groups`, runtime/zero/muon/original_muon.py) steps a matrix [m, n] by
its learning rate times max(1, m / n)^(1/2), which is `DelayAwareMuon`'s ``shape_scaling`` with a factor of 1; what is
no matrix is Adam's, with betas, eps and a learning rate of its own. `faults`, `ours` and `line` are pure.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from noflush.config import ConfigError
from noflush.methods.ranges import not_negative
from noflush.methods.table import METHODS

RULE = "DelayAwareMuon"
_DEFAULTS = {
    "momentum": 0.95,
    "betas": [0.9, 0.95],
    "eps": 1e-10,
    "scale_mode": "shape_scaling",
    "extra_scale_factor": 1.0,
}
_RATES = {"muon_lr": 0.02, "adam_lr": 3e-4}
"""Of the matrices and of the rest, where neither these keys nor ``lr`` say another."""
_NO_MATTER = ("ns_method", "per_head_muon", "torch_adam", "adam_w_mode", "fp32_optimizer_states")
"""Keys of DeepSpeed's that are no hyper-parameters: how it computes, or read by it before this (`take_tags`)."""


def names_it(section: Any) -> bool:
    """Whether a config's ``optimizer`` section is DeepSpeed's Muon; it takes the name in any case."""
    return isinstance(section, Mapping) and str(section.get("type")).lower() == "muon"


def faults(params: Mapping[str, Any]) -> list[str]:
    """What is wrong with the ``params`` of such a section, a line each."""
    given = {key: value for key, value in params.items() if value != "auto"}
    rate = not_negative(0.0)
    found = [
        f"{key} is {given[key]!r}: it must be {rate.rule}"
        for key in _RATES
        if key in given and not rate.holds(given[key])
    ]
    method = given.get("ns_method", "gram")
    if method not in ("gram", "standard"):
        found.append(f"ns_method is {method!r}: it must be gram or standard (they give the same to rounding)")
    if given.get("adam_w_mode", True) is not True:
        found.append("adam_w_mode is false: weight decay is decoupled here, for matrices and the rest; leave it out")
    own = {key: value for key, value in given.items() if key not in (*_NO_MATTER, *_RATES)}
    known = [*METHODS[RULE].params, *_RATES, *_NO_MATTER]
    found += [f"{key} is not a parameter of it: they are {', '.join(known)}" for key in own if key not in known]
    return found + METHODS[RULE].faults({key: value for key, value in own.items() if key in known})


def ours(params: Mapping[str, Any], schedules: bool = False) -> dict[str, Any]:
    """The ``optimizer`` section that takes the place of DeepSpeed's Muon with ``params``.

    Args:
        schedules: whether a script's own groups and schedule say learning rate and weight decay.
    """
    own = {key: value for key, value in params.items() if key not in (*_NO_MATTER, *_RATES)}
    if not schedules:
        own = {"weight_decay": 0.0, **own, "lr": rates(params)[0]}
    return {"type": RULE, "params": {**_DEFAULTS, **own}}


def rates(params: Mapping[str, Any]) -> tuple[float, float]:
    """Learning rates of the matrices and of the rest."""
    matrices, rest = (params.get(key, params.get("lr", default)) for key, default in _RATES.items())
    return matrices, rest


def line(params: Mapping[str, Any], section: Mapping[str, Any], schedules: bool = False) -> str:
    """What is said of the change."""
    new = section["params"]
    said = ", ".join(f"{key} {value}" for key, value in new.items() if key not in ("lr", "betas", "eps"))
    rate = "learning rate and weight decay by the script's schedule"
    if not schedules:
        rate = "lr {} for matrices, {} for the rest".format(*rates(params))
    ahead = "" if "look_ahead" in new else '; "look_ahead": 0.9 in its params has forwards look ahead'
    left = [f"{key} {params[key]}" for key in ("ns_method", "torch_adam") if key in params]
    unused = f"; without effect: {', '.join(left)}" if left else ""
    return (
        f"noflush: optimizer Muon of the DeepSpeed config is {RULE}: {rate}; {said}; biases, norms, embeddings and "
        f"output layer by {METHODS[RULE].rest}, betas {new['betas']}, eps {new['eps']}{ahead}{unused}"
    )


def in_place(kwargs: dict[str, Any]) -> dict[str, Any]:
    """``kwargs`` of an engine with `DelayAwareMuon` where the config names DeepSpeed's Muon, and a line that says so.

    The user's own config object stays as it is. A script's optimizer, if it passes one, is yet to be replaced.

    Raises ConfigError for a learning rate of matrices or of the rest where the script's schedule sets one of all.
    """
    import torch.distributed as dist

    host_config = kwargs["config_class"]
    params = dict(host_config._param_dict["optimizer"].get("params") or {})
    schedules = kwargs.get("optimizer") is not None
    if schedules and (own := [key for key in _RATES if key in params]):
        raise ConfigError(
            [
                f"optimizer.params.{own[0]} is {params[own[0]]}, but the script's schedule sets the learning rate of "
                "all parameters: leave it out"
            ]
        )
    section = ours(params, schedules)
    host_config._param_dict = {**host_config._param_dict, "optimizer": section}
    host_config.optimizer_name, host_config.optimizer_params = section["type"], section["params"]
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(line(params, section, schedules), flush=True)  # noqa: T201 (where the engine's line goes)
    lr = rates(params)
    if schedules or lr[0] == lr[1]:
        return kwargs
    learnt = kwargs.get("model_parameters")
    return {**kwargs, "model_parameters": by_rates(kwargs["model"].parameters() if learnt is None else learnt, lr)}


def take_tags(parameters: Iterable[Any]) -> None:
    """Turns the marks that DeepSpeed left on parameters into noflush's.

    With Muon in the config DeepSpeed marks every parameter: ``use_muon``, and ``muon_num_heads`` where each attention
    head is a matrix (``per_head_muon``). Its ZeRO code would update so marked ones while it gathers their gradients,
    for any optimizer whose class has "muon" in its name; noflush gathers them itself, and takes the marks away.
    """
    from noflush.methods.matrices import set_cut, set_matrix

    for p in parameters:
        if getattr(p, "use_muon", True) is False:
            set_matrix(p, False)
        if heads := getattr(p, "muon_num_heads", None):
            set_cut(p, 1, [p.shape[0] // heads] * heads)
        for mark in ("use_muon", "muon_num_heads", "muon_head_dim"):
            if hasattr(p, mark):
                delattr(p, mark)


def by_rates(parameters: Iterable[Any], lr: tuple[float, float]) -> list[dict[str, Any]]:
    """``parameters``, or groups of them, as groups with the learning rate of matrices or of the rest.

    A group's own rate wins, as in DeepSpeed.
    """
    from noflush.methods.matrices import is_matrix

    listed = list(parameters)
    groups = [item for item in listed if isinstance(item, dict)]
    loose = [item for item in listed if not isinstance(item, dict)]
    made = []
    for group in [*groups, {"params": loose}]:
        for matrices, rate in zip((True, False), lr, strict=True):
            if half := [p for p in group["params"] if p.requires_grad and is_matrix(p) is matrices]:
                made.append({"lr": rate, **group, "params": half})
    return made
