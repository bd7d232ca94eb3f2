"""TensorBoard and Weights & Biases, under Megatron's names. Only the last rank writes."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import torch

from noflush.launch.arguments.settings import Logs, Settings


class Writers:
    """Whatever of the two was asked for."""

    def __init__(self, settings: Settings) -> None:
        logs = settings.logs
        self._board = self._run = None
        if logs.tensorboard_dir:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(log_dir=logs.tensorboard_dir, max_queue=logs.tensorboard_queue)
            self._board.add_text("settings", repr(settings))
        if logs.wandb_project:
            import wandb

            folder = logs.wandb_dir or os.path.join(settings.checkpoints.save or ".", "wandb")
            os.makedirs(folder, exist_ok=True)
            self._run = wandb.init(
                dir=folder,
                name=logs.wandb_name,
                project=logs.wandb_project,
                entity=logs.wandb_entity,
                config=dataclasses.asdict(settings),
            )

    def write(self, values: Mapping[str, float], iteration: int, samples: int) -> None:
        """Each value under its name by iteration, and under ``<name> vs samples``."""
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, iteration)
                self._board.add_scalar(f"{name} vs samples", value, samples)
        if self._run is not None:
            self._run.log(dict(values), iteration)

    def close(self) -> None:
        """Writes what is left."""
        if self._board is not None:
            self._board.close()
        if self._run is not None:
            self._run.finish()


def chosen(logs: Logs, values: Mapping[str, float | None], world: int) -> dict[str, float]:
    """Of an interval's ``values`` those that the flags ask for, and what they ask for besides."""
    switches = {
        "learning-rate": logs.learning_rate,
        "loss-scale": logs.loss_scale,
        "iteration-time": logs.timers,
        "throughput": logs.throughput,
    }
    found = {name: value for name, value in values.items() if value is not None and switches.get(name, True)}
    if logs.world_size:
        found["world-size"] = world
    if logs.memory and torch.cuda.is_available():
        found["mem-reserved-bytes"] = torch.cuda.memory_reserved()
        found["mem-allocated-bytes"] = torch.cuda.memory_allocated()
    return found


def board_needed(settings: Settings) -> list[str]:
    """What the logs asked for need and is not installed."""
    import importlib.util

    needs: dict[str, Any] = {"tensorboard": settings.logs.tensorboard_dir, "wandb": settings.logs.wandb_project}
    return [
        f"--{name}-{'dir' if name == 'tensorboard' else 'project'} needs {name}: pip install {name}"
        for name, asked in needs.items()
        if asked and importlib.util.find_spec(name) is None
    ]
