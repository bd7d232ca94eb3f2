"""Which kernel a run uses, and why: said once, at its start."""

from __future__ import annotations

import importlib.util
import os
import shutil
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from noflush.kernels.eager import EagerKernel
    from noflush.kernels.launch import TritonKernel

# Elements a stage. Below, compiling costs more seconds than it saves in thousands of updates.
WORTH_COMPILING = 4_000_000


class KernelError(ValueError):
    """The kernel asked for cannot run here; says why and what can."""


def choose(kernel: str, device: torch.device, elements: int) -> tuple[EagerKernel | TritonKernel, str]:
    """The kernel for ``kernel`` (auto, triton, compile or torch) and the reason, for people.

    Args:
        kernel: what the user asked for.
        device: where the stage's weights live.
        elements: how many weights this rank updates.

    Raises:
        KernelError: asked for one that cannot run here.
    """
    from noflush.kernels.eager import CompiledKernel, EagerKernel

    if kernel == "torch":
        return EagerKernel(), "as configured"
    if kernel == "compile":
        if device.type == "cpu" and not cpu_compiler():
            raise KernelError(
                "kernel 'compile' needs a C++ compiler for the CPU, and neither $CXX, g++ nor clang++ was found: "
                "install one, or use kernel 'torch'"
            )
        return CompiledKernel(), "as configured"
    lacking = _triton_lacks(device)
    if kernel == "triton":
        if lacking:
            raise KernelError(f"kernel 'triton' cannot run here: {lacking}; use 'compile', 'torch' or 'auto'")
        return _triton(device), "as configured"
    if device.type != "cpu":
        return (EagerKernel(), f"no Triton: {lacking}") if lacking else (_triton(device), "the fused kernel for GPUs")
    if elements < WORTH_COMPILING:
        return EagerKernel(), f"{elements:,} weights on a CPU: not worth compiling for"
    if not cpu_compiler():
        return EagerKernel(), "no C++ compiler found to compile with"
    return CompiledKernel(), f"{elements:,} weights on a CPU: torch.compile"


def _triton(device: torch.device) -> TritonKernel:
    from noflush.kernels.launch import TritonKernel

    return TritonKernel(device)


def _triton_lacks(device: torch.device) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "its kernels need a GPU (on a CPU only Triton's interpreter runs them: TRITON_INTERPRET=1, for tests)"
    return None


def cpu_compiler() -> bool:
    """Whether there is a C++ compiler for `torch.compile` to use on a CPU."""
    named = os.environ.get("CXX")
    return any(shutil.which(c) for c in ([named] if named else []) + ["g++", "clang++"])
