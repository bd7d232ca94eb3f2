"""State that comes from elsewhere: another optimizer's, or a checkpoint that a tool has rewritten."""

from __future__ import annotations

import pytest
import torch

from noflush.kernels.eager import EagerKernel
from noflush.methods import DelayAwareNAdamW, DelayAwareNAG, PipeDreamAdamW
from noflush.methods.flat import FlatGroup
from noflush.methods.optimizer import running_product
from noflush.stage.layout import lay_out
from tests.unit.test_optim import parameters

KERNEL = EagerKernel()
METHOD = DelayAwareNAdamW.METHOD
SETTINGS = {"lr": 3e-3, "betas": (0.99, 0.999), "weight_decay": 0.01}


def hyper_of(rule):
    return METHOD.hyper(rule.param_groups[0], rule.place)


class Flat:
    """A rule over flat parameters, its weights kept apart as a host's masters are."""

    def __init__(self, rule=DelayAwareNAdamW, **settings):
        self.params = parameters()
        self.rule = rule(self.params, **settings)
        (self.layout,) = lay_out(self.params)
        self.rule.flatten([FlatGroup.of(0, *vars(self.layout).values())], KERNEL)
        self.weights, self.out = self.layout.new_flat(), self.layout.new_flat()
        for view, p in zip(self.layout.views(self.weights), self.params, strict=True):
            view.copy_(p.detach())

    def train(self, updates, seed=0):
        draw = torch.Generator().manual_seed(seed)
        for _ in range(updates):
            gradient = torch.randn(self.weights.shape, generator=draw)
            self.rule.step_flat(KERNEL, [gradient], [self.weights], [self.out], True, KERNEL.norm([gradient]))
        return self

    def equals(self, other):
        """Whether the parameters are alike; what lies between them is nobody's."""
        pairs = zip(self.layout.views(self.weights), other.layout.views(other.weights), strict=True)
        return all(torch.equal(a, b) for a, b in pairs)


def without(state_dict, *names):
    kept = {i: {k: v for k, v in state.items() if k not in names} for i, state in state_dict["state"].items()}
    return {**state_dict, "state": kept}


@pytest.mark.parametrize("settings", [SETTINGS, SETTINGS | {"momentum_schedule": "constant"}])
@pytest.mark.parametrize("in_place", [False, True])
def test_a_product_of_mu_that_a_tool_dropped_is_worked_out_to_the_bit(settings, in_place):
    whole = Flat(**settings).train(7)
    saved = without(whole.rule.state_dict(), "mu_product")
    resumed = Flat(**settings).train(3, seed=9)  # its own product is another
    resumed.weights.copy_(whole.weights)
    resumed.rule.forget_weights()
    if in_place:  # as ZeRO-1 loads
        for state, p in zip(saved["state"].values(), resumed.params, strict=True):
            for name, value in state.items():
                resumed.rule.state[p][name].data.copy_(value)
        resumed.rule.adopt_state()
    else:
        resumed.rule.load_state_dict(saved)
    products = [run.rule.state[run.params[0]]["mu_product"] for run in (whole, resumed)]
    assert torch.equal(*products)
    assert whole.train(5, seed=1).equals(resumed.train(5, seed=1))


def test_loading_weights_alone_leaves_the_product_as_it_was():
    one, other = Flat(**SETTINGS).train(4), Flat(**SETTINGS).train(4)
    other.rule.forget_weights()
    other.rule.adopt_state()
    assert one.train(3).equals(other.train(3))


def test_the_product_of_any_number_of_updates_takes_no_time():
    whole = Flat(**SETTINGS)
    hyper = hyper_of(whole.rule)
    assert running_product(METHOD, hyper, 0) == 1
    assert 0 < running_product(METHOD, hyper, 100) < 0.99**50
    assert running_product(METHOD, hyper, 10**12) == running_product(METHOD, hyper, 10**5) < 1e-40


def test_an_adamws_moments_are_taken_with_the_product_of_as_many_updates():
    params = parameters()
    adamw = torch.optim.AdamW(params, lr=1e-3)
    for p in params:
        p.grad = torch.ones_like(p)
    for _ in range(4):
        adamw.step()
    ours = Flat(**SETTINGS)
    ours.rule.load_state_dict(adamw.state_dict())
    state = ours.rule.state[ours.params[0]]
    assert state["step"] == 4
    assert state["mu_product"] == running_product(METHOD, hyper_of(ours.rule), 4)
    # Parameter by parameter it goes on from the same product.
    apart = parameters()
    single = DelayAwareNAdamW(apart, **SETTINGS)
    single.load_state_dict(adamw.state_dict())
    apart[0].grad = torch.ones_like(apart[0])
    single.step()
    assert single.state[apart[0]]["mu_product"] == running_product(METHOD, hyper_of(single), 5)


@pytest.mark.parametrize("dropped", ["exp_avg", "exp_avg_sq", "step"])
@pytest.mark.parametrize("rule", [DelayAwareNAdamW, PipeDreamAdamW])
def test_moments_or_a_step_that_are_missing_are_refused_by_name(rule, dropped):
    saved = without(Flat(rule).train(3).rule.state_dict(), dropped)
    with pytest.raises(ValueError, match=rf"lacks {dropped}, which {rule.__name__} cannot go on without"):
        Flat(rule).rule.load_state_dict(saved)


def test_moments_of_another_shape_with_as_many_numbers_are_refused():
    ours = Flat(**SETTINGS)
    ours.train(1)
    state = ours.rule.state[next(p for p in ours.params if p.dim() > 1 and p.shape[0] != p.shape[1])]
    state["exp_avg"] = state["exp_avg"].clone().mT.contiguous()
    with pytest.raises(ValueError, match=r"has exp_avg of shape .*: it was saved with others; give those"):
        ours.rule.adopt_state()


def test_moments_that_were_copied_in_without_a_step_are_refused():
    ours = Flat(**SETTINGS)
    ours.rule.forget_weights()
    ours.rule.state[ours.params[0]]["exp_avg"].data.fill_(1.0)  # DeepSpeed's FusedAdam counts elsewhere
    with pytest.raises(ValueError, match="lacks a step above 0"):
        ours.rule.adopt_state()


def test_the_weight_of_nag_is_refused_by_name_and_its_own_state_is_taken():
    with pytest.raises(ValueError, match=r"has exp_avg, exp_avg_sq, .*step and lacks weight"):
        Flat(DelayAwareNAG).rule.load_state_dict(Flat(PipeDreamAdamW).train(2).rule.state_dict())
    whole = Flat(DelayAwareNAG).train(3)
    resumed = Flat(DelayAwareNAG)
    resumed.weights.copy_(whole.weights)
    resumed.rule.load_state_dict(whole.rule.state_dict())
    assert whole.train(3).equals(resumed.train(3))


def test_sgds_momentum_is_no_fresh_start():
    params = parameters()
    sgd = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    for p in params:
        p.grad = torch.ones_like(p)
    sgd.step()
    with pytest.raises(ValueError, match="has momentum_buffer and lacks exp_avg, exp_avg_sq, step"):
        Flat(**SETTINGS).rule.load_state_dict(sgd.state_dict())
