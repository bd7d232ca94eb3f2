"""Matrices shared out among shards."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from noflush.stage.cut import by_matrix, shard_length


@given(costs=st.lists(st.integers(1, 1000), max_size=40), shards=st.integers(1, 8))
def test_every_matrix_has_one_shard_and_none_is_overfull(costs, shards):
    members = by_matrix(costs, shards)
    assert sorted(i for of_shard in members for i in of_shard) == list(range(len(costs)))
    fullest = max(sum(costs[i] for i in of_shard) for of_shard in members)
    least_possible = max([*costs, -(-sum(costs) // shards)]) if costs else 0
    assert 3 * fullest <= 4 * least_possible + 3 * max([*costs, 0])


def test_by_hand():
    assert by_matrix([5, 4, 3, 3, 3], 2) == [[0, 3], [1, 2, 4]]
    assert shard_length([5, 4, 3, 3, 3], [[0, 3], [1, 2, 4]]) == 10
    assert shard_length([5], [[0], []]) == 6
