"""Which sample a replica reads when: Megatron's two orders. Pure; no torch but its generator.

Both are functions of the samples consumed so far, so a restarted run reads on at the exact sample.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch


class SampleOrder:
    """Indices of one replica's micro-batches: a torch batch sampler.

    Args:
        total: samples in the dataset.
        consumed: samples all replicas together have consumed.
        micro: micro-batch size.
        replica, replicas: this replica's place, of how many.
        shuffle: Megatron's "cyclic": every epoch in a new order; else "single": in the dataset's own order, once.
        seed: of the shuffles.
    """

    def __init__(
        self, total: int, consumed: int, micro: int, replica: int, replicas: int, shuffle: bool = False, seed: int = 0
    ) -> None:
        self._total = total
        self._consumed = consumed
        self._micro = micro
        self._replica = replica
        self._replicas = replicas
        self._shuffle = shuffle
        self._seed = seed

    def __len__(self) -> int:
        return max(0, self._total - self._consumed) // (self._micro * self._replicas)

    def __iter__(self) -> Iterator[list[int]]:
        return self._shuffled() if self._shuffle else self._in_order()

    def _in_order(self) -> Iterator[list[int]]:
        step = self._micro * self._replicas
        for start in range(self._consumed, self._total - step + 1, step):
            first = start + self._replica * self._micro
            yield list(range(first, first + self._micro))

    def _shuffled(self) -> Iterator[list[int]]:
        # A replica keeps to its own part of the data, so that shuffling needs no communication.
        part = self._total // (self._micro * self._replicas) * self._micro
        if not part:
            return
        epoch, done = divmod(self._consumed // self._replicas, part)
        mine: list[int] = []
        while True:
            order = torch.randperm(part, generator=torch.Generator().manual_seed(self._seed + epoch)).tolist()
            mine += [self._replica * part + index for index in order[done:]]
            # After other micro-batch sizes an epoch may end within a micro-batch: the next one fills it.
            whole = len(mine) // self._micro * self._micro
            for start in range(0, whole, self._micro):
                yield mine[start : start + self._micro]
            mine, epoch, done = mine[whole:], epoch + 1, 0
