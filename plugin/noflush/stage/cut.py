"""How matrices are shared out among the replicas that each update a shard of them (ZeRO-1). Pure.

A rule that sees elements can be sharded anywhere; one that sees matrices only between them.
"""

from __future__ import annotations

from collections.abc import Sequence


def by_matrix(costs: Sequence[float], shards: int) -> list[list[int]]:
    """Which matrices each shard gets, in the order they came in: the dearest first, each to the shard with the least.

    No shard has more than 4/3 of what the best division gives the fullest (Graham 1969, longest processing time first).
    """
    loads = [0.0] * shards
    members: list[list[int]] = [[] for _ in range(shards)]
    for i in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        least = loads.index(min(loads))
        loads[least] += costs[i]
        members[least].append(i)
    return [sorted(of_shard) for of_shard in members]


def shard_length(sizes: Sequence[int], members: Sequence[Sequence[int]], unit: int = 2) -> int:
    """Elements of the longest shard, rounded up to ``unit``: all shards are made so long, with a gap at their end."""
    longest = max((sum(sizes[i] for i in of_shard) for of_shard in members), default=0)
    return -(-longest // unit) * unit
