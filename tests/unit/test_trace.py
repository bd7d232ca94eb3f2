"""Recording, files, the merged Chrome trace, the bubble and the picture."""

from __future__ import annotations

import json

import pytest

from noflush.__main__ import main
from noflush.order.actions import Op
from noflush.watch import trace
from noflush.watch.progress import progress_line

MS = 1_000_000


def record(folder, stage, capacity=1000):
    recorder = trace.Recorder(stage, rank=stage, folder=str(folder), capacity=capacity)
    for call in range(20):
        at = (10 * call + stage) * MS
        recorder.add(Op.FORWARD, call, at, at + 2 * MS)
        recorder.add(Op.RECV_GRAD, call, at + 2 * MS, at + 5 * MS)
        recorder.add(Op.BACKWARD, call, at + 5 * MS, at + 8 * MS)
        recorder.add_call(at, at + 10 * MS)
    return recorder


def test_interval_is_what_was_added(tmp_path):
    recorder = record(tmp_path, 0)
    summary = recorder.take_interval()
    assert summary["seconds"] == pytest.approx(0.2)
    assert summary["bubble"] == pytest.approx(0.5)
    assert summary["wait for gradient"] == pytest.approx(3.0)
    recorder.add(Op.FORWARD, 0, 0, MS)
    recorder.add_call(0, MS)
    assert recorder.take_interval()["bubble"] == pytest.approx(0.0)


def test_memory_and_file_are_bounded(tmp_path):
    recorder = record(tmp_path, 0, capacity=30)
    recorder.write()
    size = (tmp_path / "rank0.json").stat().st_size
    assert len(recorder.events()) == 30
    assert recorder.events() == sorted(recorder.events(), key=lambda e: e.start)
    assert recorder.events()[-1].index == 19
    for _ in range(20):
        for call in range(20):
            recorder.add(Op.FORWARD, call, 0, MS)
            recorder.add_call(0, MS)
    recorder.write()
    assert (tmp_path / "rank0.json").stat().st_size < 2 * size


def test_merged_trace_bubble_and_picture(tmp_path, capsys):
    for stage in range(3):
        record(tmp_path, stage).write()
    found = trace.read(tmp_path)
    assert trace.bubble(found) == {s: pytest.approx(0.5, abs=1e-3) for s in range(3)}
    assert main(["trace", str(tmp_path), "--png", str(tmp_path / "t.png"), "--chrome", str(tmp_path / "t.json")]) == 0
    assert "stage 2: bubble 50.0%" in capsys.readouterr().out
    assert (tmp_path / "t.png").read_bytes().startswith(b"\x89PNG")
    chrome = json.loads((tmp_path / "t.json").read_text())["traceEvents"]
    assert {e["tid"] for e in chrome} == {0, 1, 2}
    spans = [e for e in chrome if e["ph"] == "X"]
    assert {"name": "F0", "cat": "forward", "ph": "X"}.items() <= spans[0].items()
    assert spans[0]["dur"] == pytest.approx(2000, rel=1e-3)


def test_time_between_calls_is_no_bubble(tmp_path):
    recorder = trace.Recorder(0, 0, str(tmp_path))
    for start in (0, 1000):  # an evaluation of a second lies between two calls
        recorder.add(Op.FORWARD, 0, start * MS, (start + 9) * MS)
        recorder.add_call(start * MS, (start + 10) * MS)
    recorder.write()
    assert trace.bubble(trace.read(tmp_path))[0] == pytest.approx(0.1, abs=1e-3)


def test_folder_without_traces(tmp_path, capsys):
    assert main(["trace", str(tmp_path)]) == 2
    assert "no rank*.json" in capsys.readouterr().err
    (tmp_path / "rank0.json").write_text("{")
    with pytest.raises(ValueError, match="is not a noflush trace"):
        trace.read(tmp_path)


def test_progress_line():
    breakdown = {"seconds": 1, "forward": 2.0}
    line = progress_line(20, 1.25, 17, {"moe": 0.5}, 0.1, 8, [0.5, float("nan")], breakdown=breakdown)
    assert line == (
        "steps: 20 loss: 1.2500 (of step 17) moe: 0.5000 iter time (s): 0.100 samples/sec: 80.000 "
        "bubble: 50.0% (by stage: 50.0 -) ms an action: forward 2.00"
    )
    skipping = progress_line(20, 1.25, 17, {}, 0.1, 8, [0.5, 0.25], skipped=[0, 3], scale=2.0**15)
    assert skipping.endswith("(by stage: 50.0 25.0) skipped updates: 3 (by stage: 0 3) loss scale: 32768")
    nothing = progress_line(2, float("nan"), None, {}, 0.1, 8, [float("nan")])
    assert "loss: not known yet" in nothing
    assert "nan" not in nothing


def test_what_an_action_typically_takes_is_the_median_of_the_newest():
    recorder = trace.Recorder(0, 0)
    assert recorder.typical(Op.FORWARD) == 0.0
    for number, ms in enumerate([900, *[10, 20, 30] * 30]):  # the first one is long past
        recorder.add(Op.FORWARD, number, 0, ms * 1_000_000)
    recorder.add(Op.BACKWARD, 0, 0, 5_000_000)
    recorder.take_interval()
    assert recorder.typical(Op.FORWARD) == pytest.approx(0.02)
    assert recorder.typical(Op.BACKWARD) == pytest.approx(0.005)
