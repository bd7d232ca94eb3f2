"""What a run asks of its machine's devices, before any rank waits for another."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping

import torch

from noflush.launch.arguments.settings import Settings
from noflush.launch.ranks import uses_cuda


def on_gpu(environ: Mapping[str, str]) -> bool:
    """Whether the run computes on GPUs: there is one, and DeepSpeed was not told to take something else."""
    return uses_cuda(environ) and torch.cuda.is_available()


def device_faults(settings: Settings, environ: Mapping[str, str]) -> list[str]:
    """What ``settings`` need that this machine does not have, or cannot do together with its GPUs."""
    gpu, faults = on_gpu(environ), []
    if settings.ranks.backend == "gloo" and gpu:
        faults.append(
            "--distributed-backend gloo on a GPU: gloo does not send what lies on one; leave the option out for nccl, "
            "or train on CPUs (DS_ACCELERATOR=cpu)"
        )
    if settings.model.transformer_impl == "transformer_engine":
        missing = [
            what
            for what, there in (
                ("a GPU", gpu),
                ("Transformer Engine", importlib.util.find_spec("transformer_engine") is not None),
            )
            if not there
        ]
        if missing:
            faults.append(
                f"--transformer-impl transformer_engine needs {' and '.join(missing)}, and there is none here: use "
                "--transformer-impl local, or pip install transformer_engine[pytorch] on a machine with a GPU"
            )
    return faults
