"""A stage's process dies, and its pipeline goes on through another group's stage: what every process computed, bit by
bit, from the orders alone."""

from __future__ import annotations

import pytest
import torch

from noflush.methods import DelayAwareMuon
from noflush.simulated_stage import FLOAT32, Precision
from tests.multiproc import training as t
from tests.multiproc.group_training import nadamw
from tests.multiproc.groups import lighthouse, run_groups
from tests.multiproc.lost_stage_oracle import Replay
from tests.multiproc.lost_stages import train_losing

pytestmark = pytest.mark.multiproc

SEEDS, DIED = (1, 50), 12


def lose(tmp_path, stages, lost, calls, gas=1, comes_back=None, make_optimizer=nadamw, precision=FLOAT32, **more):
    """Two groups, of which the first loses stage ``lost`` before call `DIED`; checked; their results."""
    will = tmp_path / "will"
    loser = {"name": "a", "seed": SEEDS[0], "dies": {lost: DIED}, "will": will, "calls": calls[0]}
    loser |= {"expect_errors": True} if comes_back is None else {"comes_back": (lost, comes_back)}
    with lighthouse(min_groups=2) as where:
        results = run_groups(
            train_losing, stages, [loser, {"name": "b", "seed": SEEDS[1], "calls": calls[1]}],
            where=where, stages=stages, slow=0.05, extra={"timeout_s": 3.0}, gas=gas, **more,
        )  # fmt: skip
    if comes_back is None:
        assert results[0][lost] == ()  # killed
    lost_one = (0, lost, DIED)
    replay = Replay(
        results, SEEDS, stages, calls, gas, make_optimizer, lost_one, torch.load(will, weights_only=False), precision
    )
    replay.run()
    for group, result in enumerate(results):
        assert result[0]["heard"] == {call + 1: replay.batch_loss(group, call) for call in range(calls[group])}
    for node in replay.nodes[1:]:
        weights = results[node.group][node.stage]["weights"]
        for got, want in zip(weights, node.of.params.values(), strict=True):
            assert torch.equal(got, want.detach())
    served = results[1][lost]["served"]
    assert {one.kind for one in served} == ({"B"} if lost == stages - 1 else {"F", "B"})
    return results


def test_a_pipeline_goes_on_without_a_stage(tmp_path):
    lose(tmp_path, 3, 1, (30, 64))


def muon(params):
    return DelayAwareMuon(params, lr=3e-3, look_ahead=0.5)


MUON = {"type": "DelayAwareMuon", "params": {"lr": 3e-3, "look_ahead": 0.5}}
CASES = {
    "first of two between": (4, 1, {}),
    "second of two between": (4, 2, {}),
    "K=2": (3, 1, {"gas": 2}),
    "torch's AdamW": (3, 1, {"optimizer": t.ADAMW, "make_optimizer": t.adamw}),
    "look-ahead": (3, 1, {"optimizer": MUON, "make_optimizer": muon}),
    "bf16": (3, 1, {"more": {"bf16": {"enabled": True}}, "precision": Precision(torch.bfloat16)}),
    "last, K=2": (3, 2, {"gas": 2}),
    "last of two": (2, 1, {}),
}


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) for name in CASES])
def test_so_it_does_in_every_form(tmp_path, name):
    stages, lost, more = CASES[name]
    lose(tmp_path, stages, lost, (30, 80), **more)


def test_without_its_last_stage(tmp_path):
    lose(tmp_path, 3, 2, (30, 64))


@pytest.mark.parametrize(("lost", "calls"), [(1, (110, 180)), pytest.param(2, (220, 330), marks=pytest.mark.slow)])
def test_the_stage_comes_back(tmp_path, lost, calls):
    results = lose(tmp_path, 3, lost, calls, comes_back=1.0)
    back = results[0][lost]
    assert DIED < back["began"] < calls[0]
    assert back["born_of"][0] == results[1][0]["key"]
    if calls[0] > 100:  # and is averaged with the others again
        assert len(back["exchanges"]) >= 1
