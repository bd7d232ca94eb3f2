"""The travelling loss scale; with DeepSpeed's scaler it is tried in tests/multiproc/test_nonfinite.py."""

from __future__ import annotations

from noflush.stage.loss_scale import TravellingScale


class Halving:
    """Falls by half on an overflow, grows twofold after ``window`` good batches."""

    def __init__(self, window=3):
        self.window, self.cur_scale, self.good, self.told = window, 64.0, 0, []

    def update_scale(self, overflow):
        self.told.append(overflow)
        self.good = 0 if overflow else self.good + 1
        if overflow:
            self.cur_scale /= 2
        elif self.good == self.window:
            self.cur_scale, self.good = self.cur_scale * 2, 0


def test_a_scale_is_fixed_when_its_batch_begins():
    scaler = Halving()
    scale = TravellingScale(scaler, horizon=8)
    assert scale.begin(0) == 64
    scale.hear(0)
    assert scaler.cur_scale == 64  # batch 0 keeps what it was scaled by
    assert scale.begin(1) == 32
    assert scaler.told == [True]


def test_batches_in_flight_with_the_old_scale_let_it_fall_once():
    """Stage 0 is three batches late: what overflowed at 64 comes in one by one, and is old news after the first."""
    scaler = Halving(window=99)
    scale = TravellingScale(scaler, horizon=8)
    for batch in range(4):
        scale.begin(batch)
    scale.hear(0)
    assert scale.begin(4) == 32
    for late in (1, 2, 3):
        scale.hear(late)
        assert scale.begin(4 + late) == 32
    assert scaler.told.count(True) == 1
    scale.hear(4)  # the new scale overflows too
    assert scale.begin(8) == 16


def test_several_stages_overflowing_in_one_batch_count_once():
    scaler = Halving()
    scale = TravellingScale(scaler, horizon=8)
    scale.begin(0)
    for _ in range(3):
        scale.hear(0)
    assert scale.begin(1) == 32


def test_it_grows_after_a_good_window_and_an_overflow_after_growth_is_news():
    scaler = Halving()
    scale = TravellingScale(scaler, horizon=8)
    values = [scale.begin(batch) for batch in range(5)]
    assert values == [64, 64, 64, 128, 128]
    scale.hear(2)  # 64 overflowed after all, so 128 is too large as well
    assert scale.begin(5) == 64


def test_old_batches_are_forgotten():
    scale = TravellingScale(Halving(), horizon=4)
    for batch in range(100):
        scale.begin(batch)
    assert scale.remembered == 4


def test_settling_judges_what_began_and_a_new_run_goes_on_alike():
    """After a drain a checkpoint holds the scaler; whoever loads it must scale as the run that went on."""
    scaler = Halving()
    scale = TravellingScale(scaler, horizon=4)
    for batch in range(2):
        scale.begin(batch)
    scale.hear(1)
    scale.settle()
    assert scaler.told == [False, True]
    resumed = Halving()
    vars(resumed).update(cur_scale=scaler.cur_scale, good=scaler.good)
    other = TravellingScale(resumed, horizon=4)
    for batch in range(2, 12):
        assert scale.begin(batch) == other.begin(batch)
