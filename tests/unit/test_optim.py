"""The update rules against torch's own NAdam, against Eq 10 written as a plain loop, and against themselves."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch.nn import Parameter

from noflush.kernels.eager import EagerKernel
from noflush.methods import METHODS, DelayAwareNAdamW, DelayAwareNAG, PipeDreamAdamW, load
from noflush.methods.flat import FlatGroup
from noflush.methods.method import Place
from noflush.stage.layout import lay_out

SHAPES = [(64, 33), (7,), (1,), (3, 5, 2), (129,)]


def parameters(seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [Parameter(torch.randn(s, generator=draw)) for s in SHAPES]


def give_gradients(steps, *models):
    draw = torch.Generator().manual_seed(5)
    for _ in range(steps):
        for members in zip(*models, strict=True):
            grad = torch.randn(members[0].shape, generator=draw)
            for p in members:
                p.grad = grad.clone()
        yield


@pytest.mark.parametrize("weight_decay", [0.0, 0.01])
@pytest.mark.parametrize("betas", [(0.99, 0.999), (0.9, 0.95)])
def test_nadamw_is_torch_nadam_bit_for_bit(weight_decay, betas):
    ours, theirs = parameters(), parameters()
    a = DelayAwareNAdamW(ours, lr=3e-3, betas=betas, weight_decay=weight_decay, momentum_decay=4e-3)
    b = torch.optim.NAdam(theirs, lr=3e-3, betas=betas, weight_decay=weight_decay, decoupled_weight_decay=True)
    for _ in give_gradients(200, ours, theirs):
        a.step()
        b.step()
        assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))


PAIRS = {
    "NAdam": (DelayAwareNAdamW, torch.optim.NAdam, {"betas": (0.99, 0.999), "decoupled_weight_decay": True}),
    "AdamW": (PipeDreamAdamW, torch.optim.AdamW, {}),
}


@pytest.mark.parametrize("name", PAIRS)
@pytest.mark.parametrize("ours_first", [True, False])
def test_state_dicts_go_both_ways_between_ours_and_torchs(name, ours_first):
    rule, torchs, settings = PAIRS[name]
    one, other = parameters(), parameters()
    makers = [
        lambda ps: rule(ps, lr=3e-3, weight_decay=0.1),
        lambda ps: torchs(ps, lr=3e-3, weight_decay=0.1, **settings),
    ]
    first, second = makers if ours_first else makers[::-1]
    a = first(one)
    for _ in give_gradients(10, one):
        a.step()
    for p, q in zip(one, other, strict=True):
        q.data.copy_(p)
    # Made with torch's own defaults: what differs must come with the state dict.
    b = second(other) if not ours_first else torchs(other)
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    for _ in give_gradients(10, one, other):
        a.step()
        b.step()
    assert all(torch.equal(p, q) for p, q in zip(one, other, strict=True))


def test_state_of_coupled_weight_decay_is_refused():
    a, b = torch.optim.NAdam(parameters(), weight_decay=0.1), DelayAwareNAdamW(parameters())
    with pytest.raises(ValueError, match="shrinks the weights themselves"):
        b.load_state_dict(a.state_dict())
    with pytest.raises(ValueError, match="amsgrad or maximize"):
        PipeDreamAdamW(parameters()).load_state_dict(torch.optim.AdamW(parameters(), amsgrad=True).state_dict())


def flattened(optimizer, kernel):
    """The layout of each of its groups, laid out flat."""
    layouts = [lay_out(group["params"])[0] for group in optimizer.param_groups]
    optimizer.flatten([FlatGroup.of(number, *vars(layout).values()) for number, layout in enumerate(layouts)], kernel)
    return layouts


@pytest.mark.parametrize("rule", [load(name) for name in METHODS])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_flat_and_out_of_place_is_parameter_by_parameter(rule, weight_decay):
    apart, flat = parameters(), parameters()
    a, b = rule(apart, weight_decay=weight_decay), rule(flat, weight_decay=weight_decay)
    kernel = EagerKernel()
    layouts = flattened(b, kernel)
    now, following, gradients = ([layout.new_flat() for layout in layouts] for _ in range(3))
    for layout, start in zip(layouts, now, strict=True):
        for view, p in zip(layout.views(start), layout.params, strict=True):
            view.copy_(p.detach())
    same = {id(q): p for p, q in zip(apart, flat, strict=True)}
    for _ in give_gradients(20, apart, flat):
        a.step()
        before = [start.clone() for start in now]
        for layout, gradient in zip(layouts, gradients, strict=True):
            for view, p in zip(layout.views(gradient), layout.params, strict=True):
                view.copy_(p.grad)
        b.step_flat(kernel, gradients, now, following, False, kernel.norm(gradients))
        assert all(torch.equal(*pair) for pair in zip(now, before, strict=True))
        assert not any(gradient.any() for gradient in gradients)
        now, following = following, now
        for layout, new in zip(layouts, now, strict=True):
            found = zip(layout.params, layout.views(new), strict=True)
            assert all(torch.equal(same[id(q)], view) for q, view in found)
    for p, q in zip(apart, flat, strict=True):
        assert a.state[p].keys() == b.state[q].keys()
        assert all(torch.equal(a.state[p][k], b.state[q][k]) for k in a.state[p])


@pytest.mark.parametrize("rule", [load(name) for name in METHODS])
def test_flat_state_survives_a_state_dict(rule):
    ran, loaded = parameters(), parameters()
    a, b = rule(ran), rule(loaded)
    kernel = EagerKernel()
    layouts, _ = flattened(a, kernel), flattened(b, kernel)
    draw = torch.Generator().manual_seed(1)
    wa = [torch.randn(layout.numel, generator=draw) for layout in layouts]
    out = [torch.empty_like(w) for w in wa]
    for _ in range(3):
        gradients = [torch.randn(layout.numel, generator=draw) for layout in layouts]
        a.step_flat(kernel, gradients, wa, out, True, kernel.norm(gradients))
    b.load_state_dict(copy.deepcopy(a.state_dict()))
    wb = [w.clone() for w in wa]
    for optimizer, weights in ((a, wa), (b, wb)):
        for group in optimizer.param_groups:
            group["lr"] = 0.5  # the groups in force, not those of before the load
        gradients = [torch.ones(layout.numel) for layout in layouts]
        optimizer.step_flat(kernel, gradients, weights, out, True, kernel.norm(gradients))
    with pytest.raises(RuntimeError, match="keeps flat state now"):
        a.step()
    for layout, one, other in zip(layouts, wa, wb, strict=True):  # what lies between parameters is nobody's
        assert all(torch.equal(*pair) for pair in zip(layout.views(one), layout.views(other), strict=True))


def test_adamw_is_torch_adamw_bit_for_bit():
    ours, theirs = parameters(), parameters()
    a, b = PipeDreamAdamW(ours, lr=3e-3, weight_decay=0.1), torch.optim.AdamW(theirs, lr=3e-3, weight_decay=0.1)
    for _ in give_gradients(200, ours, theirs):
        a.step()
        b.step()
        assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))


def test_parameter_without_a_gradient_stays():
    a, b = parameters()[:2]
    before = b.detach().clone()
    optimizer = DelayAwareNAdamW([a, b], weight_decay=0.1)
    a.grad = torch.ones_like(a)
    optimizer.step()
    assert torch.equal(b, before)
    assert b not in optimizer.state


def test_converted_module_is_refused():
    p = Parameter(torch.zeros(4, dtype=torch.bfloat16))
    p.grad = torch.ones_like(p)
    with pytest.raises(RuntimeError, match=r"float32 weights\. Enable bf16 or fp16"):
        DelayAwareNAdamW([p]).step()


def test_constant_momentum_uses_beta1_from_the_first_step():
    p = Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = DelayAwareNAdamW([p], lr=0.1, betas=(0.9, 0.99), eps=0.0, momentum_schedule="constant")
    w, m, v, product = 1.0, 0.0, 0.0, 1.0
    for t in range(1, 30):
        g = 0.3 * w + 0.1 * t
        p.grad = torch.tensor([g], dtype=torch.float64)
        optimizer.step()
        m, v, product = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g * g, product * 0.9
        hat = 0.9 * m / (1 - product * 0.9) + 0.1 * g / (1 - product)
        w -= 0.1 * hat / (v / (1 - 0.99**t)) ** 0.5
        # mu's product is kept in float32, as torch keeps it.
        assert p.item() == pytest.approx(w, rel=1e-5)
        w = p.item()


@pytest.mark.parametrize("schedule", ["constant", "theorem"])
@pytest.mark.parametrize("delay", [0, 3])
def test_nag_is_equation_10(schedule, delay):
    """w_{t+1} = w_t + d_t - lr (1 - gamma_t) grad(look-ahead point `delay` steps ago), on a quadratic, float64."""
    lr, wd, horizon = 0.05, 0.0, 40
    curve = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)
    p = Parameter(torch.tensor([1.0, -2.0, 0.7], dtype=torch.float64))
    optimizer = DelayAwareNAG([p], lr=lr, momentum=0.9, weight_decay=wd, momentum_schedule=schedule)

    def gamma(t):
        return 0.9 if schedule == "constant" else max(0.0, (t - 2) / t)

    w_old = w = p.detach().clone()
    ahead = []
    for t in range(1, horizon):
        d = gamma(t) * (w - w_old)
        ahead.append(w + d)
        assert torch.allclose(p, ahead[-1], rtol=1e-12, atol=1e-14)
        grad = curve * ahead[max(0, len(ahead) - 1 - delay)]
        w_old, w = w, w + d - lr * (1 - gamma(t)) * grad
        p.grad = grad.clone()
        optimizer.step()


def test_nag_without_momentum_is_sgd():
    """To rounding: torch's SGD fuses its multiply and add, the kernels' rules cannot."""
    ours, theirs = parameters(), parameters()
    a, b = DelayAwareNAG(ours, lr=0.1, momentum=0.0), torch.optim.SGD(theirs, lr=0.1)
    for _ in give_gradients(20, ours, theirs):
        a.step()
        b.step()
    assert all(torch.allclose(p, q, rtol=2e-6, atol=2e-6) for p, q in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(
    ("rule", "settings", "expected"),
    [
        # The paper's 0.9 + 0.09 (P - i) / P with i = s + 1, and the authors' code for any other base.
        (DelayAwareNAG, {"momentum": 0.9}, [0.9675, 0.945, 0.9225, 0.9]),
        (DelayAwareNAdamW, {"betas": (0.9, 0.999)}, [0.9675, 0.945, 0.9225, 0.9]),
        (DelayAwareNAdamW, {"betas": (0.5, 0.999)}, [0.8675, 0.745, 0.6225, 0.5]),
    ],
)
def test_stage_momentum_is_equation_13(rule, settings, expected):
    got = []
    for stage in range(4):
        optimizer = rule([Parameter(torch.ones(1))], stage_momentum=True, **settings)
        optimizer.set_stage(Place(stage, 4, delay=3 - stage))
        got.append(optimizer.METHOD.hyper(optimizer.param_groups[0], optimizer.place)[1])
    assert got == pytest.approx(expected)


def test_learning_rate_discount_is_equation_13():
    p = Parameter(torch.zeros(1))
    optimizer = DelayAwareNAG([p], lr=1.0, momentum=0.0, lr_discount_steps=4)
    optimizer.set_stage(Place(0, 4, delay=4.0))
    moves = []
    for _ in range(6):
        p.grad = torch.ones(1)
        before = p.item()
        optimizer.step()
        moves.append(before - p.item())
    # The authors' code counts updates from 1: the first has rho 3/4, the fourth 0.
    assert moves == pytest.approx([4**-0.75, 4**-0.5, 4**-0.25, 1, 1, 1], rel=1e-5)


def test_discount_leaves_a_stage_without_delay_alone():
    p = Parameter(torch.zeros(1))
    optimizer = DelayAwareNAG([p], lr=1.0, momentum=0.0, lr_discount_steps=4)
    optimizer.set_stage(Place(3, 4, delay=0.0))
    p.grad = torch.ones(1)
    optimizer.step()
    assert p.item() == -1.0


@pytest.mark.parametrize(
    ("rule", "wrong", "rule_said"),
    [
        (DelayAwareNAdamW, {"lr": -1.0}, "lr is -1.0: it must be a finite number, 0 or more"),
        (DelayAwareNAdamW, {"lr": math.nan}, "lr is nan: it must be a finite number"),
        (PipeDreamAdamW, {"lr": math.inf}, "lr is inf: it must be a finite number"),
        (PipeDreamAdamW, {"lr": "3e-4"}, "lr is '3e-4': it must be a finite number"),
        (DelayAwareNAG, {"lr": True}, "lr is True: it must be a finite number"),
        (DelayAwareNAdamW, {"betas": 0.9}, "betas is 0.9: it must be two numbers in"),
        (PipeDreamAdamW, {"betas": (0.9, math.nan)}, r"betas is \(0.9, nan\): it must be two numbers in"),
        (PipeDreamAdamW, {"eps": math.inf}, "eps is inf"),
        (DelayAwareNAdamW, {"weight_decay": math.nan}, "weight_decay is nan"),
        (DelayAwareNAdamW, {"momentum_decay": math.inf}, "momentum_decay is inf"),
        (DelayAwareNAdamW, {"lr_discount_steps": 1.5}, "lr_discount_steps is 1.5: it must be a whole number"),
        (DelayAwareNAG, {"lr_discount_steps": math.inf}, "lr_discount_steps is inf: it must be a whole number"),
        (DelayAwareNAdamW, {"stage_momentum": True}, r"betas\[0\] below 0.99 .* raises betas\[0\], which is 0.99"),
        (DelayAwareNAG, {"stage_momentum": True}, "momentum below 0.99"),
        (DelayAwareNAdamW, {"betas": (1.0, 0.9)}, r"betas is \(1.0, 0.9\): it must be two numbers in"),
        (DelayAwareNAdamW, {"momentum_schedule": "fast"}, "nadam or constant"),
        (DelayAwareNAG, {"momentum": 1.0}, "momentum is 1.0"),
        (DelayAwareNAG, {"momentum_schedule": "nadam"}, "constant or theorem"),
    ],
)
def test_value_out_of_range(rule, wrong, rule_said):
    with pytest.raises(ValueError, match=rule_said):
        rule([Parameter(torch.zeros(1))], **wrong)


def test_sparse_gradient_is_refused():
    p = Parameter(torch.zeros(4))
    p.grad = torch.zeros(4).to_sparse()
    with pytest.raises(RuntimeError, match="dense embeddings"):
        DelayAwareNAdamW([p]).step()
