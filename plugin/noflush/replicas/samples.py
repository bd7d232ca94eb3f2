"""The samples of one order that a group trains on, as a sampler for a `DataLoader`.

The group's first stage decides (`order.shared_order`); the last one, which reads the same samples for their labels,
takes what it decided from the group's store.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Sampler

from noflush.order.shared_order import SharedOrder, block_samples


class GroupSamples(Sampler[int]):
    """Indices of samples, without an end: epoch after epoch, each shuffled by the seed and its number.

    Args:
        count: samples of the data set; what is left over by whole micro-batches is left out of an epoch.
        micro_batch: samples a micro-batch.
        seed: of the shuffling, the same at all groups; None: the data set's order.
        order: where this stage decides; else None.
        store: of the group, where others read what was decided; None where nobody does.
        given: micro-batches that have been read before, by a process for which this one has come.

    Raises ValueError for a data set without a whole micro-batch.
    """

    def __init__(
        self, count: int, micro_batch: int, seed: int | None, order: SharedOrder | None, store: Any, given: int = 0
    ) -> None:
        if not 0 < micro_batch <= count:
            raise ValueError(f"{count} samples make no micro-batch of {micro_batch}")
        self._count, self._size, self._seed = count, micro_batch, seed
        self._order, self._store = order, store
        self._given = given
        self._epoch: tuple[int, Tensor] | None = None

    def __iter__(self) -> Iterator[int]:
        while True:
            epoch, positions = block_samples(self._block(), self._size, self._count)
            for position in positions:
                yield self._sample(epoch, position)

    def _block(self) -> int:
        key = f"noflush/block/{self._given}"
        self._given += 1
        if self._order is None:
            block = int(self._store.get(key))
            self._store.delete_key(key)
            return block
        block = self._order.next()
        if self._store is not None:
            self._store.set(key, str(block))
        return block

    def _sample(self, epoch: int, position: int) -> int:
        if self._seed is None:
            return position
        if self._epoch is None or self._epoch[0] != epoch:
            draw = torch.Generator().manual_seed(self._seed + epoch)
            self._epoch = epoch, torch.randperm(self._count, generator=draw)
        return int(self._epoch[1][position])
