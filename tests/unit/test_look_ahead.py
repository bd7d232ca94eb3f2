"""The look-ahead against its own formula, error feedback's and torch's optimizers, in the simulator and flat."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from noflush.kernels.eager import EagerKernel
from noflush.methods import look_ahead
from noflush.methods.flat import FlatGroup
from noflush.methods.method import Place
from noflush.methods.table import METHODS, load
from noflush.order.schedule import Schedule
from noflush.simulate import DelaySimulator

LR = 1e-2


def layers(stages):
    torch.manual_seed(5)
    return [nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(stages)]


def data(count):
    draw = torch.Generator().manual_seed(6)
    return [(torch.randn(3, 6, generator=draw), torch.randn(3, 6, generator=draw)) for _ in range(count)]


def simulate(make_optimizer, schedule, batches):
    simulator = DelaySimulator(layers(schedule.stages), nn.functional.mse_loss, make_optimizer, schedule)
    losses = [simulator.train_micro_batch(*batch).item() for batch in batches]
    return losses, [simulator.parameters(s) for s in range(schedule.stages)], simulator


@pytest.mark.parametrize(
    ("ratio", "delay", "steps"), [(0, 7, 0), (1, 7, 7), (1, 0.5, 0.5), (0.5, 3, 0.875), (0.9, 0, 0), (0.9, 1, 0.9)]
)
def test_so_many_steps_ahead(ratio, delay, steps):
    assert look_ahead.steps({"look_ahead": ratio}, delay) == pytest.approx(steps)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("schedule", [Schedule(1, 1), Schedule(3, 2, "1f1b_flush")])
def test_without_delay_it_changes_no_bit(name, schedule):
    batches = data(12)
    plain = simulate(lambda ps: load(name)(ps, lr=LR), schedule, batches)
    ahead = simulate(lambda ps: load(name)(ps, lr=LR, look_ahead=0.7), schedule, batches)
    assert plain[0] == ahead[0]
    for a, b in zip(plain[1], ahead[1], strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_with_all_of_a_delay_of_one_it_is_error_feedback():
    """2bw has delay 1 at every stage: x <- x - 2 u + u_before (arXiv 2606.30634), by a loop of its own."""
    stages, gas, batches = 3, 2, data(24)
    schedule = Schedule(stages, gas, weights="2bw")
    losses, published, _ = simulate(lambda ps: load("PipeDreamAdamW")(ps, lr=LR, look_ahead=1.0), schedule, batches)

    model = nn.Sequential(*layers(stages))
    params = list(model.parameters())
    # torch's AdamW steps a copy, to learn its update u.
    base = [nn.Parameter(p.detach().clone()) for p in params]
    adamw = torch.optim.AdamW(base, lr=LR, weight_decay=0.01)
    x = [p.detach().clone() for p in params]
    u_before = [torch.zeros_like(p) for p in params]
    one_ago, seen = [t.clone() for t in x], []
    for t in range(0, len(batches), gas):
        for p, old in zip(params, one_ago, strict=True):
            p.data.copy_(old)
            p.grad = None
        for inputs, labels in batches[t : t + gas]:
            loss = nn.functional.mse_loss(model(inputs), labels)
            (loss / gas).backward()
            seen.append(loss.item())
        for b, p in zip(base, params, strict=True):
            b.grad = p.grad.clone()
        z = [b.detach().clone() for b in base]
        adamw.step()
        u = [before - b.detach() for before, b in zip(z, base, strict=True)]
        one_ago = [t.clone() for t in x]
        x = [now - 2 * step + before for now, step, before in zip(x, u, u_before, strict=True)]
        u_before = u
    assert losses == pytest.approx(seen, rel=1e-5)
    flat = [t for of_stage in published for t in of_stage.values()]
    for a, b in zip(flat, x, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("master", [False, True])
@pytest.mark.parametrize("name", METHODS)
def test_flat_updates_hand_on_what_lies_ahead_and_keep_the_true_weights(name, master):
    """Ten updates: the true weights are those of a run that looks nowhere, the targets lie 0.5 + 0.25 steps beyond."""
    start = [torch.randn(shape, generator=torch.Generator().manual_seed(3)) for shape in ((4, 6), (5,))]
    draw = torch.Generator().manual_seed(9)
    gradients = [[torch.randn(p.shape, generator=draw) for p in start] for _ in range(10)]

    plain = [nn.Parameter(p.clone()) for p in start]
    optimizer = load(name)(plain, lr=LR)
    trace = [[p.detach().clone() for p in plain]]
    for grads in gradients:
        for p, g in zip(plain, grads, strict=True):
            p.grad = g.clone()
        optimizer.step()
        trace.append([p.detach().clone() for p in plain])

    params = [nn.Parameter(p.clone()) for p in start]
    rule, kernel = load(name)(params, lr=LR, look_ahead=0.5), EagerKernel()
    rule.set_stage(Place(0, 4, 2.0))
    groups = [
        FlatGroup.of(number, group["params"], [sum(q.numel() for q in group["params"][:i]) for i in
                     range(len(group["params"]))], sum(p.numel() for p in group["params"]))
        for number, group in enumerate(rule.param_groups)
    ]  # fmt: skip
    rule.flatten(groups, kernel)
    number = {id(p): i for i, p in enumerate(params)}
    flats = [torch.cat([start[number[id(p)]].reshape(-1) for p in g.params]) for g in groups]
    order = [number[id(p)] for g in groups for p in g.params]
    for step, grads in enumerate(gradients, start=1):
        flat_grads = [torch.cat([grads[number[id(p)]].reshape(-1) for p in g.params]) for g in groups]
        targets = [torch.zeros_like(f) for f in flats]
        rule.step_flat(kernel, flat_grads, flats, targets, master, torch.tensor(1.0))
        true = [torch.zeros_like(f) for f in flats]
        rule.true_weights(flats if master else targets, true)
        now = torch.cat([trace[step][i].reshape(-1) for i in order])
        before = torch.cat([trace[step - 1][i].reshape(-1) for i in order])
        assert torch.equal(torch.cat(true), now)
        assert torch.equal(torch.cat(targets), now + (now - before) * 0.75)
        if not master:
            flats = targets
    # A skipped update has made no step: what is handed on are the true weights.
    targets = [torch.zeros_like(f) for f in flats]
    none = [torch.zeros_like(f) for f in flats]
    outcome = rule.step_flat(kernel, none, flats, targets, master, torch.tensor(torch.inf))
    assert outcome.skipped.item() == 1.0
    assert torch.equal(torch.cat(targets), now)


def test_a_drain_hands_on_the_true_weights():
    schedule, batches = Schedule(3, 1), data(12)
    section = lambda ps: load("DelayAwareMuon")(ps, lr=LR, look_ahead=0.5)  # noqa: E731
    _, newest, simulator = simulate(section, schedule, batches)
    published = [{name: t.clone() for name, t in of_stage.items()} for of_stage in newest]
    probe = data(1)[0]
    before = simulator.evaluate(*probe)
    simulator.drain()
    landed = [simulator.parameters(s) for s in range(3)]
    assert not all(torch.equal(a[k], b[k]) for a, b in zip(published, landed, strict=True) for k in a)
    assert simulator.evaluate(*probe) == before  # which looked at the true ones all the time
