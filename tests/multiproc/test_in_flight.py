"""A checkpoint disturbs nothing: a run that saves has the bits of one that does not, and so has one that resumes.

Dropout is on. The run that never saves is held to the simulator elsewhere (`test_exact`, `test_tied`); here it is the
oracle.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import logging
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from noflush.demo.gpt import next_token_loss
from noflush.stage.not_written import NotWrittenError
from tests.multiproc import training as t
from tests.multiproc.ranks import run_ranks

pytestmark = pytest.mark.multiproc

MUON = {"type": "DelayAwareMuon", "params": {"lr": 3e-3, "look_ahead": 0.5}}
NAG = {"type": "DelayAwareNAG", "params": {"lr": 3e-3, "look_ahead": 0.5}}
WARM_UP = {"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 3e-3, "warmup_num_steps": 20}}}
ZERO = {"zero_optimization": {"stage": 1}}
BF16 = {"bf16": {"enabled": True}}


class Counting(nn.Module):
    """Dropout, and a buffer that counts the micro-batches that it has seen."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(1))
        self.dropout = nn.Dropout(0.2)

    def forward(self, x):
        if self.training:
            self.seen += 1
        return self.dropout(x)


def with_dropout(gpt=None):
    return [nn.Sequential(layer, Counting()) if type(layer).__name__ == "Block" else layer for layer in t.layers(gpt)]


def build(stages, config, dp=1):
    import deepspeed
    from deepspeed.pipe import PipelineModule

    losses = []

    def loss_fn(outputs, labels):
        loss = next_token_loss(outputs, labels)
        if torch.is_grad_enabled():
            losses.append(loss.item())
        return loss

    layers = with_dropout()
    module = PipelineModule(layers, num_stages=stages, loss_fn=loss_fn, partition_method="type:Sequential")
    engine, *_ = deepspeed.initialize(model=module, config=config)
    torch.manual_seed(100 + engine.stage_id)  # DeepSpeed saves what a script saves for one replica
    return engine, losses


def stream(engine, gas, calls, done=0):
    seed = 1 + 100 * engine.grid.get_data_parallel_rank()
    return itertools.islice(iter(t.data(gas * calls, seed=seed)), gas * done, None)


def state(engine):
    return (
        [p.detach().clone() for p in engine.module.parameters()],
        [b.clone() for b in engine.module.buffers()],
        engine.get_lr(),
    )


def run(engine, losses, data, calls, save=lambda call: None):
    """What was computed, what train_batch returned, every loss learnt, and the state before a drain and after it."""
    losses.clear()
    returned, learnt = [], {}
    for call in calls:
        returned.append(repr(engine.train_batch(data).item()))  # nan where nothing is known yet
        learnt.update(engine.batch_losses())
        save(call)
    between = state(engine)
    engine.drain()
    learnt.update(engine.batch_losses())
    return list(losses), returned, learnt, between, state(engine)


def undisturbed_and_saved(rank, stages, gas, config, folder, saves, calls=8):
    """The same run twice: without saves, and with them."""
    found = []
    for do_save in (False, True):
        engine, losses = build(stages, config)

        def save(call, engine=engine, do_save=do_save):
            if do_save and call in saves:
                engine.save_checkpoint(folder, client_state={"random": torch.get_rng_state()})

        found.append(run(engine, losses, stream(engine, gas, calls), range(1, calls + 1), save))
    return found


def resumed(rank, stages, gas, config, folder, saves, calls=8):
    """The rest of the run from each save on; the engine that loads the second has trained on the rest of the first."""
    engine, losses = build(stages, config)
    found = {}
    for at in saves:
        _, client = engine.load_checkpoint(folder, tag=f"global_step{at}")
        torch.set_rng_state(client["random"])
        found[at] = run(engine, losses, stream(engine, gas, calls, done=at), range(at + 1, calls + 1))
        engine.train_batch(iter(t.data(gas, seed=77)))  # and has something in flight
    return found


def assert_same(mine, theirs):
    (weights, buffers, lr), (others, their_buffers, their_lr) = mine, theirs
    assert lr == their_lr
    for got, want in zip([*weights, *buffers], [*others, *their_buffers], strict=True):
        assert torch.equal(got, want), (got - want).abs().max()


def assert_undisturbed(world, gas, saves, **run):
    """Runs ``undisturbed_and_saved`` and ``resumed``, and compares all that they return."""
    run |= {"gas": gas, "saves": saves}
    whole = run_ranks(undisturbed_and_saved, world, **run)
    rests = run_ranks(resumed, world, **run)
    for ((losses, returned, learnt, *states), saved), rest in zip(whole, rests, strict=True):
        assert saved[:3] == (losses, returned, learnt)
        for mine, theirs in zip(saved[3:], states, strict=True):
            assert_same(mine, theirs)
        for at, (losses_again, returned_again, learnt_again, *states_again) in rest.items():
            assert losses_again == losses[at * gas :]
            assert returned_again == returned[at:]
            assert learnt_again == {step: learnt[step] for step in learnt_again}
            assert set(learnt) - set(learnt_again) <= set(range(1, at + 1))
            for mine, theirs in zip(states_again, states, strict=True):
                assert_same(mine, theirs)


CASES = {
    "P2": (2, 1, {}, t.NADAMW, {}),
    "P3-K2": (3, 2, {}, t.NADAMW, {}),
    "P4": (4, 1, {}, t.NADAMW, {}),
    "P4-K2-within-a-batch": (4, 2, {}, t.NADAMW, {}),
    "P4-K4": (4, 4, {}, t.NADAMW, {}),
    "P4-extra": (4, 1, {"extra_in_flight": 3}, t.NADAMW, {}),
    "P3-2bw": (3, 2, {"weights": "2bw"}, t.NADAMW, {}),
    "P3-torch": (3, 2, {}, t.ADAMW, {}),
    "P3-muon": (3, 1, {}, MUON, {}),
    "P4-K2-nag": (4, 2, {}, NAG, {}),
    "P2-flush": (2, 2, {"schedule": "1f1b_flush"}, t.NADAMW, {}),
    "P3-bf16": (3, 2, {}, MUON, BF16),
    "P3-bf16-torch": (3, 2, {}, t.ADAMW, BF16),
    "P3-int8": (3, 2, {"wire": "int8"}, t.NADAMW, {}),
    "P3-aligned": (3, 1, {"eval_weights": "aligned"}, t.NADAMW, {}),
    "P3-late-norm": (3, 1, {"clip": "lagged_global"}, t.NADAMW, {"gradient_clipping": 0.05}),
    "P3-zero": (3, 1, {}, t.NADAMW, ZERO),
    "P3-zero-torch": (3, 1, {}, t.ADAMW, ZERO),
}


SLOW = set(CASES) - {"P2", "P4-K2-within-a-batch", "P3-muon", "P3-bf16"}


@pytest.mark.parametrize(
    ("stages", "gas", "block", "optimizer", "more"),
    [pytest.param(*case, id=name, marks=[pytest.mark.slow] * (name in SLOW)) for name, case in CASES.items()],
)
def test_saves_disturb_nothing_and_a_resumed_run_never_stopped(tmp_path, stages, gas, block, optimizer, more):
    config = t.ds_config(gas, optimizer, block, **WARM_UP, **more)
    assert_undisturbed(stages, gas, (5, 1, 2), stages=stages, config=config, folder=str(tmp_path))


@pytest.mark.parametrize(
    "more", [pytest.param({}, marks=pytest.mark.slow), ZERO | BF16], ids=["float32", "bf16 ZeRO-1"]
)
def test_replicas_too_each_with_its_own_data(tmp_path, more):
    config = t.ds_config(2, MUON, {"extra_in_flight": 2}, **more)
    assert_undisturbed(4, 2, (5, 2), stages=2, config=config, folder=str(tmp_path))


def test_without_old_versions_a_save_drains_and_says_so_once(tmp_path):
    config = t.ds_config(1, t.NADAMW, {"weights": "latest"})
    first, second = run_ranks(save_twice, 2, config=config, folder=str(tmp_path))
    assert first.count("every save drains the pipeline, because weights 'latest' keep no") == 1
    assert "drains" not in second
    assert not list(tmp_path.rglob("in_flight*"))


def save_twice(rank, config, folder):
    engine, _ = build(2, config)
    data = stream(engine, 1, 4)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        for _ in range(2):
            engine.train_batch(data)
            engine.train_batch(data)
            engine.save_checkpoint(folder)
            assert engine.updates == engine.global_steps
    return said.getvalue()


def save_full(rank, folder, calls=5, tag=None, drained=False, stages=3, gas=1):
    engine, _ = build(stages, t.ds_config(gas, t.NADAMW, {}, **WARM_UP))
    data = stream(engine, gas, calls)
    for _ in range(calls):
        engine.train_batch(data)
    engine.save_checkpoint(folder, tag=tag)
    updates = engine.updates
    if drained:
        engine.drain()
        engine.save_checkpoint(folder, tag=tag)
    return updates, engine.get_lr()


def load_with_another_gas(rank, folder):
    said = []
    logging.getLogger("noflush").addHandler(type("Kept", (logging.Handler,), {"emit": lambda _, r: said.append(r)})())
    engine, _ = build(3, t.ds_config(2, t.NADAMW, {}, **WARM_UP))
    engine.load_checkpoint(folder)
    at = engine.updates, engine.global_steps, engine.pipeline_stage.runner.calls, engine.get_lr()
    engine.train_batch(stream(engine, 2, 1))
    return at, [record.getMessage() for record in said]


def test_another_schedule_fills_the_pipeline_anew_and_says_so(tmp_path):
    saved = run_ranks(save_full, 3, folder=str(tmp_path))
    assert [updates for updates, _ in saved] == [3, 4, 5]
    loaded = run_ranks(load_with_another_gas, 3, folder=str(tmp_path))
    for (updates, steps, calls, lr), _ in loaded:
        assert (updates, steps, calls) == (5, 5, 0)
        assert lr == saved[-1][1]  # the rates go on where the run does, not where a stage was
    (line,) = loaded[0][1]
    assert "gas 1 is 2 now; the pipeline fills anew, and the micro-batches that were in flight are lost" in line
    assert [lines for _, lines in loaded[1:]] == [[], []]


def load_here(rank, folder):
    engine, _ = build(3, t.ds_config(1, t.NADAMW, {}, **WARM_UP))
    engine.load_checkpoint(folder)
    return engine.updates, engine.loss_step


def test_a_part_that_is_missing_is_an_error_on_every_rank(tmp_path):
    run_ranks(save_full, 3, folder=str(tmp_path))
    (tmp_path / "global_step5" / "in_flight_dp_rank_00_mp_rank_01.pt").unlink()
    for kind, message in run_ranks(load_here, 3, expect_errors=True, folder=str(tmp_path)):
        assert kind == "CheckpointError"
        assert "is incomplete: in_flight_dp_rank_00_mp_rank_01.pt missing" in message
    for path in (tmp_path / "global_step5").glob("in_flight*"):
        path.unlink()
    assert run_ranks(load_here, 3, folder=str(tmp_path)) == [(5, None)] * 3


def test_a_drained_save_leaves_nothing_of_an_older_one_of_its_name(tmp_path):
    run_ranks(save_full, 3, folder=str(tmp_path), tag="best", drained=True)
    assert not list(tmp_path.rglob("in_flight*"))
    assert run_ranks(load_here, 3, folder=str(tmp_path)) == [(5, None)] * 3


def stop_and_save(rank, folder):
    engine, _ = build(3, t.ds_config(1, t.NADAMW, {}))
    data = stream(engine, 1, 30)
    for call in range(30):
        if call == 4 and rank == 2:
            engine.request_stop()
        engine.train_batch(data)
        if call == 5:
            engine.save_checkpoint(folder)  # while the request is on its way up, in a gradient message
        if engine.stop_requested:
            break
    return engine.global_steps


def go_on_unasked(rank, folder):
    engine, _ = build(3, t.ds_config(1, t.NADAMW, {}))
    engine.load_checkpoint(folder)
    data = stream(engine, 1, 30, done=6)
    for _ in range(10):
        engine.train_batch(data)
    return engine.stop_requested


def test_a_resumed_run_is_not_asked_to_stop_as_the_one_before_it_was(tmp_path):
    (steps,) = set(run_ranks(stop_and_save, 3, folder=str(tmp_path)))
    assert 6 < steps < 20
    assert run_ranks(go_on_unasked, 3, folder=str(tmp_path)) == [False] * 3


def train_at_a_chosen_depth(rank, folder):
    engine, _ = build(3, t.ds_config(1, t.NADAMW, {"extra_in_flight": "auto"}))
    data = stream(engine, 1, 9)
    engine.pipeline_stage.change_extra(3)  # as if it had been measured
    losses = [engine.train_batch(data).item() for _ in range(6)]
    engine.save_checkpoint(folder, client_state={"random": torch.get_rng_state()})
    return losses, [engine.train_batch(data).item() for _ in range(3)]


def go_on_at_that_depth(rank, folder):
    engine, _ = build(3, t.ds_config(1, t.NADAMW, {"extra_in_flight": "auto"}))
    _, client = engine.load_checkpoint(folder)
    torch.set_rng_state(client["random"])
    data = stream(engine, 1, 9, done=6)
    return engine.schedule.extra_in_flight, [engine.train_batch(data).item() for _ in range(3)]


def test_a_depth_that_was_chosen_is_gone_on_with(tmp_path):
    """Until it is measured again, some calls later."""
    whole = run_ranks(train_at_a_chosen_depth, 3, folder=str(tmp_path))
    for (_, losses), (extra, again) in zip(whole, run_ranks(go_on_at_that_depth, 3, folder=str(tmp_path)), strict=True):
        assert extra == 3
        assert [repr(loss) for loss in again] == [repr(loss) for loss in losses]


def save_in_the_background(rank, folder, ends_at_once):
    engine, _ = build(3, t.ds_config(1, MUON, {"async_save": True}, **WARM_UP))
    written = threading.Event()
    real = type(engine.checkpoint_engine).save

    def slow(self, state, path):
        written.wait(60)
        real(self, state, path)

    type(engine.checkpoint_engine).save = slow
    try:
        data = stream(engine, 1, 12)
        for _ in range(4):
            engine.train_batch(data)
            engine.batch_losses()
        engine.save_checkpoint(folder, client_state={"random": torch.get_rng_state()})
        for _ in range(3):
            engine.train_batch(data)  # goes on over the weights that are being written
        there = sorted(path.name for path in Path(folder).iterdir())
        written.set()
        if ends_at_once:
            engine.finish_saves()
        else:
            found = [False] * 3
            while not all(found):
                time.sleep(0.05)
                engine.train_batch(iter(t.data(1)))
                dist.all_gather_object(found, Path(folder, "latest").exists())
        dist.barrier()
        return there, sorted(path.name for path in Path(folder).iterdir())
    finally:
        type(engine.checkpoint_engine).save = real


@pytest.mark.parametrize(
    "ends_at_once", [pytest.param(True, marks=pytest.mark.slow), False], ids=["waited for", "while training goes on"]
)
def test_a_checkpoint_is_written_while_training_goes_on(tmp_path, ends_at_once):
    """What is written are the copies: the resumed run is that of a blocking save, in place only when all is written."""
    config = t.ds_config(1, MUON, {}, **WARM_UP)
    blocking, background = tmp_path / "blocking", tmp_path / "background"
    run_ranks(undisturbed_and_saved, 3, stages=3, gas=1, config=config, folder=str(blocking), saves=(4,))
    found = run_ranks(save_in_the_background, 3, folder=str(background), ends_at_once=ends_at_once)
    for before, after in found:
        assert before == ["global_step4.partial"]
        assert after == ["global_step4", "latest"]
    ours, theirs = (sorted((folder / "global_step4").iterdir()) for folder in (background, blocking))
    assert [path.name for path in ours] == [path.name for path in theirs]
    run = {"stages": 3, "gas": 1, "config": config, "saves": (4,)}
    rests = [run_ranks(resumed, 3, folder=str(folder), **run) for folder in (background, blocking)]
    for (mine,), (other,) in zip(*(map(dict.values, rest) for rest in rests), strict=True):
        assert mine[:3] == other[:3]
        assert_same(mine[4], other[4])


def fill_the_disk(rank, folder, background):
    engine, _ = build(2, t.ds_config(1, t.NADAMW, {"async_save": background}))
    engine.train_batch(stream(engine, 1, 1))
    engine.save_checkpoint(folder, tag="whole")
    if background:
        engine.finish_saves()
    real = type(engine.checkpoint_engine).save

    def full(self, state, path):
        if "layer_04" in path:  # on the last stage
            raise OSError(28, "No space left on device", path)
        real(self, state, path)

    type(engine.checkpoint_engine).save = full
    try:
        engine.save_checkpoint(folder, tag="next")
        engine.finish_saves()
    except NotWrittenError as error:
        return str(error), sorted(path.name for path in Path(folder).iterdir()), Path(folder, "latest").read_text()
    finally:
        type(engine.checkpoint_engine).save = real


@pytest.mark.parametrize("background", [False, True])
def test_a_file_that_cannot_be_written_is_one_error_on_every_rank(tmp_path, background):
    first, second = run_ranks(fill_the_disk, 2, folder=str(tmp_path), background=background)
    assert first[0] == second[0]
    assert "layer_04-model_states.pt could not be written: No space left on device" in first[0]
    assert "checkpoint whole is whole, and the newest" in first[0]
    assert (sorted(path.name for path in tmp_path.iterdir()), first[2]) == (["latest", "whole"], "whole")
