"""A batch that grows, and lengths in iterations: where rates and decays begin and end, against a walk."""

from __future__ import annotations

import pytest

from noflush.launch.arguments.parser import ArgumentsError
from noflush.launch.arguments.rampup import read_schedule
from noflush.launch.data.datasets import samples_needed
from tests.launch.walks import MAX, MIN, RAMP, STEPS, Walk, is_linear, understood


def test_with_a_ramp_the_decay_ends_at_the_last_of_the_iterations():
    run = understood(RAMP + "--train-iters 10 --lr-decay-style linear")
    walk = Walk(run)
    assert (run.steps.iterations, len(walk.consumed)) == (10, 10)
    assert run.steps.samples == walk.consumed[-1] < 160
    is_linear(walk.rates, walk.consumed, 0, walk.consumed[-1])


def test_with_a_ramp_the_warm_up_ends_at_its_last_iteration():
    run = understood(RAMP + "--train-iters 14 --lr-decay-style linear --lr-warmup-iters 7")
    walk = Walk(run)
    assert walk.rates[6] == pytest.approx(MAX)
    assert walk.rates[:6] == pytest.approx([MAX * c / walk.consumed[6] for c in walk.consumed[:6]])
    is_linear(walk.rates, walk.consumed, walk.consumed[6], walk.consumed[13])


@pytest.mark.parametrize("last", [3, 9, 14, 20])  # whole batches, some of the ramp, most of it, all
def test_with_a_ramp_wsd_decays_in_its_last_iterations(last):
    decay = f"--train-iters 20 --lr-decay-style WSD --lr-wsd-decay-style linear --lr-wsd-decay-iters {last}"
    walk = Walk(understood(RAMP + decay))
    start = walk.consumed[19 - last] if last < 20 else 0
    assert walk.rates[: 20 - last] == pytest.approx([MAX] * (20 - last))
    is_linear(walk.rates, walk.consumed, start, walk.consumed[19])


def test_with_a_ramp_wsd_decays_in_the_last_iterations_of_a_decay_in_samples():
    decay = "--lr-decay-style WSD --lr-wsd-decay-style linear --lr-wsd-decay-iters 2"
    walk = Walk(understood(RAMP + f"--train-samples 60 {decay}"))
    assert walk.consumed[-3:] == [40, 48, 60]
    assert walk.rates[-3:] == pytest.approx([MAX, MAX + (MIN - MAX) * 8 / 20, MIN])


def test_with_a_ramp_a_decay_shorter_than_the_run_ends_at_its_own_iteration():
    walk = Walk(understood(RAMP + "--train-iters 20 --lr-decay-style cosine --lr-decay-iters 6 --lr-warmup-iters 2"))
    assert walk.rates[1] == pytest.approx(MAX)
    assert walk.rates[4] > MIN
    assert walk.rates[5:] == pytest.approx([MIN] * 15)


def test_with_a_ramp_weight_decay_grows_to_the_last_iteration():
    more = "--weight-decay-incr-style linear --start-weight-decay 0.01 --end-weight-decay 0.1"
    walk = Walk(understood(RAMP + f"--train-iters 9 {more}"))
    assert walk.decays == pytest.approx([0.01 + 0.09 * c / walk.consumed[8] for c in walk.consumed])


def test_a_warm_up_in_iterations_of_a_run_in_samples():
    run = understood(RAMP + "--train-samples 120 --lr-warmup-iters 5")
    walk = Walk(run)
    assert run.steps.iterations == len(walk.consumed)
    assert walk.consumed[-1] <= 120 < walk.consumed[-1] + 16
    assert walk.rates[4] == pytest.approx(MAX)
    assert walk.rates[:4] == pytest.approx([MAX * c / walk.consumed[4] for c in walk.consumed[:4]])


def test_a_warm_up_as_a_fraction_is_of_the_samples():
    run = understood(RAMP + "--train-iters 30 --lr-warmup-fraction 0.25")
    assert run.optimizer.warmup_samples == int(0.25 * Walk(run).consumed[-1])


def test_a_ramp_longer_than_the_run():
    run = understood("--global-batch-size 64 --rampup-batch-size 2 2 100000 --train-iters 25 --lr-decay-style linear")
    walk = Walk(run)
    assert walk.consumed == [2 * n for n in range(1, 26)]
    is_linear(walk.rates, walk.consumed, 0, 50)


def test_the_data_are_as_many_samples_as_the_iterations_take():
    run = understood(RAMP + "--train-iters 12 --eval-interval 4 --eval-iters 2")
    assert samples_needed(run) == (Walk(run).consumed[-1], 4 * 2 * 16, 2 * 16)


def test_a_run_of_less_than_the_first_batch_of_a_ramp_is_refused():
    with pytest.raises(ArgumentsError, match="3 samples are less than one global batch of 4"):
        understood(RAMP + "--train-samples 3")


def test_a_schedule_in_tokens_changes_the_batch_at_its_samples():
    run = understood("--train-iters 12 --lr-decay-style linear", STEPS)
    assert run.batch.schedule == ((0, 4), (20, 12), (50, 16))
    assert run.deepspeed["train_batch_size"] == 4
    walk = Walk(run)
    assert walk.consumed == [4, 8, 12, 16, 20, 32, 44, 56, 72, 88, 104, 120]
    assert (run.steps.iterations, run.steps.samples) == (12, 120)
    is_linear(walk.rates, walk.consumed, 0, 120)


def test_a_schedule_may_make_the_batch_smaller_again():
    run = understood("--train-samples 60", ("--step-batch-size-schedule", "0:8 128:4"))
    assert Walk(run).consumed == [8, 16, *range(20, 64, 4)]
    assert run.steps.iterations == 13


def test_thresholds_are_what_they_are_in_megatrons_own_script():
    text = "0:16 2.4B:320 4.8B:624 7.2B:928 9.6B:1232 12B:1536"
    first = [int(tokens * 10**9) // 2048 for tokens in (0, 2.4, 4.8, 7.2, 9.6, 12)]
    assert read_schedule(text, 2048) == tuple(zip(first, (16, 320, 624, 928, 1232, 1536), strict=True))
    assert read_schedule("1k:2,0:1 3M:4", 10) == ((0, 1), (100, 2), (300_000, 4))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("0:4 160",), "160 is not THRESHOLD:SIZE"),
        (("0:4 many:8",), "many:8 is not THRESHOLD:SIZE"),
        (("0:4 inf:8",), "inf:8 is not THRESHOLD:SIZE"),
        (("16:4",), "the first threshold must be 0"),
        (("",), "the first threshold must be 0"),
        (("0:4 32:8 33:12",), "two thresholds are in the same sample of 8 tokens"),
        (("0:4 32:3 64:0",), "3, 0: use multiples of 2"),
        (("0:4", "--global-batch-size", "8"), "leads to 4, --global-batch-size 8 says otherwise"),
        (("0:4", "--rampup-batch-size", "2", "2", "8"), "--rampup-batch-size: give one"),
    ],
)
def test_a_schedule_that_is_none_is_a_fault_that_says_why(words, said):
    with pytest.raises(ArgumentsError) as error:
        understood("--train-iters 3", ("--step-batch-size-schedule", *words))
    about = [fault for fault in error.value.faults if fault.startswith(f"--step-batch-size-schedule {words[0]!r}")]
    assert any(said in fault for fault in about), error.value.faults
