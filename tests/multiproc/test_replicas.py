"""Groups of pipelines that average their weights: each is the simulator's to the bit, given when it heard of what."""

from __future__ import annotations

import itertools
import os
import threading
import time

import psutil
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from noflush.methods import DelayAwareMuon
from noflush.order.averaging import slice_of
from noflush.simulate import Precision
from tests.multiproc import training as t
from tests.multiproc.group_training import (
    RATE,
    assert_groups_same,
    block,
    nadamw,
    simulated,
    train_group,
    train_replicas,
)
from tests.multiproc.groups import lighthouse, lighthouse_process, run_groups
from tests.multiproc.ranks import run_ranks

pytestmark = pytest.mark.multiproc

MUON = {"type": "DelayAwareMuon", "params": {"lr": 3e-3, "look_ahead": 0.5}}
BF16 = {"bf16": {"enabled": True}}
FP16 = {"fp16": {"enabled": True}, "zero_optimization": {"stage": 1}}


def muon(params):
    return DelayAwareMuon(params, lr=3e-3, look_ahead=0.5)


@pytest.mark.parametrize("stages", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_two_groups_are_the_simulators(stages):
    seeds = (1, 50)
    with lighthouse(min_groups=2) as where:
        results = run_groups(
            train_group, stages, [{"name": f"g{n}", "seed": seed} for n, seed in enumerate(seeds)],
            where=where, stages=stages, calls=20,
        )  # fmt: skip
    assert_groups_same(results, simulated(results, seeds, stages, nadamw))
    for rank in (rank for result in results for rank in result):
        assert len(rank["exchanges"]) >= 3
        assert all(exchange.applied_at > exchange.sent_at for exchange in rank["exchanges"])
        assert 60 + 3 * 3 <= rank["of_all"] <= 120  # three samples an update, forty of them
        elements = sum(p.numel() for p in rank["weights"])
        for before, one in itertools.pairwise(rank["exchanges"]):
            # What the simulator is told is what was to be done.
            assert (one.start, one.length) == slice_of(one.number, elements, 0.3)
            (mine,) = [part for part in one.parts if part.key == rank["key"]]
            assert mine.update == one.sent_at
            if one.number == before.number + 1:
                assert mine.samples == 3 * (one.sent_at - before.sent_at)
    # Of several slices, which differ from group to group no more than from what was learnt since.
    assert len({exchange.start for exchange in results[0][0]["exchanges"]}) >= 3


CASES = {
    "drift kept": ({"extra": {"drift": "none"}}, nadamw, {"drift": "none"}),
    "K=2": ({"gas": 2}, nadamw, {"gas": 2}),
    "all weights at once": ({"extra": {"fraction": 1.0, "average_every": 2}}, nadamw, {}),
    "look-ahead": ({"optimizer": MUON}, muon, {}),
    "torch's AdamW": ({"optimizer": t.ADAMW}, t.adamw, {}),
    "bf16": ({"more": BF16}, nadamw, {"precision": Precision(torch.bfloat16)}),
    "bf16 look-ahead": ({"more": BF16, "optimizer": MUON}, muon, {"precision": Precision(torch.bfloat16)}),
}


@pytest.mark.parametrize(
    "name", [name if name == "bf16" else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_so_they_are_in_every_form(name):
    run, make_optimizer, simulation = CASES[name]
    seeds = (1, 50)
    with lighthouse(min_groups=2) as where:
        results = run_groups(
            train_group, 2, [{"name": f"g{n}", "seed": seed} for n, seed in enumerate(seeds)],
            where=where, stages=2, calls=14, **run,
        )  # fmt: skip
    assert all(rank["exchanges"] for result in results for rank in result)
    assert_groups_same(results, simulated(results, seeds, 2, make_optimizer, **simulation))


WARM_UP = {"type": "WarmupLR", "params": {"warmup_max_lr": 3e-3, "warmup_num_steps": 80}}


def warming_up(optimizer):
    from deepspeed.runtime.lr_schedules import WarmupLR

    return WarmupLR(optimizer, warmup_max_lr=3e-3, warmup_num_steps=80)


def test_a_group_that_leaves_and_one_that_joins(tmp_path):
    """The third starts from a living peer's weights and moments, stage by stage, while that trains on."""
    left = tmp_path / "left"
    per_group = [
        {"name": "stays", "seed": 1, "calls": 110},
        {"name": "leaves", "seed": 50, "calls": 12, "leaves": str(left)},
        {"name": "joins", "seed": 90, "calls": 30, "when": str(left)},
    ]
    with lighthouse(min_groups=1) as where:
        results = run_groups(train_group, 2, per_group, where=where, stages=2, slow=0.1, more={"scheduler": WARM_UP})
    stays, _, joins = results
    assert joins[0]["born"] == joins[1]["born"] == max(rank["born_of"][1] for rank in joins) > 12
    assert {rank["born_of"][0] for rank in joins} == {stays[0]["key"]}
    assert any(len([part for part in one.parts if part.samples]) == 2 for one in joins[0]["exchanges"])
    assert stays[0]["of_all"] > 3 * (110 + 6 + 6)  # those of the one that has left too
    assert_groups_same(results, simulated(results, (1, 50, 90), 2, nadamw, make_lr_scheduler=warming_up))


@pytest.mark.slow
def test_the_lighthouse_may_die_and_come_back(tmp_path):
    """Meanwhile each goes on alone, and both are the simulator's all the time."""
    begun = tmp_path / "begun"

    def strike(server):
        while not begun.exists():
            time.sleep(0.05)
        server.kill()
        time.sleep(4)
        server.start()

    per_group = [{"name": "a", "seed": 1, "begun": str(begun)}, {"name": "b", "seed": 50}]
    with lighthouse_process(min_groups=2) as server:
        threading.Thread(target=strike, args=(server,), daemon=True).start()
        results = run_groups(
            train_group, 2, per_group, where=server.address, stages=2, calls=160, slow=0.1, extra={"timeout_s": 3.0}
        )
    assert_groups_same(results, simulated(results, (1, 50), 2, nadamw))
    for rank in (rank for result in results for rank in result):
        sent = [one.sent_at for one in rank["exchanges"] if len(one.parts) == 2]
        gaps = [after - before for before, after in itertools.pairwise(sent)]
        assert max(gaps) > 20  # about four seconds, and what a round took to be given up
        assert sent[-1] > 140


DECAY = {"type": "WarmupDecayLR", "params": {"warmup_max_lr": 3e-3, "warmup_num_steps": 4, "total_num_steps": 40}}


def decaying(optimizer):
    from deepspeed.runtime.lr_schedules import WarmupDecayLR

    return WarmupDecayLR(optimizer, warmup_max_lr=3e-3, warmup_num_steps=4, total_num_steps=40)


@pytest.mark.slow
def test_a_slow_group_counts_less_and_its_schedule_keeps_up():
    per_group = [{"name": "fast", "seed": 1, "calls": 40, "slow": 0.05}]
    per_group += [{"name": "slow", "seed": 50, "calls": 10, "slow": 0.2}]
    with lighthouse(min_groups=2) as where:
        results = run_groups(train_group, 2, per_group, where=where, stages=2, more={"scheduler": DECAY})
    assert_groups_same(results, simulated(results, (1, 50), 2, nadamw, make_lr_scheduler=decaying))
    fast, slow = ([one for one in result[1]["exchanges"] if len(one.parts) == 2] for result in results)
    samples = {part.key: part.samples for part in slow[-1].parts}
    assert samples[results[1][0]["key"]] < samples[results[0][0]["key"]]
    assert sum(one.caught_up for one in slow) > 3
    assert sum(one.caught_up for one in fast) == 0


@pytest.mark.parametrize("stages", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_in_step_they_are_data_parallelism(stages):
    calls = 8
    with lighthouse(min_groups=2) as where:
        results = run_groups(
            train_group, stages, [{"name": f"g{n}", "seed": seed} for n, seed in enumerate((1, 50))],
            where=where, stages=stages, calls=calls, extra={"mode": "sync"}, slow=0.0,
        )  # fmt: skip
    replicas = run_ranks(train_replicas, 2 * stages, stages=stages, calls=calls, seeds=(1, 50))
    for number, result in enumerate(results):
        whole = replicas[number::2]
        assert result[-1]["losses"] == whole[-1][0]
        for rank, (_, weights) in zip(result, whole, strict=True):
            for got, want in zip(rank["weights"], weights, strict=True):
                assert torch.equal(got, want)


def draw_samples(rank, where, name, calls, stages=2):
    """Every sample is its own number; what both stages that read it saw."""
    engine = t.build(stages, t.ds_config(2, RATE, block(where, name=name)))
    count, sequence = 96, t.GPT["sequence"]
    rows = torch.arange(count).unsqueeze(1).expand(count, sequence)
    seen = []
    data = TensorDataset(rows)
    sampler = engine.group_samples(count, seed=7)

    def batches():
        for (numbers,) in DataLoader(data, batch_size=3, sampler=sampler):
            seen.append(numbers[:, 0].tolist())
            tokens = numbers % t.GPT["vocabulary"]
            yield tokens, tokens

    stream = batches()
    for _ in range(calls):
        engine.train_batch(stream)
    engine.drain()
    return [sample for batch in seen for sample in batch]


def test_groups_draw_disjoint_samples_of_one_order():
    with lighthouse(min_groups=2) as where:
        results = run_groups(draw_samples, 2, [{"name": "a", "calls": 7}, {"name": "b", "calls": 7}], where=where)
    for first, last in results:
        assert first == last
        assert len(first) == 7 * 2 * 3
    a, b = (set(result[0]) for result in results)
    assert len(a) == len(b) == 42
    assert not a & b
    in_order = torch.randperm(96, generator=torch.Generator().manual_seed(7)).tolist()
    assert a | b == set(in_order[:84])


def train_or_say(rank, where, name, calls, extra, when=None, begun=None):
    try:
        return train_group(rank, where, name, 1, 2, calls, extra=extra, when=when, begun=begun, slow=0.1)["losses"]
    except ConnectionError as error:
        return str(error)


@pytest.mark.slow
def test_a_group_of_another_configuration_is_told_so_and_harms_nobody(tmp_path):
    begun = tmp_path / "begun"
    per_group = [
        {"name": "right", "calls": 120, "extra": {"timeout_s": 2.0}, "begun": str(begun)},
        {"name": "wrong", "calls": 5, "extra": {"timeout_s": 2.0, "fraction": 1.0}, "when": str(begun)},
    ]
    with lighthouse() as where:
        (_, losses), wrong = run_groups(train_or_say, 2, per_group, where=where)
    assert len(losses) == 120
    for said in wrong:
        assert "has fraction 0.3, this one 1.0" in said or "has fraction 1.0, this one 0.3" in said


def load_after_joining(rank, where, name, folder):
    engine = t.build(2, t.ds_config(1, RATE, block(where, name=name, average_every=2)))
    engine.group.join()
    for call in range(12):
        if call == 4:
            engine.save_checkpoint(folder)
        if call == 9:
            engine.load_checkpoint(folder)
        engine.train_batch(iter(t.data(1, seed=call)))
        time.sleep(0.05)
    engine.drain()
    return [part.samples for one in engine.group.averager.exchanges for part in one.parts], engine.global_steps


@pytest.mark.slow
def test_a_checkpoint_that_is_loaded_while_others_train_voids_what_was_sent(tmp_path):
    per_group = [{"name": name, "folder": str(tmp_path / name)} for name in "ab"]
    with lighthouse(min_groups=2) as where:
        results = run_groups(load_after_joining, 2, per_group, where=where)
    for rank in (rank for result in results for rank in result):
        samples, steps = rank
        assert steps == 7
        assert samples
        assert min(samples) >= 0
        assert max(samples) <= 3 * 9


def train_and_say_where_it_listens(rank, where, name, seed, address):
    result = train_group(rank, where, name, seed, stages=2, calls=14, extra={"bind": address})
    own = psutil.Process().net_connections("inet")
    listening = [(c.laddr.ip, c.laddr.port) for c in own if c.status == psutil.CONN_LISTEN]
    # At the world's own meeting place torch listens everywhere.
    meeting = int(os.environ["MASTER_PORT"])
    return len(result["exchanges"]), [ip for ip, port in listening if port != meeting]


def test_a_group_listens_where_the_block_says_and_nowhere_else():
    """The first stage's store and manager, every stage's state, and gloo of the newest round."""
    address = "127.0.0.3"
    with lighthouse(min_groups=2) as where:
        results = run_groups(
            train_and_say_where_it_listens, 2, [{"name": f"g{n}", "seed": n} for n in (1, 50)],
            where=where, address=address,
        )  # fmt: skip
    for result in results:
        for stage, (exchanges, listening) in enumerate(result):
            assert exchanges
            assert not {"0.0.0.0", "::"} & {*listening}
            assert listening.count(address) >= (2 if stage else 4)


def build_refused(rank, where, optimizer, more, extra):
    t.build(2, t.ds_config(1, optimizer, block(where, **extra), **more))


@pytest.mark.parametrize(
    ("ranks", "optimizer", "more", "extra", "said"),
    [
        (4, RATE, {}, {}, "with 2 data-parallel replicas and 1 tensor-parallel slices in one group"),
        pytest.param(
            2, t.ADAMW, {}, {"mode": "sync"}, "mode is 'sync' with AdamW and fp16 off", marks=pytest.mark.slow
        ),
        (2, RATE, FP16, {"reroute": True}, "reroute is true with fp16"),
        pytest.param(
            2,
            t.ADAMW,
            BF16,
            {"reroute": True},
            "reroute is true with BF16_Optimizer around AdamW",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_what_groups_cannot_have_is_refused_before_training(ranks, optimizer, more, extra, said):
    more = {"where": "127.0.0.1:1", "optimizer": optimizer, "more": more, "extra": extra}
    for kind, message in run_ranks(build_refused, ranks, expect_errors=True, **more):
        assert kind == "ConfigError"
        assert said in message


def join_nobody(rank, where):
    engine = t.build(2, t.ds_config(1, RATE, block(where, timeout_s=2.0)))
    engine.train_batch(iter(t.data(1)))


def test_a_lighthouse_that_is_not_there_is_one_error_before_training():
    for kind, message in run_ranks(join_nobody, 2, expect_errors=True, where="127.0.0.1:9"):
        assert kind == "ConnectionError"
        assert "127.0.0.1:9" in message
        assert "torchft_lighthouse" in message
