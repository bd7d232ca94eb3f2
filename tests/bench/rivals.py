"""Optimizers that noflush's update is timed beside, and the memory that all of them together need."""

from __future__ import annotations

import importlib

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_PIECE = 1_000_000  # elements a parameter, as a model has them

# name -> bytes a parameter: (of its state, that a step takes beyond it). FlashAdamW keeps masters of 24 bits, and
# moments of 8 bits with their scales; a foreach step makes whole lists of temporaries.
STATE = {
    "foreach_nadam": (8.0, 12.0),
    "fused_adamw": (8.0, 0.0),
    "apex_fused_adam": (8.0, 0.0),
    "flash_adamw": (4.0, 0.0),
}
_OPTIONAL = {"apex_fused_adam": ("apex.optimizers", "FusedAdam"), "flash_adamw": ("flashoptim", "FlashAdamW")}


def bytes_held(gradient, model, moments, nag=False):
    """Bytes a parameter that everything timed holds at once, and the most that one step takes beyond it."""
    state = DTYPES[moments].itemsize * (1 if nag else 2)
    ours = DTYPES[gradient].itemsize + 4 + DTYPES[model].itemsize + state
    copy, torch_pair, flash_pair = 8, 8, 4
    held = 2 * ours + copy + torch_pair + flash_pair + sum(held for held, _ in STATE.values())
    # Eager arithmetic on whole tensors has a few temporaries of float32.
    return held, max(16.0, *(working for _, working in STATE.values()))


def fitting(numel, free, gradient, model, moments, nag=False):
    """As many of ``numel`` parameters as fit into ``free`` bytes, a tenth of which stay free."""
    held, working = bytes_held(gradient, model, moments, nag)
    return min(numel, int(0.9 * free / (held + working)))


def _parameters(n, device, dtype=torch.float32):
    sizes = [_PIECE] * (n // _PIECE) + ([n % _PIECE] if n % _PIECE else [])
    parameters = [torch.nn.Parameter(torch.randn(size, device=device, dtype=dtype)) for size in sizes]
    for p in parameters:
        p.grad = torch.randn_like(p)
    return parameters


def steps(n, device):
    """name -> a step over ``n`` parameters; and name -> why there is none."""
    parameters, found, without = _parameters(n, device), {}, {}
    found["foreach_nadam"] = torch.optim.NAdam(parameters, 3e-4, decoupled_weight_decay=True, foreach=True).step
    found["fused_adamw"] = torch.optim.AdamW(parameters, 3e-4, fused=True).step
    for name, (module, kind) in _OPTIONAL.items():
        if device.type != "cuda":
            without[name] = "needs a GPU"
            continue
        try:
            make = getattr(importlib.import_module(module), kind)
            mine = parameters if name == "apex_fused_adam" else _parameters(n, device, torch.bfloat16)
            found[name] = make(mine, lr=3e-4).step
        except ModuleNotFoundError:
            without[name] = "not installed"
        except Exception as error:  # another package's fault costs its figure, not the row
            without[name] = f"{type(error).__name__}: {error}"[:200]
    return found, without
