"""The way of NCCL: no receive may wait past the end of a call for a message that comes later."""

from __future__ import annotations

import itertools

import pytest
import torch

from tests.multiproc import training as t
from tests.multiproc.ranks import run_ranks

pytestmark = pytest.mark.multiproc


def train_without_receives_across_calls(rank, stages, gas):
    from unittest import mock

    with mock.patch("noflush.stage.stage.dist.get_backend", return_value="nccl"):
        engine = t.build(stages, t.ds_config(gas, block={}))
    runner = engine.pipeline_stage.runner
    runner.neighbours.warm_up()  # what construction does on an accelerator: no message of it may count
    history = []

    def state():
        inboxes = runner.neighbours.activations_in, runner.neighbours.gradients_in
        outboxes = runner.neighbours.activations_out, runner.neighbours.gradients_out
        return [i.next_to_post if i else 0 for i in inboxes], [o.sent if o else 0 for o in outboxes]

    for call, pair in enumerate(zip(*[iter(t.data(gas * 6))] * gas, strict=True)):
        engine.train_batch(iter(pair))
        history.append(state())
        if call == 3:
            engine.drain()
            history.append(state())
    engine.drain()
    history.append(state())
    return history, [p.detach().clone() for p in engine.module.parameters()]


@pytest.mark.parametrize(("stages", "gas"), [(4, 1), (2, 4)])
def test_between_calls_every_send_has_its_receive_and_the_reverse(stages, gas):
    results = run_ranks(train_without_receives_across_calls, stages, stages=stages, gas=gas)
    for above, below in itertools.pairwise(results):
        for (posted_above, sent_above), (posted_below, sent_below) in zip(above[0], below[0], strict=True):
            assert posted_below[0] == sent_above[0]  # activations
            assert posted_above[1] == sent_below[1]  # gradients
    torch.set_num_threads(1)
    _, weights = t.simulate(stages, gas, 6, t.torch_nadam, drain_after=(4,))
    for (_, got), want in zip(results, weights, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
