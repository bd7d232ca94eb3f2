"""Micro-batches for the pipeline, out of a dataset: an endless iterator that knows where it stands."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from noflush.launch.refusal import RefusedError
from noflush.launch.signals import leave_to_parent

MicroBatch = tuple[tuple[Tensor, ...], tuple[Tensor, Tensor]]


class SampleError(ValueError):
    """A sample could not be read; the message says which, and why."""


def as_micro_batch(sample: dict[str, Tensor]) -> MicroBatch:
    """What the pipeline's layers and loss take: ((tokens, positions[, mask]), (labels, loss mask))."""
    inputs = [sample["tokens"], sample["position_ids"]]
    if "attention_mask" in sample:
        inputs.append(sample["attention_mask"])
    return tuple(inputs), (sample["labels"], sample["loss_mask"])


@dataclass(frozen=True)
class _Fault:
    """What a reading process sends in place of a micro-batch: an exception would come back as a page of its own."""

    kind: type[ValueError]
    message: str


class _Samples(Dataset[Any]):
    """``dataset``, a micro-batch's samples at once."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __getitems__(self, indices: Sequence[int]) -> list[Any] | _Fault:
        samples = []
        for index in indices:
            try:
                samples.append(self._dataset[index])
            except RefusedError as error:
                return _Fault(RefusedError, str(error))
            except Exception as error:
                kind = type(error).__name__
                return _Fault(SampleError, f"sample {index} of the data cannot be read: {kind}: {error}")
        return samples


def _collate(samples: list[Any] | _Fault) -> Any:
    return samples if isinstance(samples, _Fault) else default_collate(samples)


def _start_worker(number: int) -> None:
    leave_to_parent()


class MicroBatches(Iterator[MicroBatch]):
    """Micro-batches of ``dataset`` in ``order``, read ahead by ``workers`` processes, which end with `close`.

    `next` raises RefusedError for token ids outside the vocabulary, SampleError for what else cannot be read.
    """

    def __init__(self, dataset: Any, order: Iterable[list[int]], workers: int) -> None:
        loader = DataLoader(
            _Samples(dataset),
            batch_sampler=order,
            num_workers=workers,
            collate_fn=_collate,
            # Forked, whatever this Python's default: a tokenizer cannot be sent to a process that starts anew.
            multiprocessing_context="fork" if workers else None,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=_start_worker,
            # Its own: drawing a loader's seed must not move the run's random numbers.
            generator=torch.Generator(),
        )
        self._batches: Iterator[Any] = iter(loader)

    def __next__(self) -> MicroBatch:
        batch = next(self._batches)
        if isinstance(batch, _Fault):
            raise batch.kind(batch.message)
        return as_micro_batch(batch)

    def close(self) -> None:
        """Ends the processes; no micro-batch is left."""
        # torch ends them with the last reference to its iterator. Those that are left to the end of the program are
        # killed then, and say so.
        self._batches = iter(())
