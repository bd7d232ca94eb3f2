"""Samples to iterations and back, past and to come, as a walk counts them."""

from __future__ import annotations

import dataclasses
import itertools
import json

from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from noflush.launch.arguments.progress import Course, Position, position_in
from noflush.launch.arguments.rampup import batch_size_at
from noflush.launch.arguments.settings import Batch
from tests.launch.walks import size_by_megatron


@st.composite
def batches(draw):
    increment, start, steps = draw(st.integers(1, 9)), draw(st.integers(1, 9)), draw(st.integers(0, 12))
    if draw(st.integers(0, 2)) == 2:
        thresholds = [0, *sorted(draw(st.sets(st.integers(1, 400), max_size=5)))]
        schedule = tuple((at, draw(st.integers(1, 40))) for at in thresholds)
        return Batch(1, schedule[-1][1], None, schedule)
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
def test_the_batch_is_that_of_megatron_core(batch, consumed):
    if batch.rampup is None or batch.rampup[0] < batch.global_size:  # theirs divides by no steps
        assert batch_size_at(batch, consumed) == size_by_megatron(batch, consumed)


def test_a_long_ramp_and_a_long_run_take_no_time():
    batch = Batch(1, 1536, (16, 16, 10**9))
    course = Course(batch)
    assert course.iterations_at(course.samples_at(10**12)) == 10**12
