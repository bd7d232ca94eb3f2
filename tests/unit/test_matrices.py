"""What a matrix is, how a fused weight is cut, and methods of matrices against other people's arithmetic."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from noflush.kernels.eager import EagerKernel
from noflush.methods import DelayAwareMuon, DelayAwareSOAP, PipeDreamAdamW
from noflush.methods.flat import FlatGroup
from noflush.methods.flops import newton_schulz
from noflush.methods.matrices import is_matrix, mark_embeddings_and_heads, piece_of, set_cut, set_matrix
from noflush.methods.newton_schulz import orthogonalized

SHAPES = [(24, 16), (16, 64), (64, 16), (16, 16), (16, 16)]


def weights(shapes=SHAPES, seed=1):
    draw = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=draw)) for shape in shapes]


def train(optimizer, params, steps=10, seed=2):
    draw = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in params:
            p.grad = torch.randn(p.shape, generator=draw)
        optimizer.step()


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize(
    ("ours", "theirs"), [(("spectral", 0.2), "match_rms_adamw"), (("shape_scaling", 1.0), "original")]
)
def test_muon_is_torchs(nesterov, ours, theirs):
    """To the rounding of Newton-Schulz, which torch does in bfloat16: 2^-8 of a step, ten steps."""
    mine, yours = weights(), weights()
    shared = {"lr": 1e-2, "momentum": 0.95, "nesterov": nesterov, "weight_decay": 0.1}
    mode, factor = ours
    train(DelayAwareMuon(mine, **shared, scale_mode=mode, extra_scale_factor=factor), mine)
    train(torch.optim.Muon(yours, **shared, adjust_lr_fn=theirs), yours)
    for a, b, start in zip(mine, yours, weights(), strict=True):
        moved = (b - start).norm()
        assert (a - b).norm() < 0.01 * moved
        assert moved > 0.1


def test_newton_schulz_makes_singular_values_one():
    """All forms of it: wide (the Gram form), square, tall, and cut by groups."""
    draw = torch.Generator().manual_seed(1)
    made = [torch.randn(shape, generator=draw) for shape in ((8, 40), (40, 8), (12, 16), (2, 6, 16))]
    for x, found in zip(made, orthogonalized(made, 5), strict=True):
        assert found.shape == x.shape
        values = torch.linalg.svdvals(found.reshape(-1, x.shape[-1]))
        assert values.min() > 0.6
        assert values.max() < 1.25


def test_the_gram_form_is_the_plain_one():
    x = torch.randn((3, 16, 80), generator=torch.Generator().manual_seed(1))
    wide = torch.stack(orthogonalized(list(x), 5))
    expected = (x / x.norm(dim=(-2, -1), keepdim=True)).double()
    for _ in range(5):
        a = expected @ expected.mT
        expected = 3.4445 * expected + (-4.7750 * a + 2.0315 * a @ a) @ expected
    torch.testing.assert_close(wide.double(), expected, atol=1e-5, rtol=1e-5)


def test_a_zero_gradient_moves_nothing_but_decay():
    (p,) = params = weights([(4, 8)])
    p.grad = torch.zeros_like(p)
    before = p.detach().clone()
    DelayAwareMuon(params, lr=0.5, weight_decay=0.1).step()
    assert torch.equal(p, before * 0.95)


def soap_by_hand(start, gradients, lr, decay, betas, beta, eps, every, estimate):
    """The method's formulas for one matrix, in float64."""
    w = start.double()
    m, n = w.shape
    left, right = torch.zeros(m, m).double(), torch.zeros(n, n).double()
    first, second = torch.zeros(m, n).double(), torch.zeros(m, n).double()
    for t, g in enumerate((g.double() for g in gradients), start=1):
        averaged = betas[0] * first + (1 - betas[0]) * g
        if estimate == "second":
            left, right = beta * left + (1 - beta) * g @ g.T, beta * right + (1 - beta) * g.T @ g
        else:
            left, right = averaged @ averaged.T, averaged.T @ averaged
        if t == 1:
            u, v = torch.linalg.eigh(left)[1], torch.linalg.eigh(right)[1]
            continue
        if t % every == 0:
            order = torch.diag(u.T @ left @ u).argsort(descending=True)
            u, second = torch.linalg.qr(left @ u[:, order])[0], second[order]
            order = torch.diag(v.T @ right @ v).argsort(descending=True)
            v, second = torch.linalg.qr(right @ v[:, order])[0], second[:, order]
        first = averaged
        second = betas[1] * second + (1 - betas[1]) * (u.T @ g @ v) ** 2
        scale = lr * math.sqrt(1 - betas[1] ** (t - 1)) / (1 - betas[0] ** (t - 1))
        w = w * (1 - lr * decay) - scale * u @ ((u.T @ first @ v) / (second.sqrt() + eps)) @ v.T
    return w


@pytest.mark.parametrize("estimate", ["second", "first"])
def test_soap_is_its_formulas(estimate):
    draw = torch.Generator().manual_seed(4)
    params = weights([(6, 6), (5, 5), (6, 6)])
    start = [p.detach().clone() for p in params]
    given = {"lr": 1e-2, "betas": (0.9, 0.99), "shampoo_beta": 0.95, "weight_decay": 0.1, "refresh_every": 3}
    optimizer = DelayAwareSOAP(params, **given, estimate=estimate)
    history = [[] for _ in params]
    for _ in range(11):
        for p, kept in zip(params, history, strict=True):
            # Gradients whose eigenvalues lie apart, so that the first basis is well determined.
            u, _, v = torch.linalg.svd(torch.randn(p.shape, generator=draw))
            p.grad = u @ torch.diag(1.5 ** -torch.arange(p.shape[0]).float()) @ v
            kept.append(p.grad.clone())
        optimizer.step()
    for p, w, gradients in zip(params, start, history, strict=True):
        expected = soap_by_hand(w, gradients, 1e-2, 0.1, (0.9, 0.99), 0.95, 1e-8, 3, estimate)
        torch.testing.assert_close(p.double(), expected, atol=3e-6, rtol=1e-5)


def test_soap_keeps_no_state_that_it_does_not_need():
    params = weights([(4, 7), (7, 4), (5, 5)])
    names = ("row_covariance", "col_covariance", "row_basis", "col_basis")
    optimizer = DelayAwareSOAP(params, estimate="first")
    train(optimizer, params, steps=2)
    sizes = [[optimizer.state[p][name].numel() for name in names] for p in params]
    assert sizes == [[0, 0, 16, 49], [0, 0, 49, 16], [0, 0, 25, 25]]
    saved = optimizer.state_dict()
    kernel, offsets = EagerKernel(), [0, 28, 56]
    other = DelayAwareSOAP(params)
    other.flatten([FlatGroup.of(0, params, offsets, 81)], kernel)
    with pytest.raises(
        ValueError, match=r"row_covariance of shape \(0, 0\), and DelayAwareSOAP .* parameters \(4, 4\)"
    ):
        other.load_state_dict(saved)


@pytest.mark.parametrize(("delay", "every"), [(7, 6), (3, 11), (0, 45)])
def test_soap_refreshes_more_often_where_the_delay_is_larger(delay, every):
    from noflush.methods.soap import refresh_every

    assert refresh_every(10, delay, 8, by_delay=True) == every
    assert refresh_every(10, delay, 8, by_delay=False) == 10
    budget = sum(1 / refresh_every(10, d, 8, by_delay=True) for d in range(8))
    assert budget == pytest.approx(8 / 10, rel=0.05)


def test_embeddings_heads_and_vectors_are_no_matrices():
    model = nn.ModuleDict(
        {"token": nn.Embedding(10, 4), "mlp": nn.Linear(4, 4), "lm_head": nn.Linear(4, 10), "narrow": nn.Linear(4, 1)}
    )
    assert mark_embeddings_and_heads(model.named_modules()) == ["token.weight", "lm_head.weight"]
    assert [name for name, p in model.named_parameters() if is_matrix(p)] == ["mlp.weight"]
    set_matrix(model["mlp"].weight, False)
    assert not any(map(is_matrix, model.parameters()))
    megatrons = nn.Parameter(torch.zeros(3, 3))
    megatrons.is_embedding_or_output_parameter = True
    assert not is_matrix(megatrons)


@pytest.mark.parametrize("method", [DelayAwareMuon, DelayAwareSOAP])
def test_the_rest_is_adamws(method):
    shapes = [(4, 6), (6,), (3,)]
    mine, yours = weights(shapes), weights(shapes)
    train(method(mine, lr=1e-2, betas=(0.8, 0.99), eps=1e-6, weight_decay=0.1), mine)
    train(PipeDreamAdamW(yours, lr=1e-2, betas=(0.8, 0.99), eps=1e-6, weight_decay=0.1), yours)
    assert all(torch.equal(a, b) for a, b in zip(mine[1:], yours[1:], strict=True))
    assert not torch.equal(mine[0], yours[0])


def test_groups_keep_what_they_say():
    matrix, vector, frozen = weights([(4, 4), (4,), (2, 2)])
    groups = [{"params": [matrix, vector], "lr": 0.5, "weight_decay": 0.0}, {"params": [frozen]}]
    optimizer = DelayAwareMuon(groups, lr=0.1, look_ahead=0.5)
    found = [
        (g["params"], g["lr"], g["weight_decay"], g.get("method"), g["look_ahead"]) for g in optimizer.param_groups
    ]
    assert found == [
        ([matrix], 0.5, 0.0, None, 0.5),
        ([vector], 0.5, 0.0, "PipeDreamAdamW", 0.5),
        ([frozen], 0.1, 0.01, None, 0.5),
    ]


@pytest.mark.parametrize("method", [DelayAwareMuon, DelayAwareSOAP])
@pytest.mark.parametrize(("groups", "rows"), [(1, (8, 8)), (2, (4, 2, 2)), (2, (6, 1, 1))])
def test_a_fused_weight_is_the_matrices_it_is(method, groups, rows):
    """Trained fused or as separate weights: the same, to the rounding of other batches."""
    fused, n = weights([(16, 8)])[0], 8
    blocks = fused.detach().clone().view(groups, -1, n)
    ends = [sum(rows[: i + 1]) for i in range(len(rows))]
    parts = [nn.Parameter(blocks[:, e - r : e].reshape(-1, n).clone()) for e, r in zip(ends, rows, strict=True)]
    set_cut(fused, groups, rows)
    one, many = method([fused], lr=1e-2), method(parts, lr=1e-2)
    draw = torch.Generator().manual_seed(3)
    for _ in range(12):
        fused.grad = torch.randn(fused.shape, generator=draw)
        cut = fused.grad.view(groups, -1, n)
        for p, e, r in zip(parts, ends, rows, strict=True):
            p.grad = cut[:, e - r : e].reshape(-1, n).clone()
        one.step()
        many.step()
    for p, matrix in zip(parts, piece_of(fused).matrices(), strict=True):
        assert matrix.shape == tuple(p.shape)
        torch.testing.assert_close(
            matrix.of(fused.detach().view(-1)).reshape(p.shape), p.detach(), atol=1e-5, rtol=1e-4
        )


def test_a_cut_that_does_not_fit_is_refused():
    (p,) = weights([(16, 8)])
    with pytest.raises(ValueError, match=r"shape \(16, 8\) is said to be 2 groups of 4 \+ 2 rows, which are 12"):
        set_cut(p, 2, (4, 2))


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"ns_steps": 0}, "ns_steps is 0: it must be a whole number, 1 or more"),
        ({"scale_mode": "spectrl"}, "scale_mode is 'spectrl'"),
        ({"look_ahead": -1}, r"look_ahead is -1: it must be in \[0, 1\]"),
        ({"momentum": 1.0}, r"momentum is 1.0: it must be in \[0, 1\)"),
    ],
)
def test_bad_values_are_refused(given, match):
    with pytest.raises(ValueError, match=match):
        DelayAwareMuon(weights(), **given)


def test_operations_are_the_formulas():
    """Of the products one by one."""
    m, n = 768, 3072
    assert newton_schulz(m, n) == newton_schulz(n, m) == 5 * (2 * m * m * n + 2 * m**3 + 2 * m * m * n)


def test_what_it_says_of_itself():
    optimizer = DelayAwareMuon(weights([(4, 4), (4, 6), (4,)]), look_ahead=0.5)
    said = "DelayAwareMuon on 2 parameters here, PipeDreamAdamW on 1 parameters here"
    assert optimizer.about([0.0, 0.0]) == said
    assert optimizer.about([2.0, 1.0, 0.0]) == f"{said}, looking ahead by stage [0.75, 0.5, 0.0] updates"
