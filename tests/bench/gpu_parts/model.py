"""The model of the runs that are compared with the delay simulator, its data, and the simulator's losses."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from noflush.demo.gpt import gpt_layers, next_token_loss, split_by_blocks
from noflush.methods import DelayAwareNAdamW
from noflush.order.schedule import Schedule
from noflush.simulate import DelaySimulator

GAS = 4
OPTIMIZER = {"lr": 1e-3, "betas": (0.99, 0.999), "weight_decay": 0.01}


@dataclass(frozen=True)
class Size:
    """Of the model, of a micro-batch, and how many calls are made."""

    calls: int
    vocabulary: int
    sequence: int
    width: int
    heads: int
    depth: int
    batch: int


def stages_of(asked, dry):
    """How many stages are run: in a rehearsal half as many as asked for, so that two cores suffice."""
    return min(asked, max(2, asked // 2)) if dry else asked


def size(stages, dry):
    """One block a stage at least; 50 calls, or few in a rehearsal."""
    if dry:
        return Size(4, 32, 12, 16, 2, stages, 3)
    return Size(50, 256, 128, 256, 4, max(stages, 4), 4)


def layers(of):
    """The same weights in every process."""
    torch.manual_seed(7)
    return gpt_layers(of.vocabulary, of.sequence, of.width, of.heads, of.depth)


def data(of):
    """Every micro-batch of the run: (tokens, labels), on the CPU."""
    draw = torch.Generator().manual_seed(1)
    shape = (2, of.batch, of.sequence)
    return [tuple(torch.randint(0, of.vocabulary, shape, generator=draw)) for _ in range(of.calls * GAS)]


def optimizer(parameters):
    """A stage's optimizer."""
    return DelayAwareNAdamW(parameters, **OPTIMIZER)


def simulated_losses(stages, of, device):
    """The loss of every micro-batch, by the delay simulator on ``device``."""
    parts = [part.to(device) for part in split_by_blocks(layers(of), stages)]
    simulator = DelaySimulator(parts, next_token_loss, optimizer, Schedule(stages, GAS))
    losses = [simulator.train_micro_batch(*(t.to(device) for t in batch)) for batch in data(of)]
    return torch.stack(losses).tolist()


def difference(losses, simulated):
    """The largest difference of two lists of losses; nan if they are not equally long or one is not finite."""
    if len(losses) != len(simulated):
        return float("nan")
    return (torch.tensor(losses) - torch.tensor(simulated)).abs().max().item()


CLOSE = {"cpu": 0.0, "cuda": 1e-3}
"""How far losses may be from the simulator's. At 4 stages, over 50 calls, a rounding in every weight (1e-7) makes a
difference of 1e-6, one micro-batch more in flight 0.012, and the flush 0.04."""


def row_of(ranks, simulated, device, calls):
    """The part's row from its ranks' objects, and what is wrong with it: times of the slowest, the rest by rank."""
    losses = ranks[-1]["losses"]
    row = {}
    for key in ranks[0]:
        values = [rank[key] for rank in ranks]
        if key != "losses":
            row[key] = max(values) if key.startswith("ms_") or key == "construction_s" else values
    row |= {"loss": losses[-1], "max_loss_difference_from_simulator": difference(losses, simulated)}
    wrong = []
    if not row["max_loss_difference_from_simulator"] <= CLOSE[device.type]:
        wrong.append("losses are not the simulator's")
    if set(row["updates"]) != {calls}:
        wrong.append(f"{calls} calls made {row['updates']} updates")
    return row, wrong
