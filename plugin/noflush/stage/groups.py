"""Process groups made without a collective on the world's communicator."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist


@contextmanager
def without_splits() -> Iterator[None]:
    """Groups made inside are made of their own members alone, on every backend.

    DeepSpeed binds the default group to its device, and torch then makes a new NCCL group by splitting the world's
    communicator: a collective, which ranks outside the new group join too. But a rank outside cannot tell a new gloo
    group, whose members split nothing, from an NCCL one, and splits for both; ranks so make different numbers of
    collectives, and hang. Unbound, nobody splits: an NCCL group connects its members when they first use it.
    """
    world = dist.group.WORLD
    assert world is not None
    bound, world.bound_device_id = world.bound_device_id, None
    try:
        yield
    finally:
        world.bound_device_id = bound
