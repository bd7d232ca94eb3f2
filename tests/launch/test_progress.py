"""Progress is samples: lengths in iterations, ramps and resumed runs, against a walk from iteration to iteration."""

from __future__ import annotations

import dataclasses
import itertools
import json
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from noflush.checkpoint import write_latest
from noflush.launch.arguments.parser import ArgumentsError
from noflush.launch.arguments.progress import Course, Position, position_in, steps_from, traced
from noflush.launch.arguments.rampup import batch_size_at
from noflush.launch.arguments.settings import Batch, Checkpoints
from noflush.launch.arguments.understand import understand
from noflush.launch.data.datasets import samples_needed
from noflush.launch.training import checkpoints
from noflush.launch.training.checkpoint_files import POSITION, write_position
from noflush.launch.training.schedule import schedule_of

MAX, MIN = 1e-3, 1e-4
RUN = (
    "--num-layers 2 --hidden-size 16 --num-attention-heads 2 --seq-length 8 --max-position-embeddings 8 "
    "--micro-batch-size 2 --pipeline-model-parallel-size 2 --mock-data --tokenizer-type NullTokenizer --vocab-size 60 "
    f"--untie-embeddings-and-output-weights --lr {MAX} --min-lr {MIN} "
)
RAMP = "--global-batch-size 16 --rampup-batch-size 4 4 64 "
OVERRIDE = "--override-opt_param-scheduler"


def understood(arguments):
    return understand((RUN + arguments).split(), 2)[0]


def size_by_megatron(batch, consumed):
    from megatron.core.num_microbatches_calculator import RampupBatchsizeNumMicroBatchesCalculator

    if batch.rampup is None:
        return batch.global_size
    theirs = RampupBatchsizeNumMicroBatchesCalculator(batch.global_size, 1, 1, False, 1, *batch.rampup)
    theirs.update(consumed, consistency_check=False)
    return theirs.get_current_global_batch_size()


class Walk:
    """A run, one iteration after the other: ``consumed``, ``rates`` and ``decays`` after each, from the first on.

    Goes on where ``before`` stopped, its schedule through that one's state.
    """

    def __init__(self, run, iterations=None, before=None):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        self.schedule = schedule_of(run)(optimizer)
        self.consumed, self.rates, self.decays = [], [], []
        if before is not None:
            self.consumed, self.rates, self.decays = before.consumed[:], before.rates[:], before.decays[:]
            self.schedule.load_state_dict(before.schedule.state_dict())
        steps = run.steps
        while len(self.consumed) != iterations:
            done = self.consumed[-1] if self.consumed else 0
            size = size_by_megatron(run.batch, done)
            over = done + size > steps.samples if steps.by_samples else len(self.consumed) >= steps.iterations
            if over:
                break
            self.schedule.step(size)
            self.consumed.append(done + size)
            self.rates.append(optimizer.param_groups[0]["lr"])
            self.decays.append(optimizer.param_groups[0]["weight_decay"])

    def position(self):
        found, last = Position(), 0
        for consumed in self.consumed:
            found.advance(consumed - last)
            last = consumed
        return found


def is_linear(rates, consumed, first, last):
    """Whether the rate falls from MAX at ``first`` samples to MIN at ``last``, in a straight line over samples."""
    wanted = [MAX + (MIN - MAX) * (c - first) / (last - first) for c in consumed if c > first]
    assert rates[-len(wanted) :] == pytest.approx(wanted)
    assert consumed[-1] == last


# ---- a ramp, and lengths in iterations --------------------------------------------------------------------


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


# ---- resumed with another batch size ----------------------------------------------------------------------


def resumed(folder, before, arguments, state=True):
    """``arguments`` as understood where ``before``'s checkpoint is loaded."""
    checkpoint = folder / f"global_step{len(before.consumed)}"
    checkpoint.mkdir()
    if state:
        write_position(checkpoint, before.position())
    write_latest(folder, checkpoint.name)
    return understood(f"{arguments} --load {folder}")


@pytest.mark.parametrize(
    ("first", "stop", "then", "iterations"),
    [
        ("--global-batch-size 4", 6, "--global-batch-size 8", 9),
        ("--global-batch-size 8", 3, "--global-batch-size 4", 9),
        ("--global-batch-size 4", 1, "--global-batch-size 12", 4),  # 44 samples: 3 whole batches
        ("--global-batch-size 2", 5, "--global-batch-size 8 --rampup-batch-size 2 2 24", 11),  # 4 4 6 8 8 8
        ("--global-batch-size 8 --rampup-batch-size 2 2 24", 6, "--global-batch-size 16", 8),
        ("--global-batch-size 8", 6, "--global-batch-size 16", 6),  # nothing is left
    ],
)
@pytest.mark.parametrize("decay", ["linear", "WSD --lr-wsd-decay-style linear --lr-wsd-decay-samples 16"])
def test_a_run_in_samples_goes_on_until_they_are_consumed(first, stop, then, iterations, decay, tmp_path):
    common = f"--train-samples 48 --lr-decay-style {decay} "
    before = Walk(understood(common + first), stop)
    run = resumed(tmp_path, before, common + then)
    walk = Walk(run, before=before)  # which has Megatron's checks that both schedules are one
    assert (run.steps.iterations, len(walk.consumed)) == (iterations, iterations)
    assert walk.consumed[-1] <= 48 < walk.consumed[-1] + run.batch.global_size
    if "WSD" in decay:
        wanted = [MAX if c <= 32 else MAX + (MIN - MAX) * (c - 32) / 16 for c in walk.consumed]
    else:
        wanted = [MAX + (MIN - MAX) * c / 48 for c in walk.consumed]
    assert walk.rates == pytest.approx(wanted)
    assert samples_needed(run)[0] == 48


@pytest.mark.parametrize("then", ["--global-batch-size 8", "--global-batch-size 2"])
def test_a_run_in_iterations_has_as_many_in_all_and_its_decay_ends_with_them(then, tmp_path):
    common = "--train-iters 10 --lr-decay-style linear --lr-warmup-iters 4 "
    before = Walk(understood(common + "--global-batch-size 4"), 6)
    run = resumed(tmp_path, before, f"{common} {OVERRIDE} {then}")
    walk = Walk(run, before=before)
    assert (run.steps.iterations, len(walk.consumed)) == (10, 10)
    assert run.steps.samples == walk.consumed[9] == 24 + 4 * run.batch.global_size
    assert run.optimizer.warmup_samples == 16  # it lies behind, at the batch size of its time
    assert walk.rates[9] == pytest.approx(MIN)
    assert samples_needed(run)[0] == walk.consumed[9]


def test_another_batch_size_under_a_schedule_in_iterations_is_refused_until_it_is_said_which(tmp_path):
    common = "--train-iters 10 --lr-decay-style linear "
    before = Walk(understood(common + "--global-batch-size 4"), 6)
    run = resumed(tmp_path, before, common + "--global-batch-size 8")
    with pytest.raises(AssertionError, match="class input value 56 and checkpointvalue 40"):
        Walk(run, before=before)
    again = understood(f"{common} --global-batch-size 4 --load {tmp_path}")
    assert len(Walk(again, before=before).consumed) == 10


def test_resumed_within_its_warm_up_and_within_a_ramp(tmp_path):
    common = "--train-iters 16 --lr-decay-style linear --lr-warmup-iters 8 "
    before = Walk(understood(common + RAMP), 5)
    again = resumed(tmp_path, before, common + RAMP)
    assert Walk(again, before=before).rates == Walk(understood(common + RAMP)).rates
    steeper = understood(f"{common} --global-batch-size 32 --rampup-batch-size 4 28 20 {OVERRIDE} --load {tmp_path}")
    walk = Walk(steeper, before=before)
    assert walk.consumed[4:7] == [20, 52, 84]
    assert walk.rates[7] == pytest.approx(MAX)
    is_linear(walk.rates, walk.consumed, walk.consumed[7], walk.consumed[15])


def test_resumed_twice_each_time_with_another_batch_size(tmp_path):
    common = "--train-samples 100 --lr-decay-style linear --lr-warmup-iters 7 --global-batch-size "
    first = Walk(understood(common + "2"), 7)
    (tmp_path / "a").mkdir()
    second = Walk(resumed(tmp_path / "a", first, common + "4"), 10, first)
    (tmp_path / "b").mkdir()
    run = resumed(tmp_path / "b", second, common + "8")
    walk = Walk(run, before=second)
    assert second.position().sizes == [(7, 2), (3, 4)]
    assert run.optimizer.warmup_samples == 14
    assert (run.steps.iterations, walk.consumed[-1]) == (19, 98)
    assert walk.rates[6] == pytest.approx(MAX)


def test_weights_alone_begin_anew(tmp_path):
    before = Walk(understood("--train-samples 48 --global-batch-size 4"), 6)
    run = resumed(tmp_path, before, "--train-samples 48 --global-batch-size 8 --finetune")
    assert run.steps.iterations == 6


def test_a_position_that_does_not_add_up_is_a_fault(tmp_path):
    before = Walk(understood("--train-samples 48 --global-batch-size 4"), 6)
    resumed(tmp_path, before, "--train-samples 48 --global-batch-size 4")
    for text, said in (
        ('{"iteration": 6, "consumed": 24, "sizes": [[6, 8]]}', "6 iterations of 48 samples"),
        ('{"iteration": 6}', "no position of a run"),
        ("[6]", "no position of a run"),
        ("{", "position.json cannot be used"),
    ):
        (tmp_path / "global_step6" / POSITION).write_text(text)
        with pytest.raises(ArgumentsError, match=said):
            understood(f"--train-samples 48 --global-batch-size 4 --load {tmp_path}")


# ---- checkpoints that say iteration and samples alone -----------------------------------------------------


def old(iteration, consumed):
    return position_in({"iteration": iteration, "consumed": consumed})


def test_an_old_checkpoint_goes_on(tmp_path):
    for common, stop in ((RAMP + "--train-iters 16", 9), ("--global-batch-size 4 --train-iters 16", 5)):
        before = Walk(understood(common), stop)
        folder = tmp_path / str(stop)
        folder.mkdir()
        run = resumed(folder, before, common, state=False)
        position = traced(old(stop, before.consumed[-1]), run.batch, run.steps.in_iterations)
        assert position == before.position()
        assert steps_from(run.steps, run.batch, position) == run.steps == understood(common).steps


def test_an_old_checkpoint_with_another_batch_size(tmp_path):
    run = understood("--global-batch-size 8 --train-samples 48")
    position = traced(old(6, 24), run.batch, run.steps.in_iterations)
    assert position.sizes == [(6, 4)]
    assert steps_from(run.steps, run.batch, position).iterations == 9
    assert traced(old(4, 14), run.batch, ()).sizes == [(2, 3), (2, 4)]  # of a ramp that is not known
    run = understood("--global-batch-size 8 --train-samples 48 --lr-warmup-iters 2")
    with pytest.raises(ValueError, match=r"consumed 24 samples in 6 iterations.*give --lr-warmup-iters 2 in samples"):
        traced(old(6, 24), run.batch, run.steps.in_iterations)


def test_without_optimizer_state_the_schedule_stands_where_the_run_does(tmp_path):
    run = understood("--global-batch-size 4 --train-iters 10 --lr-decay-style linear")
    before = Walk(run, 6)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    engine = SimpleNamespace(
        lr_scheduler=schedule_of(run)(optimizer),
        load_checkpoint=lambda *_, **__: ("", {"noflush": dataclasses.asdict(before.position())}),
    )
    where = Checkpoints("", str(tmp_path), "global_step6", False, False, False, False, False)
    position = checkpoints.load(engine, where)
    assert position == before.position()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(before.rates[-1])


# ---- the conversion itself --------------------------------------------------------------------------------


@st.composite
def batches(draw):
    increment, start, steps = draw(st.integers(1, 9)), draw(st.integers(1, 9)), draw(st.integers(0, 12))
    ramp = (start, increment, draw(st.integers(1, 400))) if draw(st.booleans()) else None
    return Batch(1, start + steps * increment if ramp else start, ramp)


@hypothesis_settings(max_examples=200, deadline=None)
@given(batches(), st.lists(st.integers(1, 7), max_size=12), st.integers(0, 90), st.integers(0, 600))
def test_iterations_and_samples_as_a_walk_counts_them(batch, done, iterations, samples):
    start, walked = Position(), [0]
    for size in done:
        start.advance(size)
        walked.append(walked[-1] + size)
    while len(walked) < 100 or walked[-1] <= samples:
        walked.append(walked[-1] + batch_size_at(batch, walked[-1]))
    course = Course(batch, position_in(json.loads(json.dumps(dataclasses.asdict(start)))))
    assert course.samples_at(iterations) == walked[iterations]
    assert course.iterations_at(samples) == max(n for n, consumed in enumerate(walked) if consumed <= samples)
    sizes = [size for count, size in course.sizes_until(iterations) for _ in range(count)]
    assert sizes == [after - before for before, after in itertools.pairwise(walked[: iterations + 1])]


@hypothesis_settings(max_examples=100, deadline=None)
@given(batches(), st.integers(0, 900))
def test_the_ramp_is_that_of_megatron_core(batch, consumed):
    if batch.rampup is None or batch.rampup[0] < batch.global_size:  # theirs divides by no steps
        assert batch_size_at(batch, consumed) == size_by_megatron(batch, consumed)


def test_a_long_ramp_and_a_long_run_take_no_time():
    batch = Batch(1, 1536, (16, 16, 10**9))
    course = Course(batch)
    assert course.iterations_at(course.samples_at(10**12)) == 10**12
