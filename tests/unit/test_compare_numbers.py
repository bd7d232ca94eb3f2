"""Noise over seeds, curves, and the time the flush costs, against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest

from noflush.compare.agenda import speed_of_flush
from noflush.compare.curves import loss_at, mean_curve, tokens_to
from noflush.compare.noise import difference, spread
from noflush.compare.trial import share_of_rate


def test_spread():
    assert spread([1.0, 2.0, 4.0]).mean == pytest.approx(7 / 3)
    assert spread([1.0, 2.0, 4.0]).deviation == pytest.approx(math.sqrt(7 / 3))
    assert spread([1.5]).deviation is None
    assert spread([1.0, math.inf, math.inf]).diverged == 2


def test_equal_seeds_are_paired():
    found = difference({1: 2.1, 2: 2.4, 3: 2.3}, {1: 2.0, 2: 2.2, 3: 2.0})
    assert found.paired
    assert found.nats == pytest.approx(0.2)
    # differences .1, .2, .3: sd .1, standard error .1 / sqrt(3)
    assert found.errors == pytest.approx(0.2 / (0.1 / math.sqrt(3)))


def test_other_seeds_are_welchs():
    found = difference({1: 1.0, 2: 3.0}, {3: 0.0, 4: 1.0, 5: 2.0})
    assert not found.paired
    assert found.nats == pytest.approx(1.0)
    assert found.errors == pytest.approx(1 / math.sqrt(2 / 2 + 1 / 3))


def test_no_errors_without_noise_and_no_difference_without_a_loss():
    assert difference({1: 1.0}, {1: 0.5}).errors is None
    assert difference({1: 1.0, 2: 2.0}, {1: 0.5, 2: 1.5}).errors is None
    assert difference({1: math.inf}, {1: 0.5}) is None


CURVE = [(0, 5.0), (100, 3.0), (200, 2.0)]


def test_a_curve_is_read_on_straight_lines():
    assert loss_at(CURVE, 50) == 4.0
    assert loss_at(CURVE, 175) == 2.25
    assert loss_at(CURVE, 900) == 2.0
    assert tokens_to(CURVE, 2.5) == 150
    assert tokens_to(CURVE, 5.5) == 0
    assert tokens_to(CURVE, 1.9) is None
    assert tokens_to([(0, 5.0), (100, 3.0), (200, 3.5), (300, 2.5)], 3.0) == 100


def test_the_mean_of_curves_ends_where_one_of_them_does():
    assert mean_curve([CURVE, [(0, 5.0), (100, 4.0), (130, math.inf)]]) == [(0, 5.0), (100, 3.5)]


@pytest.mark.parametrize(("stages", "gas"), [(1, 1), (2, 1), (8, 1), (8, 4), (32, 1)])
def test_the_flush_pays_its_bubble(stages, gas):
    assert speed_of_flush(stages, gas) == pytest.approx(1 / (1 + (stages - 1) / gas))


def test_the_rate_warms_up_and_falls_to_a_tenth():
    shares = [share_of_rate(update, 200) for update in range(200)]
    assert shares[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert shares[10] == 1.0
    assert shares[105] == pytest.approx(0.55)
    assert shares[-1] == pytest.approx(0.1, abs=1e-4)
