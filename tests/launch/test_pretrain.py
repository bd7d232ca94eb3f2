"""launch/pretrain_gpt.py as people use it: real text, evaluation, monitors, signals, resuming, a growing batch."""

from __future__ import annotations

import json
import os
import re
import signal
import time

import pytest

from noflush.launch.arguments.progress import Course
from noflush.launch.arguments.rampup import batch_size_at
from noflush.launch.arguments.understand import understand
from noflush.stage.checkpoint import newest_complete
from tests.launch.megatron import NADAMW, SMALL
from tests.launch.processes import Run
from tests.launch.walks import size_by_megatron

pytestmark = [pytest.mark.multiproc, pytest.mark.timeout(280)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Two prefixes of numbers as text, told apart by their tokens: below 30, and from 30 on."""
    from noflush.launch.preprocess_data import main

    folder = tmp_path_factory.mktemp("corpus")
    for name, first in (("low", 0), ("high", 30)):
        lines = [{"text": " ".join(str(first + (i * j) % 29) for j in range(1, 90))} for i in range(60)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        command = ["--input", str(folder / f"{name}.jsonl"), "--output-prefix", str(folder / name), "--append-eod"]
        assert main([*command, "--tokenizer-type", "NullTokenizer", "--vocab-size", "63", "--workers", "1"]) == 0
    return folder


def arguments(folder, more, config=None):
    path = folder / "ds_config.json"
    path.write_text(json.dumps(config or {"optimizer": NADAMW, "async_pipeline": {"enabled": True}}))
    small = SMALL.replace("--mock-data", "")
    return [*small.split(), "--log-interval", "1", "--deepspeed_config", str(path), *more.split()]


def finish(run, timeout=120):
    codes = run.wait(timeout)
    assert codes == [0] * len(codes), "\n".join(run.text(rank) for rank in range(len(codes)))
    return run.losses()


def test_real_data_evaluation_monitors_and_resuming_at_the_sample(corpus, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    common = (
        f"--pipeline-model-parallel-size 2 --data-path 0.7 {corpus}/low_text_document 0.3 {corpus}/high_text_document "
        f"--split 8,1,1 --data-cache-path {tmp_path}/cache --eval-interval 4 --eval-iters 2 --eod-mask-loss "
        "--reset-position-ids --reset-attention-mask --dataloader-type single --num-workers 1 "
    )
    save = tmp_path / "save"
    monitors = (
        f"--tensorboard-dir {tmp_path}/board --log-timers-to-tensorboard --log-validation-ppl-to-tensorboard "
        f"--wandb-project p --wandb-exp-name e --wandb-save-dir {tmp_path} --log-throughput "
    )
    whole = Run(
        arguments(tmp_path, f"{common} {monitors} --train-iters 10 --save {save} --save-interval 6"),
        2,
        tmp_path,
        "whole",
    )
    losses = finish(whole)
    text = whole.text(-1)
    assert sorted(losses) == list(range(1, 11))
    line = text[text.index("iteration        8/      10") :].split("\n")[0]
    parts = """consumed samples:           16 |elapsed time per iteration (ms): |learning rate: |loss scale: 1.0
        |grad norm: |global batch size: |number of skipped iterations:   0|bubble: |delay: 1 |throughput per GPU"""
    for part in parts.split("|"):
        assert part.strip() in line, line
    assert re.findall(r"(\w+) loss at iteration (\d+)", text) == [
        ("validation", "4"), ("validation", "8"), ("validation", "10"), ("test", "10"),
    ]  # fmt: skip
    board = EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    written = {event.step: event.value for event in board.Scalars("lm loss")}
    assert written == pytest.approx({iteration: float(loss) for iteration, loss in losses.items()}, rel=1e-6)
    assert {"learning-rate", "grad-norm", "bubble", "delay", "lm loss vs samples", "lm loss validation ppl",
            "iteration-time", "batch-size", "throughput"} <= set(board.Tags()["scalars"])  # fmt: skip
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert newest_complete(save) == "global_step10"

    again = f"{common} --train-iters 10 --load {save} --ckpt-step 6"
    resumed = Run(arguments(tmp_path, again), 2, tmp_path, "resumed")
    after = finish(resumed)
    assert "at iteration 6" in resumed.text(0)
    assert after == {iteration: losses[iteration] for iteration in range(7, 11)}
    validated = re.findall(r"validation loss at iteration (\d+) \| lm loss value: (\S+)", text)
    assert re.findall(r"validation loss at iteration (\d+) \| lm loss value: (\S+)", resumed.text(-1)) == validated[1:]


MUON = "--optimizer muon --muon-use-nesterov --muon-extra-scale-factor 0.2"
AHEAD = {"type": "DelayAwareMuon", "params": {"look_ahead": 0.5}}


@pytest.mark.parametrize(
    ("more", "section"),
    [(MUON, None), ("", AHEAD), ("--bf16 --swiglu", AHEAD), ("--optimizer soap", None)],
    ids=["muon", "muon with a look-ahead", "bf16", "soap"],
)
def test_a_rule_of_matrices_resumes_where_it_stopped(more, section, tmp_path):
    """As never having stopped: momentum and bases are there, and a look-ahead starts from the true weights."""
    config = {"async_pipeline": {"enabled": True}} | ({} if section is None else {"optimizer": section})
    save, common = tmp_path / "save", f"--mock-data --pipeline-model-parallel-size 2 --train-iters 10 {more}"
    whole = Run(arguments(tmp_path, f"{common} --save {save} --save-interval 6", config), 2, tmp_path, "whole")
    losses = finish(whole)
    assert sorted(losses) == list(range(1, 11))
    assert "DelayAware" in whole.text(0) or section
    again = f"{common} --load {save} --ckpt-step 6"
    assert finish(Run(arguments(tmp_path, again, config), 2, tmp_path, "again")) == {n: losses[n] for n in range(7, 11)}


@pytest.mark.parametrize("victim", [0, 1])
def test_a_signal_to_one_rank_saves_and_ends_all_at_the_same_iteration(victim, tmp_path):
    save = tmp_path / "save"
    more = f"--mock-data --pipeline-model-parallel-size 2 --save {save} --load {save} --exit-signal-handler"
    run = Run(arguments(tmp_path, f"{more} --train-iters 100000"), 2, tmp_path, "told")
    deadline = time.monotonic() + 90
    while len(run.losses()) < 5 and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(run.processes[victim].pid, signal.SIGUSR1)
    losses = finish(run, 60)
    last = max(losses)
    assert newest_complete(save) == f"global_step{last}"
    assert f"stopped at iteration {last}: " in run.text(0)
    assert re.match(rf"iteration {last} of 100000, (SIGUSR1|asked by another rank)\n$", (save / "stopped").read_text())
    more = f"{more} --train-iters {last + 3} --override-opt_param-scheduler"
    again = Run(arguments(tmp_path, more), 2, tmp_path, "again")
    assert sorted(finish(again)) == [last + 1, last + 2, last + 3]
    assert not (save / "stopped").exists()


def test_exit_interval_and_duration(tmp_path):
    more = "--mock-data --pipeline-model-parallel-size 2 --train-iters 100000"
    assert max(finish(Run(arguments(tmp_path, f"{more} --exit-interval 7"), 2, tmp_path, "interval"))) == 7
    save = tmp_path / "save"
    timed = Run(arguments(tmp_path, f"{more} --exit-duration-in-mins 0 --save {save}"), 2, tmp_path, "duration")
    losses = finish(timed)
    assert max(losses) < 10
    assert newest_complete(save) == f"global_step{max(losses)}"
    assert (save / "stopped").read_text() == f"iteration {max(losses)} of 100000, after 0 minutes\n"


def figures(run):
    """Batch size, samples consumed and learning rate of every iteration, as printed."""
    patterns = (r"global batch size: +(\d+)", r"consumed samples: +(\d+)", r"learning rate: (\S+)")
    return [[float(number) for number in re.findall(pattern, run.text(-1))] for pattern in patterns]


def test_a_batch_that_grows_and_another_one_after_resuming(tmp_path):
    """2, 4, 6, 8 samples, over the first 24, as Megatron ramps up; then to the last sample, where the rate is least."""
    more = "--mock-data --pipeline-model-parallel-size 2 --global-batch-size 8 --rampup-batch-size 2 2 24"
    more += f" --train-iters 10 --save {tmp_path}/save --save-interval 7"
    run = Run(arguments(tmp_path, more), 2, tmp_path, "ramp")
    assert len(finish(run)) == 10
    sizes, consumed, rates = figures(run)
    assert sizes == [2, 2, 2, 2, 4, 4, 6, 6, 8, 8]
    assert consumed == [sum(sizes[: i + 1]) for i in range(10)]
    assert (rates[2], rates[9]) == (3e-3, 1e-4)
    more = "--mock-data --pipeline-model-parallel-size 2 --global-batch-size 12 --train-iters 10"
    more += f" --load {tmp_path}/save --ckpt-step 7 --override-opt_param-scheduler"
    again = Run(arguments(tmp_path, more), 2, tmp_path, "again")
    assert sorted(finish(again)) == [8, 9, 10]
    sizes, consumed, rates = figures(again)
    assert (sizes, consumed) == ([12, 12, 12], [34, 46, 58])
    assert rates[2] == 1e-4 < rates[1]


def test_the_ramp_is_that_of_megatron_core(tmp_path):
    settings, _ = understand(arguments(tmp_path, "--mock-data --global-batch-size 48 --rampup-batch-size 16 8 1000"), 1)
    for consumed in [*range(0, 1100, 7), 249, 250, 251, 1000, 1001]:
        assert batch_size_at(settings.batch, consumed) == size_by_megatron(settings.batch, consumed), consumed
    for samples in (16, 100, 1000, 1500, 5000):
        iterations = consumed = 0
        while consumed + batch_size_at(settings.batch, consumed) <= samples:
            consumed += batch_size_at(settings.batch, consumed)
            iterations += 1
        assert Course(settings.batch).iterations_at(samples) == iterations
