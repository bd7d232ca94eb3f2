"""The norm of a stage's gradients in torch, or through NVIDIA's apex where that is really installed."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def gradient_norm(gradients: Sequence[Tensor]) -> Tensor:
    """2-norm over all tensors: 0-dim float32 on their device; inf or nan if any element is.

    The norm of the tensors' norms, as `torch.nn.utils.clip_grad_norm_` finds it, bit for bit in float32. Gradients
    of lower precision are summed in float32.
    """
    if not gradients:
        return torch.zeros(())
    norms = [n.float() for n in torch._foreach_norm(list(gradients), 2.0, dtype=torch.float32)]
    total: Tensor = torch.linalg.vector_norm(torch.stack(norms), 2.0)
    return total


def apex_norm() -> Callable[[Sequence[Tensor]], Tensor] | None:
    """apex's multi-tensor 2-norm, or None.

    PyPI's ``apex`` is another project (a toolkit for Pyramid), and a Python-only build of NVIDIA's lacks the CUDA
    extension: only the extension module together with its applier proves the real one.
    """
    try:
        extension: Any = importlib.import_module("amp_C")
        applier: Any = importlib.import_module("apex.multi_tensor_apply").multi_tensor_applier
        kernel = extension.multi_tensor_l2norm
    except (ImportError, AttributeError):
        return None

    def norm(gradients: Sequence[Tensor]) -> Tensor:
        if not gradients:
            return torch.zeros(())
        overflow = torch.zeros(1, dtype=torch.int32, device=gradients[0].device)
        total: Tensor = applier(kernel, overflow, [list(gradients)], False)[0]
        return total.reshape(())

    return norm
