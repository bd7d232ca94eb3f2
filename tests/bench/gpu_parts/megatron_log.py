"""Figures from the lines of progress that the Megatron launcher prints. Pure."""

from __future__ import annotations

import re


def figures(log):
    """(milliseconds an iteration, samples a batch, losses) from the lines of progress; the first is warming up."""
    ms = [float(word) for word in re.findall(r"elapsed time per iteration \(ms\): ([\d.]+)", log)]
    size = re.findall(r"global batch size: +(\d+)", log)
    losses = [float(word) for word in re.findall(r"lm loss: (\S+)", log)]
    return ms[1:], int(size[-1]), losses
