"""A checkpoint disturbs nothing: a run that saves has the bits of one that does not, and so has one that resumes.

Dropout is on. The run that never saves is held to the simulator elsewhere (`test_exact`, `test_tied`); here it is the
oracle.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import logging

import pytest
import torch
from deepspeed.runtime.activation_checkpointing import checkpointing
from torch import nn

from tests.multiproc import training as t
from tests.multiproc.ranks import run_ranks

pytestmark = pytest.mark.multiproc

MUON = {"type": "DelayAwareMuon", "params": {"lr": 3e-3, "look_ahead": 0.5}}
NAG = {"type": "DelayAwareNAG", "params": {"lr": 3e-3, "look_ahead": 0.5}}
WARM_UP = {"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 3e-3, "warmup_num_steps": 20}}}
ZERO = {"zero_optimization": {"stage": 1}}
BF16 = {"bf16": {"enabled": True}}


class Counting(nn.Module):
    """Dropout, from torch's numbers and from the tracker's, as Megatron's layers; and buffers.

    One counts the micro-batches that it has seen, of the other backward has need, as of a table of angles.
    """

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(1))
        self.register_buffer("gain", torch.full((1,), 1.25))
        self.dropout = nn.Dropout(0.2)

    def forward(self, x):
        if self.training:
            self.seen += 1
        with checkpointing.get_cuda_rng_tracker().fork("layers"):
            x = self.dropout(x)
        return self.dropout(x) * self.gain.to(x.dtype)


def with_dropout(gpt=None):
    return [nn.Sequential(layer, Counting()) if type(layer).__name__ == "Block" else layer for layer in t.layers(gpt)]


def build(stages, config, dp=1):
    import deepspeed
    from deepspeed.pipe import PipelineModule

    loss_fn, losses = t.recording()
    module = PipelineModule(with_dropout(), num_stages=stages, loss_fn=loss_fn, partition_method="type:Sequential")
    engine, *_ = deepspeed.initialize(model=module, config=config)
    tracker = checkpointing.get_cuda_rng_tracker()
    tracker.reset()
    tracker.add("layers", 500 + engine.stage_id)
    torch.manual_seed(100 + engine.stage_id)  # DeepSpeed saves what a script saves for one replica
    return engine, losses


def random_numbers():
    """What a script saves of them, and restores by `draw_on` after it has loaded."""
    tracked = checkpointing.get_cuda_rng_tracker().get_states()
    return {"torch": torch.get_rng_state(), "tracked": {name: state.clone() for name, state in tracked.items()}}


def draw_on(saved):
    torch.set_rng_state(saved["torch"])
    checkpointing.get_cuda_rng_tracker().set_states(dict(saved["tracked"]))


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
                engine.save_checkpoint(folder, client_state={"random": random_numbers()})

        found.append(run(engine, losses, stream(engine, gas, calls), range(1, calls + 1), save))
        engine.finish_saves()
    return found


def resumed(rank, stages, gas, config, folder, saves, calls=8):
    """The rest of the run from each save on; the engine that loads the second has trained on the rest of the first."""
    engine, losses = build(stages, config)
    found = {}
    for at in saves:
        _, client = engine.load_checkpoint(folder, tag=f"global_step{at}")
        draw_on(client["random"])
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


@pytest.mark.parametrize("background", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_replicas_on_which_deepspeeds_writer_writes_nothing_save_what_they_have_in_flight(background, tmp_path):
    writer = {"type": "PYTHON", "data_parallel": "SOCKET", "decoupled": False}
    config = t.ds_config(2, t.NADAMW, {"async_save": background}, checkpoint={"writer": writer})
    # Of the two replicas of a stage on this machine, the first one's socket writes.
    machine = {"CROSS_SIZE": "1", "CROSS_RANK": "0"}
    assert_undisturbed(4, 2, (5, 2), stages=2, config=config, folder=str(tmp_path), environment=machine)
    assert len(list(tmp_path.glob("global_step5/in_flight_dp_rank_01_*"))) == 2


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
    engine.save_checkpoint(folder, tag=tag, client_state={"random": random_numbers()})
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


def save_again(rank, folder):
    """A checkpoint of the run that has just resumed, twice: at once, and a call later, from which the rest follows."""
    engine, losses = build(4, t.ds_config(1, t.NADAMW, {}, **WARM_UP))
    _, client = engine.load_checkpoint(folder, tag="global_step5")
    engine.save_checkpoint(folder, tag="at once", client_state={"random": client["random"]})
    draw_on(client["random"])
    data = stream(engine, 1, 8, done=5)
    engine.train_batch(data)
    engine.save_checkpoint(folder, tag="later", client_state={"random": random_numbers()})
    first = run(engine, losses, data, range(7, 9))
    again, losses = build(4, t.ds_config(1, t.NADAMW, {}, **WARM_UP))
    _, client = again.load_checkpoint(folder, tag="later")
    draw_on(client["random"])
    return first, run(again, losses, stream(again, 1, 8, done=6), range(7, 9))


def equal(one, other):
    if isinstance(one, torch.Tensor):
        return torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other or one != one


def test_a_run_that_has_just_resumed_can_be_saved(tmp_path):
    run_ranks(save_full, 4, folder=str(tmp_path), stages=4)
    for (losses, returned, _, *states), (losses_again, returned_again, _, *states_again) in run_ranks(
        save_again, 4, folder=str(tmp_path)
    ):
        assert (losses, returned) == (losses_again, returned_again)
        for mine, theirs in zip(states, states_again, strict=True):
            assert_same(mine, theirs)
    for stage in range(4):
        name = f"in_flight_dp_rank_00_mp_rank_0{stage}.pt"
        before, after = (torch.load(tmp_path / tag / name, weights_only=False) for tag in ("global_step5", "at once"))
        assert equal(before, after), stage


def load_with_larger_micro_batches(rank, folder):
    config = t.ds_config(1, t.NADAMW, {}, **WARM_UP) | {"train_micro_batch_size_per_gpu": 4}
    engine, _ = build(3, config)
    engine.load_checkpoint(folder)
    assert engine.pipeline_stage.runner.calls == 0
    return engine.train_batch(iter(t.data(1, batch=4))).item()


def test_micro_batches_of_another_size_fill_the_pipeline_anew(tmp_path):
    run_ranks(save_full, 3, folder=str(tmp_path))
    assert run_ranks(load_with_larger_micro_batches, 3, folder=str(tmp_path))[-1] > 0


def load_where_a_kill_has_left_it(rank, folder):
    engine, _ = build(3, t.ds_config(1, t.NADAMW, {}, **WARM_UP))
    engine.load_checkpoint(folder)
    return engine.global_steps


@pytest.mark.parametrize("behind", [".partial", ".replaced"])
def test_a_checkpoint_that_was_about_to_be_put_in_place_is_found(behind, tmp_path):
    run_ranks(save_full, 3, folder=str(tmp_path))
    (tmp_path / "global_step5").rename(tmp_path / f"global_step5{behind}")
    assert run_ranks(load_where_a_kill_has_left_it, 3, folder=str(tmp_path)) == [5] * 3


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
    engine.save_checkpoint(folder, client_state={"random": random_numbers()})
    return losses, [engine.train_batch(data).item() for _ in range(3)]


def go_on_at_that_depth(rank, folder):
    engine, _ = build(3, t.ds_config(1, t.NADAMW, {"extra_in_flight": "auto"}))
    _, client = engine.load_checkpoint(folder)
    draw_on(client["random"])
    data = stream(engine, 1, 9, done=6)
    return engine.schedule.extra_in_flight, [engine.train_batch(data).item() for _ in range(3)]


def test_a_depth_that_was_chosen_is_gone_on_with(tmp_path):
    """Until it is measured again, some calls later."""
    whole = run_ranks(train_at_a_chosen_depth, 3, folder=str(tmp_path))
    for (_, losses), (extra, again) in zip(whole, run_ranks(go_on_at_that_depth, 3, folder=str(tmp_path)), strict=True):
        assert extra == 3
        assert [repr(loss) for loss in again] == [repr(loss) for loss in losses]
