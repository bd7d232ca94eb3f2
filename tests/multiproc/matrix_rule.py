"""A throw-away rule that sees whole matrices, and has a state that lies unlike them: the seam for such rules holds it.

M <- momentum M + G,   n <- n + |M|,   W <- W - lr M / |M|
"""

from typing import Any, NamedTuple

from noflush.methods.method import Method
from noflush.methods.optimizer import DelayAwareOptimizer
from noflush.methods.ranges import fraction, not_negative
from noflush.methods.table import Row

ROW = Row(
    module="tests.multiproc.matrix_rule",
    unit="matrix",
    state=("moved", "norms"),
    params={"lr": not_negative(1e-2), "momentum": fraction(0.9), "weight_decay": not_negative(0.0)},
    flops=lambda rows, columns, group: float(rows) ** 2,
)


class Hyper(NamedTuple):
    lr: float
    momentum: float


class Coefficients(NamedTuple):
    gradient: Any
    lr: Any
    momentum: Any


def rule(gradients, weights, targets, states, sliced, c, master, seed):
    for gradient, w, target, (moved, norms) in zip(gradients, weights, targets, states, strict=True):
        moved.mul_(c.momentum).add_(gradient.to(w.dtype) * c.gradient)
        norm = moved.norm()
        norms += norm
        new = w - moved * (c.lr / (norm + 1e-12))
        (w if master else target).copy_(new)
        if master:
            target.copy_(new)


class MatrixRule(DelayAwareOptimizer):
    METHOD = Method(
        "MatrixRule",
        lambda group, place: Hyper(float(group["lr"]), group["momentum"]),
        lambda h, step, product, gradient: Coefficients(gradient, h.lr, h.momentum),
        rule,
        state_shape=lambda name, shape, group: (1,) if name == "norms" else shape,
    )
