"""The groups' sum of a slice, each number of it added in the order of the groups, however many they are.

Gloo's all-reduce adds every segment of a tensor from another member on, so with more than two the last bit depends on
where a number lies. Here every member is sent a share of the slice by each of the others, adds them in the order of
ranks, and gives the others the sum: as many bytes, in two exchanges whatever the number of members.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.distributed.distributed_c10d import AllgatherOptions, AllToAllOptions  # type: ignore[attr-defined]


@torch.no_grad()
def total_in_order(group: Any, mine: Tensor, world: int, patience: timedelta) -> Tensor:
    """The sum over ``group``'s ``world`` members of ``mine`` (1-d, in host memory, as long at all of them).

    Raises whatever gloo does where a member is gone, or silent for ``patience``.
    """
    length = mine.numel()
    share = -(-length // world)
    if not share:
        return mine.clone()
    sent = torch.zeros(share * world, dtype=mine.dtype)
    sent[:length] = mine
    got = torch.empty_like(sent)
    group.alltoall_base(got, sent, [], [], AllToAllOptions()).wait(patience)
    total = torch.zeros(share, dtype=mine.dtype)
    for part in got.view(world, share).unbind():
        total += part
    group.allgather([list(sent.view(world, share).unbind())], [total], AllgatherOptions()).wait(patience)
    return sent[:length]
