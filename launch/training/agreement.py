"""One rank's fault is every rank's, before anybody waits for anybody: so all end, with the same words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from noflush.launch.refusal import RefusedError
from noflush.stage.alone import is_alone

_T = TypeVar("_T")


def agree(fault: str | None) -> None:
    """Waits for all ranks; if any has a ``fault``, raises RefusedError of the first few on every one of them."""
    told: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(told, fault)
    faults = [found for found in dict.fromkeys(told) if found is not None]
    if faults:
        more = f" (and {len(faults) - 3} more ranks)" * (len(faults) > 3)
        raise RefusedError("\n  ".join(faults[:3]) + more, everywhere=True)


def on_first_rank(action: Callable[[], _T]) -> _T:
    """What ``action`` returns on rank 0, on every rank; a RefusedError there is raised on every rank too.

    None on a rank that has come back alone (`stage.alone`): what rank 0 decided, it decided before.
    """
    told: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            told[0] = action()
        except RefusedError as error:
            told[1] = str(error)
    if not is_alone():
        dist.broadcast_object_list(told, src=0)
    if told[1] is not None:
        raise RefusedError(told[1], everywhere=True)
    result: _T = told[0]
    return result
