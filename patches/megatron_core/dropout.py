"""megatron-core's seam: dropout's random states, which megatron-core keeps in `torch.cuda` alone.

DeepSpeed keeps the same tracker for any accelerator, and its activation checkpointing restores that one: with two
trackers a recomputed forward draws other dropout masks than the first, a silent wrong gradient. So megatron-core is
given DeepSpeed's.
"""

from __future__ import annotations

import importlib
import logging
import sys
from typing import Any

logger = logging.getLogger("noflush")
TESTED = ("0.16.1",)
_NAME = "get_cuda_rng_tracker"
# Where megatron-core looks the function up when it is called; other modules go through these.
_MODULES = (
    "megatron.core.tensor_parallel",
    "megatron.core.tensor_parallel.random",
    "megatron.core.tensor_parallel.layers",
)


class MegatronCoreChangedError(RuntimeError):
    """megatron-core is missing, or not of the shape that noflush patches."""


def patch() -> None:
    """Gives megatron-core DeepSpeed's tracker. Idempotent.

    Raises MegatronCoreChangedError naming what is missing.
    """
    if is_patched():
        return
    from deepspeed.runtime.activation_checkpointing import checkpointing

    modules = [_module(name) for name in _MODULES]
    for module in modules:

        def tracker() -> Any:
            return checkpointing.get_cuda_rng_tracker()

        tracker.__wrapped__ = getattr(module, _NAME)  # type: ignore[attr-defined]
        setattr(module, _NAME, tracker)
        logger.info("noflush: %s.%s gives deepspeed.checkpointing's tracker", module.__name__, _NAME)


def missing_seams() -> list[str]:
    """What noflush replaces and this megatron-core lacks, a line each; empty when all is well."""
    missing = []
    for name in _MODULES:
        try:
            _module(name)
        except MegatronCoreChangedError as error:
            missing.append(str(error))
    return missing


def unpatch() -> None:
    """Puts megatron-core's own tracker back."""
    for name in _MODULES:
        module = sys.modules.get(name)
        original = getattr(getattr(module, _NAME, None), "__wrapped__", None)
        if module is not None and original is not None:
            setattr(module, _NAME, original)


def is_patched() -> bool:
    """True while DeepSpeed's tracker is in place."""
    return hasattr(getattr(sys.modules.get(_MODULES[0]), _NAME, None), "__wrapped__")


def _module(name: str) -> Any:
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise MegatronCoreChangedError(
            f"megatron-core is needed and {name} cannot be imported ({error}): pip install megatron-core=={TESTED[-1]}"
        ) from None
    if not hasattr(module, _NAME):
        raise MegatronCoreChangedError(
            f"{name}.{_NAME} is gone: noflush was tested with megatron-core {', '.join(TESTED)}; pip install "
            f"megatron-core=={TESTED[-1]}"
        )
    return module
