"""Tied weights without a flush: the owner's versions everywhere, bit for bit as the simulator has them."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import nn

from noflush.demo.gpt import gpt_layers, next_token_loss, split_by_blocks
from noflush.methods.matrices import mark_embeddings_and_heads
from noflush.methods.table import load
from noflush.order.schedule import Schedule
from noflush.order.wire_format import Wire
from noflush.simulate import DelaySimulator, Shared
from tests.multiproc.ranks import run_ranks
from tests.multiproc.training import data

pytestmark = pytest.mark.multiproc
GPT = {"vocabulary": 32, "sequence": 12, "width": 16, "heads": 2, "depth": 12}
CALLS = 9
NADAMW = ("DelayAwareNAdamW", {"lr": 3e-3, "weight_decay": 0.01})
AHEAD = ("DelayAwareNAdamW", {"lr": 3e-3, "look_ahead": 0.9})
MUON = ("DelayAwareMuon", {"lr": 3e-3, "look_ahead": 0.9})


def layers(stages):
    torch.manual_seed(7)
    return split_by_blocks(gpt_layers(**GPT), stages)


def uses(stages, three):
    """(stage, name) of the users: embedding and head; with ``three`` also of a weight in a block of each stage."""
    per = GPT["depth"] // stages
    table = [((0, "0.token.weight"), (stages - 1, f"{per + (stages == 1)}.logits.weight"))]
    if three:  # a weight of its own that first, middle and last blocks share
        first = "1.out.weight"
        rest = [(s, "0.out.weight") for s in range(1, stages)]
        table.append(((0, first), *rest))
    return table


def parameter(module, name):
    return functools.reduce(getattr, name.split("."), module)


def cases(stages):
    """name -> (K, policy, extra in flight, optimizer, three users, clip, what happens between calls)."""
    found = {}
    for gas in (1, 2, 3):
        for weights in ("stash", "latest"):
            found[f"{weights} K={gas}"] = (gas, weights, 0, NADAMW, False, 0.0, None)
    found["three users"] = (2, "stash", 0, NADAMW, True, 0.0, None)
    found["looking ahead"] = (1, "stash", 0, AHEAD, True, 0.0, None)
    found["Muon"] = (2, "stash", 0, MUON, True, 0.0, None)
    found["clipped"] = (2, "stash", 0, NADAMW, False, 0.05, None)
    found["more in flight"] = (2, "stash", 3, NADAMW, True, 0.0, None)
    found["drained"] = (2, "stash", 1, NADAMW, True, 0.0, "drain")
    found["drained, K=3"] = (3, "latest", 2, AHEAD, True, 0.0, "drain")
    found["evaluated"] = (1, "stash", 0, AHEAD, False, 0.0, "evaluate")
    found["another K"] = (3, "stash", 2, NADAMW, True, 0.0, "K=1")
    found["deeper"] = (2, "stash", 1, NADAMW, True, 0.0, "e=4")
    found["deeper, K=1"] = (1, "stash", 0, AHEAD, True, 0.0, "e=5")
    found["coded"] = (2, "stash", 1, NADAMW, True, 0.0, "int4")  # what is tied travels as it is
    found["a larger K"] = (1, "stash", 2, NADAMW, True, 0.0, "K=4")
    if stages <= 4:
        found["2bw"] = (3, "2bw", 0, NADAMW, True, 0.0, "drain")
    return found


def wire_of(between):
    return Wire("int4", "int4") if between == "int4" else Wire()


def train(rank, stages, name):
    from noflush.stage.plain import PlainStage
    from noflush.stage.tied import Tie
    from noflush.stage.work import StageOptions

    gas, weights, extra, (kind, params), three, clip, between = cases(stages)[name]
    module = layers(stages)[rank]
    ties, mine = [], {}
    for users in uses(stages, three):
        shape = parameter(layers(stages)[0], users[0][1]).shape
        ties.append(Tie(users[0][1], tuple(s for s, _ in users), tuple(shape), torch.float32))
        mine |= {len(ties) - 1: parameter(module, of) for s, of in users if s == rank}
    mark_embeddings_and_heads(module.named_modules())
    borrowed = {id(p) for number, p in mine.items() if ties[number].owner != rank}
    optimizer = load(kind)([p for p in module.parameters() if id(p) not in borrowed], **params)
    losses = []

    def loss_fn(outputs, labels):
        loss = next_token_loss(outputs, labels)
        losses.append(loss.item())
        return loss

    schedule = Schedule(stages, gas, weights=weights, extra_in_flight=extra)
    options = StageOptions(wire=wire_of(between))
    stage = PlainStage(schedule, module, loss_fn, optimizer, max_norm=clip, options=options, ties=ties, tied=mine)
    stream = iter(data(200, gpt=GPT))
    for call in range(CALLS):
        stage.train_on(stream)
        if call == 4 and between == "drain":
            stage.drain()
        elif call == 4 and between == "evaluate":
            with stage.at_true_weights():
                seen = [p.detach().clone() for p in mine.values()]
        elif call == 4 and between is not None and between.startswith("K="):
            stage.change_gas(int(between[2:]))
        elif call == 4 and between is not None and between.startswith("e="):
            stage.change_extra(int(between[2:]))
    stage.drain()
    result = {"losses": losses, "weights": [p.detach().clone() for p in module.parameters()]}
    return result | ({"seen": seen} if between == "evaluate" else {})


def train_all(rank, stages):
    return {name: train(rank, stages, name) for name in cases(stages)}


@functools.cache
def trained(stages):
    return run_ranks(train_all, stages, timeout=280, stages=stages)


def simulate(stages, name):
    gas, weights, extra, (kind, params), three, clip, between = cases(stages)[name]
    shared = [Shared(users) for users in uses(stages, three)]
    parts = layers(stages)
    # Every user begins with the owner's.
    for users in uses(stages, three):
        owned = parameter(parts[0], users[0][1])
        for s, of in users[1:]:
            parameter(parts[s], of).data.copy_(owned)
    make = lambda ps: load(kind)(ps, **params)  # noqa: E731
    schedule = Schedule(stages, gas, weights=weights, extra_in_flight=extra)
    simulator = DelaySimulator(parts, next_token_loss, make, schedule, clip, shared=shared, wire=wire_of(between))
    stream, losses = iter(data(200, gpt=GPT)), []
    for call in range(CALLS):
        losses += [simulator.train_micro_batch(*next(stream)).item() for _ in range(simulator.schedule.gas)]
        if call == 4 and between == "drain":
            simulator.drain()
        elif call == 4 and between is not None and between.startswith("K="):
            simulator.change_gas(int(between[2:]))
        elif call == 4 and between is not None and between.startswith("e="):
            simulator.change_extra(int(between[2:]))
    simulator.drain()
    return losses, simulator, shared


@pytest.mark.parametrize(("stages", "name"), [(stages, name) for stages in (2, 3, 4) for name in cases(stages)])
def test_the_stages_are_the_simulator(stages, name):
    losses, simulator, shared = simulate(stages, name)
    results = [result[name] for result in trained(stages)]
    assert results[-1]["losses"] == losses
    borrowed = {(s, of): one.users[0] for one in shared for s, of in one.users[1:]}
    for s, result in enumerate(results):
        names = [of for of, _ in layers(stages)[s].named_parameters()]
        for of, found in zip(names, result["weights"], strict=True):
            owner, own_name = borrowed.get((s, of), (s, of))
            assert torch.equal(found, simulator.parameters(owner)[own_name]), (s, of)
    if "seen" in results[0]:
        for seen in zip(*(result["seen"] for result in results if result["seen"]), strict=True):
            assert all(torch.equal(seen[0], other) for other in seen)


def one_too_many(rank):
    from noflush.stage.plain import PlainStage
    from noflush.stage.tied import Tie

    module = nn.Linear(4, 4, bias=False)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    tie = Tie("weight", (0, 1), (4, 4), torch.float32)
    if rank == 0:  # it owns the weight
        return
    with pytest.raises(ValueError, match="stage 1 and the tied weight 'weight': stage 0, the first"):
        PlainStage(Schedule(2, 1), module, nn.functional.mse_loss, optimizer, ties=[tie], tied={0: module.weight})


def test_a_weight_has_one_owner():
    run_ranks(one_too_many, 2)
