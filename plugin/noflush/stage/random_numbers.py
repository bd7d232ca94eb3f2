"""States of the random number generators that layers draw from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import nn
from torch.autograd.grad_mode import _unsafe_preserve_version_counter


class Draws(Protocol):
    """Who knows where layers draw from."""

    def random_state(self) -> Any:
        """As `stage.Work`."""

    def set_random_state(self, state: Any) -> None:
        """As `stage.Work`."""


def random_state(device: torch.device) -> dict[str, Any]:
    """torch's generators: the CPU's, and that of ``device`` if it has one. Waits for no device."""
    state: dict[str, Any] = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["device"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: dict[str, Any], device: torch.device) -> None:
    """Puts back what `random_state` gave; of a checkpoint that was written on a CPU, the CPU's alone."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "device" in state:
        torch.cuda.set_rng_state(state["device"].cpu(), device)


@contextmanager
def undisturbed(module: nn.Module, draws: Draws) -> Iterator[None]:
    """Within, ``module`` trains; afterwards its mode, its buffers and random numbers are what they were."""
    training, state = module.training, draws.random_state()
    buffers = [(buffer, buffer.detach().clone()) for buffer in module.buffers()]
    module.train()
    try:
        yield
    finally:
        module.train(training)
        draws.set_random_state(state)
        # Graphs that were made within may hold a buffer, which must not count as written to.
        with torch.no_grad(), _unsafe_preserve_version_counter(tuple(buffer for buffer, _ in buffers)):
            for buffer, was in buffers:
                buffer.copy_(was)
