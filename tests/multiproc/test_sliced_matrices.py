"""Muon on slices of tensor parallelism: gathered it is one rank's method, block-wise each slice's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from noflush.methods import DelayAwareMuon
from noflush.methods.matrices import set_cut
from noflush.methods.method import Place
from tests.multiproc.ranks import run_ranks

pytestmark = pytest.mark.multiproc
SIZE, STEPS = 2, 6
SHAPES = {"rows": (12, 8), "columns": (8, 12), "fused": (24, 8), "whole": (6, 8)}
DIMS = {"rows": 0, "columns": 1, "fused": 0}
GROUPS, ROWS = 4, (4, 1, 1)


def made(seed):
    draw = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=draw) for name, shape in SHAPES.items()}


def slice_of(name, t, rank):
    return t if name not in DIMS else t.chunk(SIZE, DIMS[name])[rank].clone()


def parameters(tensors, groups):
    found = {name: nn.Parameter(t.clone()) for name, t in tensors.items()}
    set_cut(found["fused"], groups, ROWS)
    return found


def train(params, gradients, **given):
    optimizer = DelayAwareMuon(params.values(), lr=1e-2, **given)
    if "tensor_parallel" in given:
        from noflush.stage.slices import StageSlices

        rank = torch.distributed.get_rank()
        optimizer.set_stage(Place(slices=StageSlices(torch.distributed.group.WORLD, rank, SIZE)))
    for step in range(STEPS):
        for name, p in params.items():
            p.grad = gradients[step][name].clone()
        optimizer.step()
    return {name: p.detach().clone() for name, p in params.items()}


def on_slices(rank, mode):
    mine = {name: slice_of(name, t, rank) for name, t in made(1).items()}
    params = parameters(mine, GROUPS // SIZE)
    for name, dim in DIMS.items():
        params[name].tensor_model_parallel, params[name].partition_dim = True, dim
    gradients = [{name: slice_of(name, t, rank) for name, t in made(2 + step).items()} for step in range(STEPS)]
    return train(params, gradients, tensor_parallel=mode)


def test_gathered_slices_are_one_ranks_method():
    expected = train(parameters(made(1), GROUPS), [made(2 + step) for step in range(STEPS)])
    for rank, found in enumerate(run_ranks(on_slices, SIZE, mode="gathered")):
        for name, t in found.items():
            torch.testing.assert_close(t, slice_of(name, expected[name], rank), atol=1e-5, rtol=1e-4)


def test_blockwise_slices_are_each_ones_own_with_the_wholes_scale():
    """What no slice cuts is the same; a slice's singular values, and so its step, are those of a matrix of its own."""
    results = run_ranks(on_slices, SIZE, mode="blockwise")
    expected = train(parameters(made(1), GROUPS), [made(2 + step) for step in range(STEPS)])
    for rank, found in enumerate(results):
        torch.testing.assert_close(found["whole"], expected["whole"], atol=1e-6, rtol=1e-5)
        own = slice_of("rows", made(1)["rows"], rank)
        alone = {"rows": nn.Parameter(own)}
        gradients = [{"rows": slice_of("rows", made(2 + step)["rows"], rank)} for step in range(STEPS)]
        # (12, 8) scales by 12, its slice (6, 8) alone would by 8.
        found_alone = train(alone, gradients, extra_scale_factor=0.2 * (12 / 8) ** 0.5)
        torch.testing.assert_close(found["rows"], found_alone["rows"], atol=1e-6, rtol=1e-5)
