"""Flat gradients collect what autograd adds, and what others put in their place."""

from __future__ import annotations

import torch
from torch import nn

from noflush.stage.layout import FlatGradients, lay_out


def make():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    return net, FlatGradients(lay_out(net.parameters()))


def run(net):
    net(torch.ones(4, 3)).square().sum().backward()


def test_micro_batches_add_up_in_place():
    net, gradients = make()
    other, _ = make()
    plain = nn.Sequential(*other)
    plain.zero_grad()
    for _ in range(2):
        run(net)
        run(plain)
    (flat,) = gradients.collect()
    assert flat.data_ptr() == net[0].weight.grad.data_ptr()
    for p, q, view in zip(net.parameters(), plain.parameters(), gradients.views, strict=True):
        assert torch.equal(view, q.grad)
        assert p.grad.data_ptr() == view.data_ptr()
    gradients.clear()
    assert not flat.any()


def test_what_others_replaced_or_took_away_is_taken_in():
    net, gradients = make()
    run(net)
    net[0].weight.grad = torch.full((5, 3), 7.0)  # a hook of the user's, say
    net[1].bias.grad = None  # zero_grad(set_to_none=True)
    gradients.collect()
    assert torch.equal(gradients.views[0], torch.full((5, 3), 7.0))
    assert not gradients.views[3].any()
    assert all(p.grad is not None for p in net.parameters())
