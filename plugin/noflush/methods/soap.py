"""`DelayAwareSOAP`: Adam in the basis in which a matrix's gradients are least correlated ("basis rotation")."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from noflush.methods.matrices import Shape, by_shape
from noflush.methods.method import Method, Place
from noflush.methods.optimizer import DelayAwareOptimizer

_SIDES = {"row_covariance": 0, "row_basis": 0, "col_covariance": 1, "col_basis": 1}


class Hyper(NamedTuple):
    """Hyper-parameters of one group at one stage; ``refresh_every`` is this stage's own."""

    lr: float
    beta1: float
    beta2: float
    shampoo_beta: float
    eps: float
    weight_decay: float
    refresh_every: int
    estimate: str


class Coefficients(NamedTuple):
    """What `rule` multiplies with.

    Attributes:
        gradient: factor of every gradient (unscale times clip).
        decay: 1 - lr * weight_decay.
        average: 1 - beta1, the weight of the gradient in the first moment.
        beta2: of the second moment, in the rotated basis.
        shampoo_beta: of the two covariances.
        eps: added to the denominator.
        step: -lr sqrt(1 - beta2^t) / (1 - beta1^t), t counted from the second update; 0 in the first.
        refresh: whether the basis is found anew in this update.
        estimate: what the basis is found from: the covariances of gradients (``second`` moments), or those of the first
            moment alone, as it is now.
        first: whether it is the first update, which finds a basis and moves nothing, as SOAP's own code has it: in the
            basis of one gradient all of that gradient but its diagonal is rounding, which Adam would blow up.
    """

    gradient: float
    decay: float
    average: float
    beta2: float
    shampoo_beta: float
    eps: float
    step: float
    refresh: bool
    estimate: str
    first: bool


def refresh_every(asked_for: int, delay: float, stages: int, by_delay: bool) -> int:
    """After how many updates a stage finds its basis anew.

    With ``by_delay`` the budget of all stages is the same, and a stage gets the more of it the larger its delay, in
    proportion to 1 + delay (arXiv 2602.03515 says to do so and gives no formula; delays fall evenly from P - 1 to 0).
    """
    if not by_delay:
        return asked_for
    mean = (stages + 1) / 2
    return max(1, round(asked_for * mean / (1 + delay)))


def hyper(group: Mapping[str, Any], place: Place) -> Hyper:
    """`Method.hyper`."""
    beta1, beta2 = group["betas"]
    every = refresh_every(group["refresh_every"], place.delay, place.stages, group["refresh_by_delay"])
    return Hyper(
        float(group["lr"]),
        beta1,
        beta2,
        group["shampoo_beta"],
        group["eps"],
        group["weight_decay"],
        every,
        group["estimate"],
    )


def coefficients(h: Hyper, step: float, product: float, gradient: float) -> Coefficients:
    """`Method.coefficients`."""
    first, counted = step == 1, max(1.0, step - 1)
    return Coefficients(
        gradient=gradient,
        decay=1.0 if first else 1 - h.lr * h.weight_decay,
        average=1 - h.beta1,
        beta2=h.beta2,
        shampoo_beta=h.shampoo_beta,
        eps=h.eps,
        step=0.0 if first else -h.lr * (1 - h.beta2**counted) ** 0.5 / (1 - h.beta1**counted),
        refresh=int(step) % h.refresh_every == 0,
        estimate=h.estimate,
        first=first,
    )


def state_shape(name: str, shape: Shape, group: Mapping[str, Any]) -> Shape:
    """`Method.state_shape`: covariance and basis of the rows [m, m], of the columns [n, n]."""
    if name not in _SIDES:
        return shape
    size = 0 if "covariance" in name and group["estimate"] == "first" else shape[_SIDES[name]]
    return size, size


def rule(
    gradients: Sequence[Tensor],
    weights: Sequence[Tensor],
    targets: Sequence[Tensor],
    states: Sequence[tuple[Tensor, ...]],
    sliced: Sequence[int | None],
    c: Coefficients,
    master: bool,
    seed: Any = 0,
) -> None:
    """`Method.rule`; of each matrix ``states`` has what the row in `table` names, in its order."""
    scaled = [g.to(w.dtype) * c.gradient for g, w in zip(gradients, weights, strict=True)]
    for places, g in by_shape(scaled):
        mine = [states[i] for i in places]
        m, v = (_stacked([state[k] for state in mine], g) for k in (0, 1))
        averaged = m.lerp(g, c.average)
        bases = []
        for side in (0, 1):
            covariances, known = ([state[k + side] for state in mine] for k in (2, 4))
            basis, order = _basis(averaged if c.estimate == "first" else g, side, covariances, known, c)
            bases.append(basis)
            if order is not None:
                v = v.gather(side - 2, order.unsqueeze(-1 - side).expand_as(v))
        left, right = bases
        if not c.first:
            m = averaged
            v.mul_(c.beta2).add_((left.mT @ g @ right).square_(), alpha=1 - c.beta2)
        step = left @ ((left.mT @ m @ right) / (v.sqrt() + c.eps)) @ right.mT
        for place, *kept in zip(places, m, v, step, strict=True):
            for t, value in zip(states[place], kept[:2], strict=False):
                t.copy_(value.view(t.shape))
            w, target = weights[place], targets[place]
            new = w if master else target
            new.copy_(w * c.decay)
            new.add_(kept[-1].view(w.shape), alpha=c.step)
            if master:
                target.copy_(new)


def _basis(
    of: Tensor, side: int, covariances: Sequence[Tensor], known: Sequence[Tensor], c: Coefficients
) -> tuple[Tensor, Tensor | None]:
    """The basis of a side (0: rows) of matrices ``of``, [how many, m, n], kept in ``known``; its new order, if any.

    Of second moments ``covariances`` are moved on; of the first moment the covariance is its product with itself.
    """
    of = of if side == 0 else of.mT
    basis, order = _stacked(known, of), None
    if c.estimate == "second":
        covariance = _stacked(covariances, of).lerp_(of @ of.mT, 1 - c.shampoo_beta)
        _keep(covariance, covariances)
    elif c.first or c.refresh:
        covariance = of @ of.mT
    if c.first:
        basis = _eigenvectors(covariance)
    elif c.refresh:
        basis, order = _refreshed(covariance, basis)
    _keep(basis, known)
    return basis, order


def _keep(stacked: Tensor, into: Sequence[Tensor]) -> None:
    for value, t in zip(stacked, into, strict=True):
        t.copy_(value.view(t.shape))


def _stacked(tensors: Sequence[Tensor], like: Tensor) -> Tensor:
    return torch.stack([t.reshape(-1, t.shape[-1]) for t in tensors]).to(like.dtype)


def _eigenvectors(covariance: Tensor) -> Tensor:
    """Columns in the order of falling eigenvalues."""
    vectors: Tensor = torch.linalg.eigh(covariance)[1].flip(-1)
    return vectors


def _refreshed(covariance: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """One step of power iteration from ``basis``; and the new order of its columns, [how many, n]."""
    values = (basis * (covariance @ basis)).sum(-2)
    order = values.argsort(dim=-1, descending=True, stable=True)
    ordered = basis.gather(-1, order.unsqueeze(-2).expand_as(basis))
    q: Tensor = torch.linalg.qr(covariance @ ordered)[0]
    return q, order


class DelayAwareSOAP(DelayAwareOptimizer):
    r"""SOAP ("basis rotation"), made for deep pipelines' delays, for hidden matrices, and AdamW for the rest.

    Vyas et al., "SOAP" (arXiv 2409.11321), in the form of Jung, Shin and Lee, "basis rotation" (arXiv 2602.03515,
    second moments, bilateral): the first moment stays in the original basis, the second is kept in the rotated one, and
    is put in the new order of columns, no more, when the basis is found anew. For a gradient :math:`G` [m, n]:

    .. math::
        L \leftarrow \beta L + (1-\beta) G G^T, \quad R \leftarrow \beta R + (1-\beta) G^T G, \quad
        z \leftarrow (1 - \eta\lambda) z - \eta\, U \frac{\hat M_{UV}}{\sqrt{\hat v_{UV}} + \epsilon} V^T

    with :math:`U, V` the eigenvectors of :math:`L, R`: in full at first, then by one step of power iteration every
    ``refresh_every`` updates. Keeps :math:`2 (m^2 + n^2)` numbers a matrix beside its two moments, with
    ``estimate="first"`` half as many.

    What a matrix is, and what updates the rest, is as in `DelayAwareMuon`. Its row in `table` has defaults and ranges.

    Args:
        params: parameters or groups; dense, float32 (their masters, in mixed precision).
        lr: learning rate of matrices and the rest.
        betas: (beta1, beta2), of the rest too.
        shampoo_beta: beta of the two covariances.
        eps: added to the denominator, of the rest too.
        weight_decay: lambda, decoupled.
        refresh_every: updates after which the basis is found anew.
        estimate: the basis is that of the covariances above, or with ``first`` that of :math:`M M^T` and
            :math:`M^T M` of the first moment as it is then, which keeps no covariance. (The authors' first-moment form
            turns each side by the other one's basis; a power iteration of its own is this project's.)
        refresh_by_delay: more often where the delay is larger, at equal cost for all stages together.
        look_ahead: how far forwards look ahead (`methods.look_ahead`).

    Raises:
        ValueError: a value outside its range.
        TypeError: a parameter that it does not have.
    """

    METHOD = Method("DelayAwareSOAP", hyper, coefficients, rule, state_shape=state_shape)
