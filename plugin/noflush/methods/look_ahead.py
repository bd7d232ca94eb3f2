"""The look-ahead: what a forward computes with lies beyond the weights, where they are likely to be at its update.

A stage whose gradients are ``delay`` updates old keeps its true weights z. An update of any method moves z by u to
z - u, and the forwards that follow compute with

    x = z - u - a u,    a = share * delay

which is what z will be when their gradients arrive if the next ``a`` updates are as this one. NAdam's own look-ahead is
of this kind; with a = 1 at a delay of 1 it is error feedback (arXiv 2606.30634: x <- x - 2 u + u_before), with Adam's
step XPipe's and PipeOptim's weight prediction (arXiv 1911.04610, 2312.00839). A skipped update has u = 0. Pure.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from noflush.methods.ranges import Param, not_negative

LOOK_AHEAD: Param = not_negative(0.0)
"""The hyper-parameter ``look_ahead`` that every method has: the share of its stage's delay; 0 looks nowhere."""


def steps(group: Mapping[str, Any], delay: float) -> float:
    """How many of its own steps an update looks ahead, at a stage whose mean ``delay`` is so many updates."""
    share: float = group["look_ahead"]
    return share * delay
