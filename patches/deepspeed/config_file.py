"""A DeepSpeed config as scripts and commands name it, before DeepSpeed reads it. Pure but for DeepSpeed's reader."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read_host_config(value: str) -> Mapping[str, Any]:
    """The config that ``--deepspeed_config value`` means: a file, or the config itself in URL-safe base64 (GPT-NeoX).

    Comments are allowed, as DeepSpeed allows them. Raises ValueError naming what cannot be read, and why.
    """
    import hjson  # DeepSpeed's own reader

    try:
        if Path(value).is_file():
            return _as_mapping(hjson.loads(Path(value).read_text(encoding="utf-8")), value)
    except (OSError, UnicodeDecodeError) as error:
        # A base64 word is longer than any file name.
        if not _is_base64(value):
            raise ValueError(f"{value}: {error}") from error
    except hjson.HjsonDecodeError as error:
        raise ValueError(f"{value} is no JSON: {error}") from error
    if not _is_base64(value):
        raise ValueError(f"{value}: no such file")
    try:
        return _as_mapping(hjson.loads(base64.urlsafe_b64decode(value).decode("utf-8")), "the base64 config")
    except (UnicodeDecodeError, hjson.HjsonDecodeError) as error:
        raise ValueError(f"{_short(value)} is neither a file nor a config in base64: {error}") from error


def _is_base64(value: str) -> bool:
    try:
        return base64.urlsafe_b64decode(value).lstrip().startswith(b"{")
    except (binascii.Error, ValueError):
        return False


def _as_mapping(found: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(found, Mapping):
        raise ValueError(f"{name} holds a {type(found).__name__}: it must be a JSON object")
    return found


def _short(value: str) -> str:
    return value if len(value) < 60 else f"{value[:40]}... ({len(value)} characters)"


def gas_of(ds_config: Mapping[str, Any], replicas: int) -> int:
    """K as DeepSpeed works it out of the sizes that are there. Raises ValueError where they contradict each other."""
    gas, micro, batch = (
        ds_config.get(key)
        for key in ("gradient_accumulation_steps", "train_micro_batch_size_per_gpu", "train_batch_size")
    )
    if isinstance(batch, int) and isinstance(micro, int):
        found, rest = divmod(batch, micro * replicas)
        if rest or found < 1 or (isinstance(gas, int) and gas != found):
            raise ValueError(
                f"train_batch_size is {batch}, train_micro_batch_size_per_gpu {micro} and gradient_accumulation_steps "
                f"{gas if isinstance(gas, int) else 'not given'}, with {replicas} data-parallel replicas: the first "
                "must be the product of all the others"
            )
        return found
    return gas if isinstance(gas, int) else 1
