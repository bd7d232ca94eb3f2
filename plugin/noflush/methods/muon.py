"""`DelayAwareMuon`: momentum whose matrices are orthogonalized, which a delay harms less than any rule of elements."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from noflush.methods.matrices import Gather
from noflush.methods.method import Method, Place
from noflush.methods.newton_schulz import orthogonalized, orthogonalized_whole
from noflush.methods.optimizer import DelayAwareOptimizer


class Hyper(NamedTuple):
    """Hyper-parameters of one group, as the optimizer takes them, and what `Coefficients` says of slices."""

    lr: float
    momentum: float
    weight_decay: float
    nesterov: bool
    ns_steps: int
    scale_mode: str
    extra_scale_factor: float
    slices: Gather | None
    slice_count: int


class Coefficients(NamedTuple):
    """What `rule` multiplies with.

    Attributes:
        gradient: factor of every gradient (unscale times clip).
        decay: 1 - lr * weight_decay.
        average: 1 - momentum, the weight of the gradient in the momentum.
        of_momentum: the weight of the momentum in the direction: ``momentum`` with Nesterov's, else 1.
        step: lr times the extra factor.
        ns_steps, scale_mode: as the optimizer takes them.
        slices: the ranks to put a sliced matrix together with; None: each orthogonalizes its own slice.
        slice_count: into how many a sliced matrix is cut.
    """

    gradient: Any
    decay: Any
    average: Any
    of_momentum: float
    step: Any
    ns_steps: int
    scale_mode: str
    slices: Gather | None
    slice_count: int


def hyper(group: Mapping[str, Any], place: Place) -> Hyper:
    """`Method.hyper`."""
    return Hyper(
        float(group["lr"]),
        group["momentum"],
        group["weight_decay"],
        group["nesterov"],
        group["ns_steps"],
        group["scale_mode"],
        group["extra_scale_factor"],
        place.slices if group["tensor_parallel"] == "gathered" else None,
        1 if place.slices is None else place.slices.size,
    )


def coefficients(h: Hyper, step: float, product: float, gradient: float) -> Coefficients:
    """`Method.coefficients`."""
    return Coefficients(
        gradient=gradient,
        decay=1 - h.lr * h.weight_decay,
        average=1 - h.momentum,
        of_momentum=h.momentum if h.nesterov else 1.0,
        step=h.lr * h.extra_scale_factor,
        ns_steps=h.ns_steps,
        scale_mode=h.scale_mode,
        slices=h.slices,
        slice_count=h.slice_count,
    )


def still(c: Coefficients) -> Coefficients:
    """`Method.still`."""
    return c._replace(decay=1.0, average=0.0, step=0.0)


def scale(mode: str, rows: int, columns: int) -> float:
    """What the step of a matrix is multiplied by for its shape; the modes' names are megatron-core's."""
    if mode == "spectral":
        return float(max(rows, columns) ** 0.5)
    ratio = rows / columns
    return float(ratio**0.5 if mode == "unit_rms_norm" else max(1.0, ratio) ** 0.5)


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
    """`Method.rule`; of each matrix ``states`` has (momentum_buffer,)."""
    directions = []
    for gradient, w, (moved,) in zip(gradients, weights, states, strict=True):
        g = gradient.to(w.dtype) * c.gradient
        moved.lerp_(g, c.average)
        directions.append(g.lerp_(moved, c.of_momentum) if c.of_momentum < 1 else moved)
    if c.slices is None:
        steps = orthogonalized(directions, c.ns_steps)
    else:
        steps = orthogonalized_whole(directions, sliced, c.ns_steps, c.slices)
    for w, target, step, cut in zip(weights, targets, steps, sliced, strict=True):
        # Of the whole matrix, also where each slice is orthogonalized by itself.
        rows = step.shape[:-1].numel() * (c.slice_count if cut == 0 else 1)
        columns = step.shape[-1] * (c.slice_count if cut == 1 else 1)
        new = w if master else target
        new.copy_(w * c.decay - step.to(w.dtype) * (c.step * scale(c.scale_mode, rows, columns)))
        if master:
            target.copy_(new)


class DelayAwareMuon(DelayAwareOptimizer):
    r"""Muon with decoupled weight decay for hidden matrices, and AdamW for the rest, both with a look-ahead.

    Jordan et al. (2024), scaled as in Liu et al., "Muon is scalable for LLM training" (arXiv 2502.16982), so that
    AdamW's learning rate fits both. For weights :math:`z`, gradient :math:`G` and momentum :math:`M`:

    .. math::
        M \leftarrow \mu M + (1-\mu) G, \quad X = (1-\mu) G + \mu M, \quad
        z \leftarrow z - \eta (s \sqrt{\max(m, n)}\, \mathrm{NS}(X) + \lambda z)

    Under a delay its updates, all of one size and turning slowly, still fit when they arrive late (arXiv 2606.30634);
    ``look_ahead`` has forwards compute with the weights as they are likely to be by then. At equal settings it is
    ``torch.optim.Muon``'s to the rounding of Newton-Schulz, which that does in bfloat16.

    A parameter is a matrix that has two dimensions and is neither embedding nor output layer (`matrices.is_matrix`);
    fused ones are cut into the matrices they are (`matrices.Cut`). `PipeDreamAdamW` updates the others, with ``betas``
    and ``eps``. Its row in `table` has defaults and ranges.

    Args:
        params: parameters or groups; dense, float32 (their masters, in mixed precision).
        lr: learning rate of matrices and the rest.
        momentum: mu.
        weight_decay: lambda, decoupled.
        nesterov: the direction is X as above, or M itself.
        ns_steps: of Newton-Schulz.
        scale_mode: how a matrix's shape scales its step: ``spectral`` as above, ``unit_rms_norm`` for
            :math:`\sqrt{m/n}`, ``shape_scaling`` for :math:`\sqrt{\max(1, m/n)}`.
        extra_scale_factor: s, a factor of every matrix's step.
        tensor_parallel: of matrices that tensor parallelism has cut: ``blockwise`` orthogonalizes each slice by itself,
            which costs no message (as MuonBP, arXiv 2510.16981, between its full steps); ``gathered`` puts the momentum
            together on every rank first, which is exact, and costs an all-gather of it and the work a rank.
        betas, eps: of the rest.
        look_ahead: how far forwards look ahead (`methods.look_ahead`).

    Raises:
        ValueError: a value outside its range.
        TypeError: a parameter that it does not have.
    """

    METHOD = Method("DelayAwareMuon", hyper, coefficients, rule, still=still)
