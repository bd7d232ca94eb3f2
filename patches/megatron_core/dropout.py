"""megatron-core's seam: dropout's random states, which megatron-core keeps in `torch.cuda` alone.

DeepSpeed keeps the same tracker for any accelerator, and its activation checkpointing restores that one: with two
trackers a recomputed forward draws other dropout masks than the first, a silent wrong gradient. So megatron-core is
given DeepSpeed's.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import sys
from typing import Any

from noflush.patches.megatron_core import releases

logger = logging.getLogger("noflush")
_INSTALL = (
    f"Tested are {' and '.join(releases.TESTED)}, of which pip takes what this Python can have: "
    f"pip install 'megatron-core>={releases.TESTED[0]},<={releases.TESTED[-1]}'"
)
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

    Raises MegatronCoreChangedError naming what is missing, or the release that is not taken.
    """
    if is_patched():
        return
    from deepspeed.runtime.activation_checkpointing import checkpointing

    modules = [_module(name) for name in _MODULES]
    if (fault := _fault_of_release()) is not None:
        raise MegatronCoreChangedError(f"noflush cannot use megatron-core, {fault}. {_INSTALL}")
    for module in modules:

        def tracker() -> Any:
            return checkpointing.get_cuda_rng_tracker()

        tracker.__wrapped__ = getattr(module, _NAME)  # type: ignore[attr-defined]
        setattr(module, _NAME, tracker)
        logger.info("noflush: %s.%s gives deepspeed.checkpointing's tracker", module.__name__, _NAME)


def missing_seams() -> list[str]:
    """What noflush replaces and this megatron-core lacks, a line each; empty when all is well."""
    missing: list[str] = []
    with contextlib.suppress(ImportError):
        missing += filter(None, [_fault_of_release()])
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


def _fault_of_release() -> str | None:
    return releases.fault(importlib.import_module("megatron.core").__version__)


def _module(name: str) -> Any:
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise MegatronCoreChangedError(
            f"megatron-core is needed and {name} cannot be imported ({error}). {_INSTALL}"
        ) from None
    if not hasattr(module, _NAME):
        raise MegatronCoreChangedError(f"{name}.{_NAME} is gone from megatron-core. {_INSTALL}")
    return module
