"""Micro-batches for the pipeline, out of a dataset: an endless iterator that knows where it stands."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from noflush.launch.data.order import SampleOrder
from noflush.launch.signals import leave_to_parent

MicroBatch = tuple[tuple[Tensor, ...], tuple[Tensor, Tensor]]


def as_micro_batch(sample: dict[str, Tensor]) -> MicroBatch:
    """What the pipeline's layers and loss take: ((tokens, positions[, mask]), (labels, loss mask))."""
    inputs = [sample["tokens"], sample["position_ids"]]
    if "attention_mask" in sample:
        inputs.append(sample["attention_mask"])
    return tuple(inputs), (sample["labels"], sample["loss_mask"])


def _start_worker(number: int) -> None:
    leave_to_parent()


def micro_batches(dataset: Any, order: SampleOrder, workers: int) -> Iterator[MicroBatch]:
    """Micro-batches of ``dataset`` in ``order``, read ahead by ``workers`` processes."""
    loader = DataLoader(
        dataset,
        batch_sampler=order,
        num_workers=workers,
        # Forked, whatever this Python's default: a tokenizer cannot be sent to a process that starts anew.
        multiprocessing_context="fork" if workers else None,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
        worker_init_fn=_start_worker,
        # Its own: drawing a loader's seed must not move the run's random numbers.
        generator=torch.Generator(),
    )
    return map(as_micro_batch, loader)
