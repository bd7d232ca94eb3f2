"""The ring: right gradients without copies, and an error instead of a wrong gradient."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from noflush.methods import DelayAwareNAdamW
from noflush.stage.layout import WeightVersionError, lay_out, layout_within
from noflush.stage.versions import WeightRing


def model():
    torch.manual_seed(0)
    # LayerNorm saves its weight as the parameter, Linear as a view: the two ways a missed swap can go wrong.
    return nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6), nn.Linear(6, 6))


def make(slots, stash=True, rule=DelayAwareNAdamW):
    net = model()
    ring = WeightRing(lay_out(net.parameters()), slots, stash)
    return net, ring, rule(net.parameters(), lr=0.1)


def forward(net, ring, m, version):
    ring.tag(m, version)
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(m))
    return functional.mse_loss(net(x), x)


def backward(ring, loss, m):
    ring.bind_for_backward(m)
    ring.check(m)
    loss.backward()
    ring.release(m)


def test_gradient_is_that_of_the_stashed_weights():
    net, ring, optimizer = make(slots=3)
    reference = model()
    losses = {}
    for m in range(2):
        losses[m] = forward(net, ring, m, 0)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    ring.update_in_place(optimizer, skip=False)
    net.zero_grad()
    losses[2] = forward(net, ring, 2, 1)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    ring.update_in_place(optimizer, skip=False)
    net.zero_grad()
    backward(ring, losses[0], 0)
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    functional.mse_loss(reference(x), x).backward()
    for p, q in zip(net.parameters(), reference.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)


def test_missed_swap_is_caught(monkeypatch):
    net, ring, optimizer = make(slots=2)
    loss = forward(net, ring, 0, 0)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    ring.update_in_place(optimizer, skip=False)
    monkeypatch.setattr(ring, "bind", lambda version: None)
    with pytest.raises(WeightVersionError, match="backward of micro-batch 0 needs weight version 0"):
        backward(ring, loss, 0)


def test_one_parameter_moved_behind_the_rings_back_is_caught():
    net, ring, _ = make(slots=2)
    loss = forward(net, ring, 0, 0)
    net[1].weight.data = net[1].weight.data.clone()
    with pytest.raises(WeightVersionError, match="parameter 2 of shape"):
        backward(ring, loss, 0)


def test_no_free_slot_is_an_error_and_not_an_overwrite():
    net, ring, optimizer = make(slots=2)
    forward(net, ring, 0, 0)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    ring.update_in_place(optimizer, skip=False)
    forward(net, ring, 1, 1)
    with pytest.raises(WeightVersionError, match="no free slot for version 2"):
        ring.update_in_place(optimizer, skip=False)


def test_version_that_is_gone_is_an_error():
    net, ring, optimizer = make(slots=1)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    ring.update_in_place(optimizer, skip=False)
    with pytest.raises(WeightVersionError, match="version 0 was overwritten"):
        ring.tag(5, 0)


@pytest.mark.parametrize("rule", [DelayAwareNAdamW, torch.optim.AdamW, torch.optim.SGD])
@pytest.mark.parametrize("slots", [1, 3])
def test_updates_are_the_optimizers_own(rule, slots):
    net, ring, optimizer = make(slots, rule=rule)
    plain = model()
    reference = rule(plain.parameters(), lr=0.1)
    for step in range(7):
        for p, q in zip(net.parameters(), plain.parameters(), strict=True):
            q.grad = torch.randn(q.shape, generator=torch.Generator().manual_seed(step))
            p.grad = q.grad.clone()
        ring.update_in_place(optimizer, skip=False)
        reference.step()
    assert ring.newest == 7
    for p, q in zip(net.parameters(), plain.parameters(), strict=True):
        assert torch.equal(p, q)


def test_latest_backward_sees_live_weights_without_a_version_error():
    net, ring, optimizer = make(slots=1, stash=False, rule=torch.optim.AdamW)
    loss = forward(net, ring, 0, 0)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    ring.update_in_place(optimizer, skip=False)
    net.zero_grad()
    backward(ring, loss, 0)
    assert all(torch.isfinite(p.grad).all() for p in net.parameters())


def test_memory_is_slots_times_weights_and_never_grows():
    net, ring, optimizer = make(slots=4)
    weights = sum(p.numel() * p.element_size() for p in net.parameters())
    assert 4 * weights <= ring.nbytes <= 4 * (weights + 64 * len(ring.params))
    storages = set()
    for _ in range(12):
        for p in net.parameters():
            p.grad = torch.ones_like(p)
        ring.update_in_place(optimizer, skip=False)
        storages.add(net[0].weight.untyped_storage().data_ptr())
    assert len(storages) <= 4


def test_parameters_are_aligned_as_torch_aligns_them():
    net, _, _ = make(slots=2)
    assert all(p.data_ptr() % 64 == 0 for p in net.parameters())


def test_going_home_moves_the_newest_version_and_nothing_else():
    net, ring, optimizer = make(slots=3)
    home = net[0].weight.data_ptr()
    for updates in range(1, 6):
        for p in net.parameters():
            p.grad = torch.ones_like(p)
        ring.update_in_place(optimizer, skip=False)
        before = [p.detach().clone() for p in net.parameters()]
        if updates % 2:
            ring.go_home()
            assert net[0].weight.data_ptr() == home
            assert ring.newest == updates
        assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))
    loss = forward(net, ring, 0, 5)
    with pytest.raises(WeightVersionError, match="drain first"):
        ring.go_home()
    backward(ring, loss, 0)


def test_a_skipped_update_is_a_new_version_of_the_same_weights():
    net, ring, optimizer = make(slots=2, rule=torch.optim.SGD)
    before = [p.detach().clone() for p in net.parameters()]
    for p in net.parameters():
        p.grad = torch.full_like(p, float("nan"))
    ring.update_in_place(optimizer, skip=True)
    assert ring.newest == 1
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))


def test_layout_is_read_off_a_flat_tensor():
    flat = torch.arange(20.0)
    inside = [nn.Parameter(torch.empty(2, 3)), nn.Parameter(torch.empty(4))]
    inside[0].data, inside[1].data = flat[2:8].view(2, 3), flat[10:14]
    assert layout_within(inside, flat).offsets == (2, 10)
    inside[1].data = torch.zeros(4)
    with pytest.raises(WeightVersionError, match=r"shape \(4,\) lies outside"):
        layout_within(inside, flat)


def test_a_ring_without_weights_lies_where_its_stage_computes():
    """What is made for it, a norm say, is reduced with others' on that device."""
    assert WeightRing([], 1, device=torch.device("meta")).device.type == "meta"
    params = [nn.Parameter(torch.ones(3))]
    assert WeightRing(lay_out(params), 1, device=torch.device("meta")).device.type == "cpu"
