"""The bubble by the device's clock: what lies between pairs of events, read once they are over, waiting for none."""

from __future__ import annotations

import math

import pytest

from noflush.order.actions import Op
from noflush.watch.device_time import DeviceTimes
from noflush.watch.trace import Recorder


class Device:
    """A device that is behind its host: work takes time on it, and events pass when its time has come to them."""

    def __init__(self):
        self.enqueued = 0.0  # milliseconds of work the host has issued
        self.done = 0.0  # of them finished
        self.made = 0

    def new_event(self):
        self.made += 1
        device = self

        class Event:
            at = None

            def record(self):
                self.at = device.enqueued

            def query(self):
                return self.at <= device.done

            def elapsed_time(self, other):
                assert other.query(), "read before it was over: that waits"
                return other.at - self.at

        return Event()


@pytest.fixture
def device():
    return Device()


def call(recorder, device, wait=2.0, forward=1.0, backward=3.0, index=0):
    begun = recorder.begin(None)
    for op, milliseconds in ((Op.RECV_ACTIVATION, wait), (Op.FORWARD, forward), (Op.BACKWARD, backward)):
        started = recorder.begin(op)
        device.enqueued += milliseconds
        recorder.end(op, index, started)
    recorder.end_call(begun)


def test_the_bubble_is_what_the_device_did_not_compute(device):
    recorder = Recorder(0, 0, device=DeviceTimes(device.new_event))
    for index in range(3):
        call(recorder, device, index=index)
    assert recorder.totals() == (0, 0)  # nothing is over, and nobody waits
    device.done = 12.0  # two calls of six
    interval = recorder.take_interval()
    assert interval["seconds"] == pytest.approx(12e-3)
    assert interval["bubble"] == pytest.approx(2 / 6)
    assert interval["forward"] == pytest.approx(1.0)
    assert interval["backward"] == pytest.approx(3.0)
    device.done = 17.5  # the third call is not over, though its forward is: it counts when its own time does
    assert math.isnan(recorder.take_interval()["bubble"])
    device.done = device.enqueued
    assert recorder.take_interval()["bubble"] == pytest.approx(2 / 6)
    assert recorder.totals() == (12_000_000, 18_000_000)


def test_a_drain_is_no_calls(device):
    recorder = Recorder(0, 0, device=DeviceTimes(device.new_event))
    call(recorder, device)
    device.done = device.enqueued
    with recorder.outside_calls():
        started = recorder.begin(Op.BACKWARD)
        device.enqueued += 100.0
        recorder.end(Op.BACKWARD, 1, started)
    device.done = device.enqueued
    assert recorder.totals() == (4_000_000, 6_000_000)
    assert [e.index for e in recorder.events()] == [0, 0, 0, 1]  # though an event like any other


def test_events_are_used_again(device):
    times = DeviceTimes(device.new_event)
    for _ in range(100):
        times.add(Op.FORWARD, times.mark())
        device.done = device.enqueued
        times.settle()
    assert device.made == 2
