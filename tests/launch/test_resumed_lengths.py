"""Runs resumed with another batch size: they end where they must, with the rates of there, against a walk."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from noflush.launch.arguments.parser import ArgumentsError
from noflush.launch.arguments.progress import position_in, steps_from, traced
from noflush.launch.arguments.settings import Checkpoints
from noflush.launch.data.datasets import samples_needed
from noflush.launch.pretrain_gpt import say_why
from noflush.launch.training import checkpoint
from noflush.launch.training.beside_weights import POSITION
from noflush.launch.training.learning_rate import rates_of
from tests.launch.walks import MAX, MIN, RAMP, Walk, is_linear, resumed, understood

OVERRIDE = "--override-opt_param-scheduler"


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


def test_what_is_less_than_a_batch_is_said_at_the_end(tmp_path, capsys):
    before = Walk(understood("--train-samples 48 --global-batch-size 4"), 1)
    run = resumed(tmp_path, before, "--train-samples 48 --global-batch-size 12")
    walk = Walk(run, before=before)
    assert walk.consumed == [4, 16, 28, 40]
    say_why(run, walk.position(), None)
    whole = understood("--train-iters 3 --global-batch-size 4")
    say_why(whole, Walk(whole).position(), None)
    said = "finished at iteration 4; 8 of 48 samples are left, less than a batch\nfinished at iteration 3\n"
    assert capsys.readouterr().out == said


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
        ('{"iteration": 6, "consumed": 24, "sizes": [[7, 4], [-1, 4]]}', "no position of a run"),
        ('{"iteration": 6, "consumed": 24, "sizes": [6, 4]}', "no position of a run"),
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
        lr_scheduler=rates_of(run)(optimizer),
        load_checkpoint=lambda *_, **__: ("", {"noflush": dataclasses.asdict(before.position())}),
    )
    where = Checkpoints("", str(tmp_path), "global_step6", False, False, False, False, False, False)
    position = checkpoint.load(engine, where, "global_step6")
    assert position == before.position()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(before.rates[-1])


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            ValueError("loaded state dict has a different number of parameter groups"),
            "give --apply-wd-to-all, or leave",
        ),
        (AssertionError("OptimizerParamScheduler: class input value 56"), "others at another --global-batch-size"),
    ],
)
def test_a_refused_resume_says_what_to_give(error, said, tmp_path):
    def load_checkpoint(*_, **__):
        raise error

    where = Checkpoints("", str(tmp_path), "global_step6", False, True, False, False, False, False)
    with pytest.raises(ValueError, match=said):
        checkpoint.load(SimpleNamespace(load_checkpoint=load_checkpoint), where, "global_step6")


def test_an_evaluation_begins_behind_those_before_it():
    from noflush.launch.training.loop import evaluated_before

    # At iteration 0, by --skip-train; within the first interval; at its end; after it; at the end of the second.
    assert [evaluated_before(n, 4, 10) for n in (0, 1, 4, 5, 8)] == [0, 0, 0, 10, 10]
