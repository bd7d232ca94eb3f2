"""Batches on their way to a device: every tensor of any nesting once, and nothing else changed."""

from __future__ import annotations

from collections import namedtuple

import pytest
import torch

from noflush.stage.prefetch import Prefetch

Pair = namedtuple("Pair", "inputs labels")
X, Y = torch.zeros(2), torch.ones(3)


def test_on_a_cpu_a_batch_is_handed_on():
    prefetch = Prefetch(torch.device("cpu"))
    batch = ((X, Y), {"labels": Y})
    assert prefetch.take(prefetch.start(batch)) is batch


@pytest.mark.parametrize(
    "batch",
    [(X, Y), [X, [Y]], ((X,), (Y, X)), {"a": X, "b": (Y, 3)}, Pair(X, {"y": Y}), (X, None, "text"), X],
)
def test_every_tensor_moves_and_the_rest_stays(batch):
    prefetch = Prefetch(torch.device("meta"))  # a device that is not the batch's
    moved = prefetch.moved(batch)
    seen = []

    def same(a, b):
        if isinstance(a, torch.Tensor):
            seen.append(b)
            return b.device.type == "meta" and a.shape == b.shape
        if isinstance(a, dict):
            return type(a) is type(b) and a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
        if isinstance(a, (tuple, list)):
            return type(a) is type(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
        return a is b

    assert same(batch, moved)
    assert seen
