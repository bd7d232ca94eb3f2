"""What a checkpoint's files would run when they are read: nothing but what is named here.

DeepSpeed unpickles whole objects, and a pickle may name any function to call. So every file is looked through before:
first the names in it, without running any, then by torch's own restricted reader, without reading the tensors. Whoever
can change a file between this and DeepSpeed's reading is not kept out.
"""

from __future__ import annotations

import importlib
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

ALLOWED = (
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
    "numpy.ndarray",
    "numpy.dtype",
    "numpy._core.multiarray._reconstruct",
    "numpy.core.multiarray._reconstruct",
    "numpy.dtypes.UInt32DType",
)
"""What DeepSpeed 0.19's own checkpoints hold beside tensors and plain values, and numpy's random state."""


def allowed() -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    """The objects that `ALLOWED` names, each with its name; those of other versions of their packages are left out."""
    found: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = []
    for name in ALLOWED:
        module, _, attribute = name.rpartition(".")
        try:
            found.append((getattr(importlib.import_module(module), attribute), name))
        except (ImportError, AttributeError):
            continue
    return found


def file_fault(path: Path, trusted: bool = False) -> str | None:
    """Why DeepSpeed must not, or cannot, read ``path``; None if it may. ``trusted``: whatever it runs is allowed."""
    try:
        with path.open("rb") as stream:
            begins = stream.read(1)
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}; see to it that every rank may read it"
    if not begins:
        return f"{path} is empty: {_AGAIN}"
    if trusted:
        return None
    if not zipfile.is_zipfile(path):
        return f"{path} is cut short, or not in torch.save's format since 1.6: {_AGAIN}"
    try:
        with safe_globals(allowed()):
            names = sorted(get_unsafe_globals_in_checkpoint(str(path)))
            if not names:
                # Tensors are mapped, not read.
                torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, OSError, EOFError, KeyError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        return f"{path} is no checkpoint's file that can be read safely ({reason}): {_AGAIN}"
    if names:
        shown = ", ".join(names[:4]) + " ..." * (len(names) > 4)
        return (
            f"{path} would run {shown} when it is loaded, which no checkpoint of pretrain_gpt.py needs: whoever wrote "
            "it can do anything with your account. Give --trust-checkpoint only if you know who that was"
        )
    return None


_AGAIN = "copy it again from where it was saved, or name another checkpoint by --ckpt-step"
