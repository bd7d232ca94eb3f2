"""Three groups, where the order of summing matters: still the simulator's to the bit, and in step data parallelism."""

from __future__ import annotations

import pytest
import torch

from tests.multiproc.group_training import assert_groups_same, nadamw, simulated, train_group, train_replicas
from tests.multiproc.groups import lighthouse, run_groups
from tests.multiproc.ranks import run_ranks

pytestmark = [pytest.mark.multiproc, pytest.mark.timeout(200)]

SEEDS = (1, 50, 90)
ALIKE = {"calls": 20, "slow": 0.02}


def run_three(third, **more):
    """Three groups of two stages; ``third``: what the last one does otherwise."""
    per_group = [{"name": f"g{number}", "seed": seed, **ALIKE} for number, seed in enumerate(SEEDS)]
    per_group[-1] |= third
    with lighthouse(min_groups=3) as where:
        return run_groups(train_group, 2, per_group, where=where, stages=2, **more)


@pytest.mark.parametrize(
    ("fraction", "third"),
    [(0.3, {}), pytest.param(1.0, {"calls": 12, "slow": 0.05}, marks=pytest.mark.slow)],
    ids=["alike", "a slower one"],
)
def test_three_groups_are_the_simulators(fraction, third):
    results = run_three(third, extra={"fraction": fraction})
    for rank in (rank for result in results for rank in result):
        of_three = [one for one in rank["exchanges"] if len([part for part in one.parts if part.samples]) == 3]
        assert len(of_three) >= 2
        assert not third or any(len({part.samples for part in one.parts}) > 1 for one in of_three)
    assert_groups_same(results, simulated(results, SEEDS, 2, nadamw))


def test_three_groups_in_step_are_data_parallelism():
    """But for the order in which gradients are summed, which is gloo's there and the groups' here.

    Losses to a bit or four, and weights to a thousandth of an update; with a group left out they are off by .03.
    """
    results = run_three({}, extra={"mode": "sync"})
    replicas = run_ranks(train_replicas, 6, stages=2, calls=ALIKE["calls"], seeds=SEEDS)
    for number, result in enumerate(results):
        whole = replicas[number::3]
        assert result[-1]["losses"] == pytest.approx(whole[-1][0], rel=0, abs=1e-6)
        for stage, (rank, (_, weights)) in enumerate(zip(result, whole, strict=True)):
            for got, want, first in zip(rank["weights"], weights, results[0][stage]["weights"], strict=True):
                assert torch.equal(got, first)  # the groups themselves differ in no bit
                torch.testing.assert_close(got, want, rtol=0, atol=5e-6)
