"""Successive halving, exact on invented losses, and what it asks for when only some are known."""

from __future__ import annotations

import math

from noflush.compare.halving import standing

GRID = (1.0, 2.0, 4.0, 8.0)


def search(grid, loss):
    """The winner under ``loss(rung, rate)``, whether it is at the edge, and every run in the order asked for."""
    runs = {}
    while (now := standing(grid, runs)).winner is None:
        assert now.wanted
        runs |= {(rung, rate): loss(rung, rate) for rung, rate in now.wanted}
    return now.winner, now.at_edge, list(runs)


def test_half_goes_on_and_the_last_one_left_has_won():
    winner, at_edge, runs = search(GRID, lambda rung, rate: abs(rate - 3.9))
    assert (winner, at_edge) == (4.0, False)
    assert runs == [(0, 1.0), (0, 2.0), (0, 4.0), (0, 8.0), (1, 4.0), (1, 2.0)]


def test_a_longer_rung_decides_among_those_it_sees():
    best = {0: 4.0, 1: 2.0, 2: 2.0}
    assert search(GRID, lambda rung, rate: abs(rate - best[rung]))[0] == 2.0


def test_five_rates_reach_the_whole_budget():
    winner, _, runs = search((1.0, 2.0, 4.0, 8.0, 16.0), lambda rung, rate: abs(rate - 4.1))
    assert winner == 4.0
    assert [rung for rung, _ in runs] == [0] * 5 + [1] * 3 + [2] * 2


def test_a_winner_at_the_edge_lets_the_grid_grow_twice_at_most():
    winner, at_edge, runs = search(GRID, lambda rung, rate: -rate)
    assert (winner, at_edge) == (32.0, True)
    assert [rate for rung, rate in runs if rung == 0] == [1.0, 2.0, 4.0, 8.0, 16.0, 32.0]
    assert [rate for rung, rate in runs if rung == 1] == [32.0, 16.0]
    winner, at_edge, runs = search(GRID, lambda rung, rate: abs(rate - 0.5))
    assert (winner, at_edge) == (0.5, False)
    assert [rate for rung, rate in runs if rung == 0] == [1.0, 2.0, 4.0, 8.0, 0.5, 0.25]


def test_a_single_rate_grows_by_two():
    winner, _, runs = search((1.0,), lambda rung, rate: abs(rate - 1.9))
    assert [rate for rung, rate in runs] == [1.0, 0.5, 2.0]  # beyond the lower edge first
    assert winner == 2.0


def test_of_equal_losses_the_smaller_rate_wins():
    assert search(GRID, lambda rung, rate: 1.0 if rate > 1 else 2.0)[0] == 2.0
    assert search(GRID, lambda rung, rate: math.inf)[0] == 0.25


def test_what_is_known_is_not_asked_for_and_what_follows_is_counted():
    now = standing(GRID, {(0, 1.0): 3.0, (0, 4.0): 1.0})
    assert now.wanted == ((0, 2.0), (0, 8.0))
    assert now.later == (1, 1)
    assert standing((1.0, 2.0, 4.0, 8.0, 16.0), {}).later == (1, 1, 1, 2, 2)
