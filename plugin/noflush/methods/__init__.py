"""Update rules for weights whose gradients arrive late: one file each, and their table. torch, no host.

``from noflush.methods import DelayAwareNAdamW`` gives any class of the table, and loads torch only then.
"""

from __future__ import annotations

from typing import Any

from noflush.methods.table import METHODS, load


def __getattr__(name: str) -> Any:
    if name in METHODS:
        return load(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
