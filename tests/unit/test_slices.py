"""Which gradients count in a stage's norm under tensor parallelism, and where they lie in flat tensors and shards."""

from __future__ import annotations

import torch
from torch.nn import Parameter

from noflush.stage.layout import FlatLayout
from noflush.stage.slices import Region, Slices, counted_regions


def parameter(size, split=False, copy=False):
    found = Parameter(torch.zeros(size))
    found.tensor_model_parallel = split
    found.ds_pipe_replicated = copy
    return found


def layout(*parameters, gap=2):
    offsets, total = [], 0
    for p in parameters:
        offsets.append(total)
        total += p.numel() + gap
    return FlatLayout(parameters, tuple(offsets), total + total % 2)


FIRST, SECOND = Slices(rank=0, size=2), Slices(rank=1, size=2)


def test_split_weights_count_everywhere_whole_ones_once_and_copies_never():
    assert [s.counts(parameter(3, split=True)) for s in (FIRST, SECOND)] == [True, True]
    assert [s.counts(parameter(3)) for s in (FIRST, SECOND)] == [True, False]
    assert [s.counts(parameter(3, split=True, copy=True)) for s in (FIRST, SECOND)] == [False, False]
    older = Parameter(torch.zeros(1))
    older.model_parallel = True  # DeepSpeed's older name
    assert SECOND.counts(older)


def test_neighbours_are_one_region():
    flat = layout(parameter(4, split=True), parameter(3), parameter(5, split=True), parameter(2, split=True))
    assert counted_regions([flat], FIRST, None, 1) == [Region(0, 0, 20)]
    assert counted_regions([flat], SECOND, None, 1) == [Region(0, 0, 4), Region(0, 11, 9)]


def test_shards_hold_their_part_of_the_regions():
    flat = layout(parameter(4, split=True), parameter(3), parameter(5, split=True), parameter(2, split=True))
    assert flat.numel == 22
    whole = torch.zeros(22)
    for region in counted_regions([flat], SECOND, None, 1):
        whole[region.start : region.start + region.length] = 1
    for shard in (0, 1):
        part = torch.zeros(11)
        for region in counted_regions([flat], SECOND, shard, 2):
            part[region.start : region.start + region.length] = 1
        assert torch.equal(part, whole[11 * shard : 11 * shard + 11])


def test_every_flat_has_its_regions():
    flats = [layout(parameter(3)), layout(parameter(4, split=True))]
    assert counted_regions(flats, SECOND, None, 1) == [Region(1, 0, 4)]
