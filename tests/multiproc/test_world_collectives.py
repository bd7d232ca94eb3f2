"""Every rank makes the same collectives on the world's communicator while groups are made: NCCL counts on it.

torch makes a new group of a bound world by splitting the world's communicator, a collective of all its ranks, and has
ranks outside the group take part. Here the world is gloo's and said to be bound; what would be a split is counted.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from noflush.order.communicators import communicators
from tests.multiproc import training as t
from tests.multiproc.ranks import run_ranks

pytestmark = pytest.mark.multiproc


class _SplitSource:
    """In the place of the world's NCCL backend; calls ``split`` where a rank outside a group takes part in a split."""

    supports_splitting = True

    def __init__(self, split):
        self._split = split

    def perform_nocolor_split(self, device):
        self._split()


def counted(function):
    """``(function(), splits)``: for which groups this rank split the world's communicator, (backend, ranks) in order.

    Every rank's must be the same: a split is a collective of all, and pairs with whatever the others split at the same
    place. The groups that are made are gloo's, and work.
    """
    splits, made = [], []
    real_new_group, real_source = dist.new_group, distributed_c10d._get_split_source
    world = dist.group.WORLD

    def new_group(ranks=None, timeout=None, backend=None, **options):
        members = list(range(dist.get_world_size()) if ranks is None else ranks)
        made[:] = [(backend or "nccl", members)]
        bound = world.bound_device_id
        if dist.get_rank() in members:
            if bound is not None and made[0][0] == "nccl":
                splits.append(made[0])
            # What members do besides: gloo has nothing to split.
            world.bound_device_id = None
        try:
            return real_new_group(ranks, timeout=timeout, backend="gloo", **{**options, "pg_options": None})
        finally:
            world.bound_device_id = bound

    dist.new_group = new_group
    distributed_c10d._get_split_source = lambda group: _SplitSource(lambda: splits.append(made[0]))
    world.bound_device_id = torch.device("cuda", 0)
    try:
        return function(), splits
    finally:
        world.bound_device_id = None
        dist.new_group, distributed_c10d._get_split_source = real_new_group, real_source


def joined(rank, pipeline, tensor, data, guarded):
    """The splits of a rank that joins a Megatron run."""
    from noflush.launch.arguments.settings import Ranks
    from noflush.launch.training import start

    if not guarded:
        start.without_splits = contextlib.nullcontext
    ranks = Ranks(pipeline * tensor * data, tensor, pipeline, None, 1)
    return counted(lambda: start.join(ranks))[1]


@pytest.mark.parametrize(("pipeline", "tensor", "data"), [(2, 1, 2), (2, 2, 1), (3, 1, 1)])
def test_megatron_groups_split_nothing(pipeline, tensor, data):
    found = run_ranks(joined, pipeline * tensor * data, pipeline=pipeline, tensor=tensor, data=data, guarded=True)
    assert found == [[]] * (pipeline * tensor * data)


def test_unguarded_one_ranks_split_meets_anothers_for_another_group():
    """What the guard is for: members of a gloo group split nothing for it, ranks outside do."""
    found = run_ranks(joined, 4, pipeline=2, tensor=1, data=2, guarded=False)
    assert all(found)
    assert found[0] != found[2]
    assert [split for split in found[0] if split[0] == "nccl"] == [split for split in found[2] if split[0] == "nccl"]


def links_opened(rank, stages):
    """How many of the device's groups with a neighbour a rank is in."""
    from noflush.stage import connect

    connect.without_splits = contextlib.nullcontext
    made = counted(lambda: connect.connect([list(range(stages))], rank, torch.device("cpu"), 30.0))[1]
    return sum(backend == "nccl" and rank in members for backend, members in made)


def test_the_plan_knows_how_many_links_a_rank_opens():
    assert run_ranks(links_opened, 4, stages=4) == [communicators(stage, 4).links for stage in range(4)] == [2, 4, 4, 2]


def constructed(rank, stages, guarded):
    """The splits of a rank while DeepSpeed's engine and noflush's are made, as over NCCL."""
    from unittest import mock

    gpt = t.GPT | {"depth": 6}
    config = t.ds_config(1, block={})
    with contextlib.ExitStack() as patches:
        for module in ("stage.connect", "stage.stage"):
            patches.enter_context(mock.patch(f"noflush.{module}.dist.get_backend", return_value="nccl"))
            if not guarded:
                patches.enter_context(mock.patch(f"noflush.{module}.without_splits", contextlib.nullcontext))
        engine, splits = counted(lambda: t.build(stages, config, gpt=gpt))
    assert engine.num_stages == stages
    return splits


@pytest.mark.parametrize(("stages", "replicas"), [(2, 1), (3, 1), (2, 2)])
def test_construction_makes_the_same_collectives_on_every_rank(stages, replicas):
    found = run_ranks(constructed, stages * replicas, stages=stages, guarded=True)
    assert all(splits == found[0] for splits in found), found
    assert all(backend == "nccl" for backend, _ in found[0])  # DeepSpeed's own, which all ranks make alike


def test_without_the_guard_construction_hangs_from_three_stages_on():
    found = run_ranks(constructed, 3, stages=3, guarded=False)
    assert len({len(splits) for splits in found}) > 1, found
