"""Every optimizer that DeepSpeed 0.19.8 can build, and whether it is exact under noflush. Pure.

`TorchUpdate` copies the newest weights into the next version's slot and has the optimizer step there; ZeRO-1, bf16 and
fp16 hand it flat tensors, shards of many parameters in a row. What was tried equals the delay simulator bit for bit
(`tests/multiproc/test_host_optimizers.py`, float32 and float32 with ZeRO-1); what is inexact is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["exact", "refused", "not tried"]


@dataclass(frozen=True)
class HostOptimizer:
    """An optimizer by the name that ``optimizer.type`` gives it.

    Attributes:
        plain: with float32 weights and no ZeRO.
        flat: with ZeRO-1, bf16 or fp16.
        why: what is to be known, in half a sentence; of a refusal its reason and the fix.
    """

    plain: Verdict = "exact"
    flat: Verdict = "exact"
    why: str = ""


_NEEDS_GPU = "DeepSpeed builds it for GPUs alone"
_BY_MATRIX = (
    "it treats each matrix as a whole, and DeepSpeed's {} hands it flat pieces of many, for which it would be another "
    "method; train in float32 without ZeRO, or choose an element-wise one such as DelayAwareNAdamW or AdamW"
)

HOST_OPTIMIZERS = {
    "Adam": HostOptimizer(why='"torch_adam": true was tried; without it DeepSpeed compiles its own, which was not'),
    "AdamW": HostOptimizer(why='"torch_adam": true was tried; without it DeepSpeed compiles its own, which was not'),
    **{
        name: HostOptimizer()
        for name in ("SGD", "NAdam", "RAdam", "Adamax", "Adagrad", "Adadelta", "RMSprop", "Rprop", "ASGD")
    },
    "MuSGD": HostOptimizer(why="with the package mup"),
    "MuAdam": HostOptimizer(why="with the package mup"),
    "MuAdamW": HostOptimizer(why="with the package mup"),
    "Lion": HostOptimizer("not tried", "not tried", why=_NEEDS_GPU),
    "Adafactor": HostOptimizer(flat="refused", why=_BY_MATRIX),
    "Lamb": HostOptimizer("not tried", "refused", why=_BY_MATRIX),
    "Muon": HostOptimizer(why="it becomes DelayAwareMuon with DeepSpeed's settings (muon_section)"),
    "SparseAdam": HostOptimizer(
        "refused",
        "refused",
        why="it takes sparse gradients alone, and a stage has dense ones too; choose Adam",
    ),
    "LBFGS": HostOptimizer(
        "refused",
        "refused",
        why="it evaluates the loss several times a step, which a pipeline cannot do; choose DelayAwareNAdamW, AdamW or "
        "another one-gradient method",
    ),
}


def refusal(name: str | None, flattened_by: str | None) -> str | None:
    """Why ``optimizer.type`` ``name`` is refused, in half a sentence; None if it is not, or is nobody's known here.

    ``flattened_by``: what hands the optimizer flat tensors ("ZeRO-1", "bf16", "fp16"); None: nothing.
    """
    # DeepSpeed takes its own names in any case; torch's as they are.
    by_lower = {known.lower(): optimizer for known, optimizer in HOST_OPTIMIZERS.items()}
    found = by_lower.get(str(name).lower())
    if found is None or (found.flat if flattened_by else found.plain) != "refused":
        return None
    return found.why.format(flattened_by)


def refusal_of_class(name: str, flattened_by: str | None) -> str | None:
    """As `refusal`, of an optimizer that a script passes, by its class: what sees whole matrices cannot be had flat."""
    sees_matrices = any(known in name.lower() for known in ("muon", "soap", "shampoo", "adafactor", "lamb"))
    return _BY_MATRIX.format(flattened_by) if sees_matrices and flattened_by else None
