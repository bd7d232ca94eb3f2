"""Random numbers of a rank: seeded as Megatron's, saved and restored with checkpoints."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.activation_checkpointing import checkpointing


def seed_everything(seed: int, stage: int) -> None:
    """Seeds this rank: stages draw apart, the slices of a stage alike but for dropout within split layers."""
    seed += 100 * stage
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    # Each seeding adds the tracker's state anew.
    checkpointing.get_cuda_rng_tracker().reset()
    checkpointing.model_parallel_cuda_manual_seed(seed)


def random_state() -> dict[str, Any]:
    """What `restore` takes."""
    return {
        "random": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "device": get_accelerator().get_rng_state(),
        "tracker": checkpointing.get_cuda_rng_tracker().get_states(),
    }


def restore(state: dict[str, Any]) -> None:
    """Draws on from a state that `random_state` gave."""
    random.setstate(state["random"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    get_accelerator().set_rng_state(state["device"])
    checkpointing.get_cuda_rng_tracker().set_states(state["tracker"])
