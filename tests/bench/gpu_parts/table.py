"""What tests/bench/gpu.py runs, as data, and when a part is not run. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

BUDGET_S = 480
"""Seconds for all parts together."""
ENDS = "NOFLUSH_BENCH_ENDS"
"""Variable that tells a part when it is killed: seconds since the epoch."""


@dataclass(frozen=True)
class Part:
    """One row of the result.

    Attributes:
        name: of the row.
        asks: the question that the row answers.
        seconds: when it is killed.
        module: of this package, run with ``arguments`` (and ``--dry``).
        packages: that it imports beside torch and numpy.
        devices: GPUs that it needs.
        environment: set for it.
    """

    name: str
    asks: str
    seconds: int
    module: str
    arguments: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    devices: int = 1
    environment: tuple[tuple[str, str], ...] = ()


_ONE_QUEUE = (("CUDA_DEVICE_MAX_CONNECTIONS", "1"),)
_KERNEL = ("triton",)
_ENGINE = ("triton", "deepspeed")
_LAUNCHER = ("triton", "deepspeed", "megatron.core")
_SMALL = ("--model", "bf16", "--gradient", "bf16", "--moments", "bf16")

# What takes one process comes first, and eight processes last: what hangs costs the parts behind it their time.
PARTS = (
    Part("machine", "on what, and by which versions", 60, "machine", devices=0),
    Part("update-steady", "does an update wait, allocate, or resist a graph", 45, "steady", (), _KERNEL),
    Part("update-fp32", "bandwidth of the update, float32", 45, "bandwidth", (), _KERNEL),
    Part("update-bf16", "the same, bf16 weights", 45, "bandwidth", ("--model", "bf16"), _KERNEL),
    Part("update-bf16-moments", "the same, all but masters in bf16", 45, "bandwidth", _SMALL, _KERNEL),
    Part("matrices-768", "an update of a layer's matrices, 134 M", 30, "matrices", ("--hidden", "768"), _KERNEL),
    Part("matrices-2048", "the same, 1.3 B", 45, "matrices", ("--hidden", "2048"), _KERNEL),
    Part("engine-1", "where a steady call of the engine waits", 60, "engine", ("--stages", "1"), _ENGINE),
    Part("megatron-bf16", "tokens a second and memory at 134 M", 60, "megatron", ("--bf16",), _LAUNCHER),
    Part("megatron-fp32", "the same in float32", 60, "megatron", (), _LAUNCHER),
    Part("sharing", "by which way two ranks of NCCL can share a GPU", 75, "sharing"),
    Part("stages-2", "do 50 calls of 2 stages get through", 50, "stages", ("--stages", "2"), _KERNEL),
    Part("engine-2", "the same by DeepSpeed's engine", 60, "engine", ("--stages", "2"), _ENGINE),
    Part("stages-4", "do 50 calls of 4 stages get through", 60, "stages", ("--stages", "4"), _KERNEL),
    Part("engine-4", "the same by DeepSpeed's engine", 60, "engine", ("--stages", "4"), _ENGINE),
    Part("stages-4-one-queue", "one hardware queue", 60, "stages", ("--stages", "4"), _KERNEL, environment=_ONE_QUEUE),
    Part("communicators", "memory of a communicator", 45, "communicators"),
    Part("overlap", "max_ctas and priority: 16 MB beside a matmul", 45, "overlap", devices=2),
    Part("stages-8", "do 50 calls of 8 stages get through", 90, "stages", ("--stages", "8"), _KERNEL),
    Part("engine-8", "the same by DeepSpeed's engine", 90, "engine", ("--stages", "8"), _ENGINE),
)


def lacking(part: Part, devices: int, dry: bool, installed: Callable[[str], bool]) -> str | None:
    """Why ``part`` cannot run here, as its row's status; None if it can. A rehearsal needs no GPU."""
    missing = [name for name in part.packages if not installed(name)]
    if missing:
        return f"not installed: {', '.join(missing)}"
    if not dry and devices < part.devices:
        return "needs a GPU" if part.devices == 1 else f"needs {part.devices} GPUs"
    return None


def skipped(status: str) -> bool:
    """Whether a row's status says that its part was not run, for a reason that is no fault."""
    return status.startswith(("not installed", "needs "))


def chosen(names: Sequence[str]) -> tuple[Part, ...]:
    """The parts named, and the machine's, which every row quotes; all of them for no name. Raises ValueError."""
    known: Mapping[str, Part] = {part.name: part for part in PARTS}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"--only {' '.join(unknown)}: no such part; there are {', '.join(known)}")
    return tuple(part for part in PARTS if not names or part.name in names or part is PARTS[0])
