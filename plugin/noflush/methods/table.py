"""Every update rule of noflush's by the name that ``optimizer.type`` gives it: one row and one file each. Pure.

A row is what may be known of a method without torch: whether it sees elements or matrices, what state it keeps, its
hyper-parameters and their ranges. Its file (`load` imports it) has the arithmetic. Nothing else in the project names a
method: the config checks a section against its row, the optimizer takes its defaults from it, the kernels run what the
file defines.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from noflush.methods.flops import basis_rotation, newton_schulz
from noflush.methods.look_ahead import LOOK_AHEAD
from noflush.methods.ranges import Param, flag, fraction, fractions, not_negative, one_of, whole

if TYPE_CHECKING:
    from noflush.methods.optimizer import DelayAwareOptimizer

Unit = Literal["element", "matrix"]
STAGE_MOMENTUM = 0.99
"""What Eq 13's momentum rises towards, the more stages follow."""


def _no_more(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    return iter(())


@dataclass(frozen=True)
class Row:
    """What is known of a method before torch is.

    Attributes:
        module: the file with its arithmetic, where a class of the row's name is the optimizer.
        unit: what one application of the rule sees: an ``element``, wherever it lies, or a whole ``matrix``.
        state: names of its state, a value an element unless its file says otherwise.
        params: its hyper-parameters, to which every method's ``look_ahead`` is added.
        product: name of a running product over its updates that is state too; or None.
        triton: whether its file has the rule for the fused Triton kernel too. Else it runs in torch on a GPU.
        rest: of a method of matrices: what updates parameters that are none, with the hyper-parameters of the same
            names; None: it takes them all for matrices.
        flops: of a method of matrices: ``flops(rows, columns, group)`` of an update of one, by the hyper-parameters of
            its group; None: it waits for memory.
        state_numbers: likewise, how many numbers of state one has; None: one an element and name.
        together: what values, each in its range, may not be together: (parameter, "it must be" what).
        fixed: what else stands in a parameter group, for other optimizers that may load it.
    """

    module: str
    unit: Unit
    state: tuple[str, ...]
    params: Mapping[str, Param]
    product: str | None = None
    triton: bool = False
    rest: str | None = None
    flops: Callable[[int, int, Mapping[str, Any]], float] | None = None
    state_numbers: Callable[[int, int, Mapping[str, Any]], int] | None = None
    together: Callable[[Mapping[str, Any]], Iterator[tuple[str, str]]] = _no_more
    fixed: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "params", {**self.params, "look_ahead": LOOK_AHEAD})

    def numbers_kept(self, rows: int, columns: int, group: Mapping[str, Any]) -> int:
        """How many numbers of state a matrix has."""
        each = len(self.state) * rows * columns
        return each if self.state_numbers is None else self.state_numbers(rows, columns, group)

    def values(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """``given`` with the defaults of all that it leaves out; lists, as JSON has them, as tuples."""
        values = {name: given.get(name, param.default) for name, param in self.params.items()}
        return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}

    def faults(self, given: Mapping[str, Any]) -> list[str]:
        """What is wrong with ``given`` hyper-parameters, a line each: unknown ones, values out of range."""
        faults = [
            f"{name} is not a parameter of it: they are {', '.join(self.params)}"
            for name in given
            if name not in self.params
        ]
        values = self.values(given)
        wrong = [name for name, value in values.items() if not self.params[name].holds(value)]
        faults += [f"{name} is {values[name]!r}: it must be {self.params[name].rule}" for name in wrong]
        if not wrong:
            faults += [f"{name} is {values[name]!r}: it must be {rule}" for name, rule in self.together(values)]
        return faults


def _rises(name: str, base: Callable[[Mapping[str, Any]], float]) -> Callable[..., Iterator[tuple[str, str]]]:
    """Of Eq 13's stage momentum: only from below can it rise."""

    def together(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        if values["stage_momentum"] and base(values) >= STAGE_MOMENTUM:
            yield (
                "stage_momentum",
                f"left out, or {name} below {STAGE_MOMENTUM} (the paper's is 0.9): it raises {name}, which is "
                f"{base(values)!r}, towards {STAGE_MOMENTUM}",
            )

    return together


METHODS: dict[str, Row] = {
    "DelayAwareNAdamW": Row(
        module="noflush.methods.nadamw",
        unit="element",
        state=("exp_avg", "exp_avg_sq"),
        params={
            "lr": not_negative(2e-3),
            "betas": fractions(0.99, 0.999),
            "eps": not_negative(1e-8),
            "weight_decay": not_negative(0.0),
            "momentum_decay": not_negative(4e-3),
            "momentum_schedule": one_of("nadam", "constant"),
            "stage_momentum": flag(False),
            "lr_discount_steps": whole(0),
            "moments": one_of("fp32", "bf16"),
        },
        product="mu_product",
        triton=True,
        together=_rises("betas[0]", lambda values: float(values["betas"][0])),
        fixed={"decoupled_weight_decay": True},  # for torch.optim.NAdam, should it load this state
    ),
    "DelayAwareNAG": Row(
        module="noflush.methods.nag",
        unit="element",
        state=("weight",),
        params={
            "lr": not_negative(1e-2),
            "momentum": fraction(0.99),
            "weight_decay": not_negative(0.0),
            "momentum_schedule": one_of("constant", "theorem"),
            "stage_momentum": flag(False),
            "lr_discount_steps": whole(0),
        },
        triton=True,
        together=_rises("momentum", lambda values: float(values["momentum"])),
    ),
    "DelayAwareMuon": Row(
        module="noflush.methods.muon",
        unit="matrix",
        state=("momentum_buffer",),
        params={
            "lr": not_negative(3e-3),
            "momentum": fraction(0.9),
            "weight_decay": not_negative(1e-2),
            "nesterov": flag(True),
            "ns_steps": whole(5, least=1),
            "scale_mode": one_of("spectral", "unit_rms_norm", "shape_scaling"),
            "extra_scale_factor": not_negative(0.2),
            "tensor_parallel": one_of("blockwise", "gathered"),
            "betas": fractions(0.9, 0.999),
            "eps": not_negative(1e-8),
        },
        rest="PipeDreamAdamW",
        flops=lambda rows, columns, group: newton_schulz(rows, columns, group["ns_steps"]),
    ),
    "DelayAwareSOAP": Row(
        module="noflush.methods.soap",
        unit="matrix",
        state=("exp_avg", "exp_avg_sq", "row_covariance", "col_covariance", "row_basis", "col_basis"),
        params={
            "lr": not_negative(1e-3),
            "betas": fractions(0.9, 0.999),
            "shampoo_beta": fraction(0.999),
            "eps": not_negative(1e-8),
            "weight_decay": not_negative(1e-2),
            "refresh_every": whole(10, least=1),
            "refresh_by_delay": flag(False),
            "estimate": one_of("second", "first"),
        },
        rest="PipeDreamAdamW",
        flops=basis_rotation,
        state_numbers=lambda rows, columns, group: (
            2 * rows * columns + (1 if group["estimate"] == "first" else 2) * (rows * rows + columns * columns)
        ),
    ),
    "PipeDreamAdamW": Row(
        module="noflush.methods.adamw",
        unit="element",
        state=("exp_avg", "exp_avg_sq"),
        params={
            "lr": not_negative(1e-3),
            "betas": fractions(0.9, 0.999),
            "eps": not_negative(1e-8),
            "weight_decay": not_negative(1e-2),
            "moments": one_of("fp32", "bf16"),
        },
        triton=True,
    ),
}


def load(name: str) -> type[DelayAwareOptimizer]:
    """The optimizer class of method ``name``. Raises KeyError for a name that no row has."""
    found: type[DelayAwareOptimizer] = getattr(importlib.import_module(METHODS[name].module), name)
    return found
