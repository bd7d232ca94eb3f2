"""The look-ahead: what a forward computes with lies beyond the weights, where they are likely to be at its update.

A stage whose gradients are ``delay`` updates old keeps its true weights z. An update of any method moves z by u to
z - u, and the forwards that follow compute with

    x = z - u - a u,    a = r + r^2 + ... + r^delay

which is what z will be when their gradients arrive if each coming update repeats a share r of the one before it. Where
the weights really went, regressed on the last update by stage, has this form (docs/methods.md): updates repeat one
another less and less, so that far ahead there is nothing more to foresee, and a share of the whole delay looks too far
in a deep pipeline. With r = 1 at a delay of 1 it is error feedback (arXiv 2606.30634: x <- x - 2 u + u_before), with
Adam's step and r = 1 XPipe's and PipeOptim's weight prediction (arXiv 1911.04610, 2312.00839); FTPipe's lets the
momentum decay (Eliad et al., ATC 2021). A skipped update has u = 0. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from noflush.methods.ranges import Param, share

LOOK_AHEAD: Param = share(0.0)
"""The hyper-parameter ``look_ahead`` that every method has, r: 0 looks nowhere, 1 the whole delay ahead."""


def steps(group: Mapping[str, Any], delay: float) -> float:
    """How many of its own steps an update looks ahead: a, at a stage whose mean ``delay`` is so many updates."""
    ratio: float = group["look_ahead"]
    return float(delay) if ratio == 1 else ratio * (1 - ratio**delay) / (1 - ratio)
