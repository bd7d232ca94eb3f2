"""The engine equals the delay simulator bit for bit, in float32 on CPU: every micro-batch's loss, every weight.

All cases of one pipeline depth run one after the other in the same processes; each test looks at its own.
"""

from __future__ import annotations

import functools

import pytest
import torch

from tests.multiproc import training as t
from tests.multiproc.ranks import run_ranks

pytestmark = pytest.mark.multiproc

DEMO_GPT = {"vocabulary": 256, "sequence": 128, "width": 128, "heads": 4, "depth": 4}
NON_REENTRANT = {"pipeline": {"use_reentrant": False, "activation_checkpoint_interval": 1}}
WHOLE_STAGES = {"pipeline": {"use_reentrant": False, "activation_checkpoint_interval": 99}}
REENTRANT = {"activation_checkpoint_interval": 1, "checkpointable_layers": ["Block"]}
NAG = {"type": "DelayAwareNAG", "params": {"lr": 3e-2, "momentum": 0.9, "weight_decay": 0.01}}
WARM_UP = {"scheduler": {"type": "WarmupLR", "params": {"warmup_max_lr": 3e-3, "warmup_num_steps": 6}}}


def barrier(engine, call):
    torch.distributed.barrier()


def barrier_and_evaluation(engine, call):
    torch.distributed.barrier()
    if call == 3:
        engine.eval_batch(iter(t.data(4, seed=9)), num_micro_batches=4)


def evaluation_with_other_shape(engine, call):
    if call in (2, 4):
        engine.eval_batch(iter(t.data(2, batch=1 + call, seed=9)), num_micro_batches=2)


def drain_after_call_3(engine, call):
    if call == 2:
        engine.drain()


def cases(stages):
    """name -> (K, block, extra arguments of the run, extra arguments of the simulator)."""
    found = {}
    for gas in (1, 2, 4):
        # 2bw needs K >= P - 1.
        for weights in ("stash", "2bw") if gas >= stages - 1 else ("stash",):
            block = {"weights": weights}
            found[f"{weights} K={gas}"] = (gas, block, {}, {})
            found[f"{weights}, reentrant checkpointing K={gas}"] = (gas, block, {"build": REENTRANT}, {})
            found[f"{weights}, non-reentrant checkpointing K={gas}"] = (gas, block, {"more": NON_REENTRANT}, {})
        latest = {"weights": "latest"}
        found[f"latest K={gas}"] = (gas, latest, {}, {})
        recompute = {"recompute": 1}
        found[f"latest, reentrant checkpointing K={gas}"] = (gas, latest, {"build": REENTRANT}, recompute)
        found[f"latest, non-reentrant checkpointing K={gas}"] = (gas, latest, {"more": NON_REENTRANT}, recompute)
    found["latest, whole stages recomputed"] = (1, {"weights": "latest"}, {"more": WHOLE_STAGES}, {"recompute": 99})
    found["2 more in flight K=1"] = (1, {"extra_in_flight": 2}, {}, {})
    found["3 more in flight K=2"] = (2, {"extra_in_flight": 3}, {}, {})
    found["AdamW (PipeDream) K=1"] = (1, {}, {"optimizer": t.ADAMW}, {"make_optimizer": t.adamw})
    found["NAG K=2"] = (2, {}, {"optimizer": NAG}, {"make_optimizer": nag})
    found["user barriers K=1"] = (1, {}, {"between": barrier}, {})
    found["barriers and an evaluation K=1"] = (1, {}, {"between": barrier_and_evaluation}, {})
    found["evaluations of another shape K=2"] = (2, {}, {"between": evaluation_with_other_shape}, {})
    found["drain in the middle K=2"] = (2, {}, {"between": drain_after_call_3}, {"drain_after": (3,)})
    found["clipping by stage K=2"] = (2, {}, {"more": {"gradient_clipping": 0.05}}, {"clip": 0.05})
    found["learning rate warm-up K=1"] = (1, {}, {"more": WARM_UP}, {"make_lr": warm_up})
    found["latest with Eq 13"] = (1, {"weights": "latest"}, {"optimizer": EQ13}, {"make_optimizer": eq13})
    found["the demo's model K=1"] = (1, {}, {"gpt": DEMO_GPT}, {"gpt": DEMO_GPT})
    return found


EQ13 = {
    "type": "DelayAwareNAdamW",
    "params": {"lr": 3e-3, "betas": [0.9, 0.999], "stage_momentum": True, "lr_discount_steps": 8},
}


def eq13(params):
    from noflush.methods import DelayAwareNAdamW

    return DelayAwareNAdamW(params, lr=3e-3, betas=(0.9, 0.999), stage_momentum=True, lr_discount_steps=8)


def nag(params):
    from noflush.methods import DelayAwareNAG

    return DelayAwareNAG(params, lr=3e-2, momentum=0.9, weight_decay=0.01)


def warm_up(optimizer):
    from deepspeed.runtime.lr_schedules import WarmupLR

    return WarmupLR(optimizer, warmup_max_lr=3e-3, warmup_num_steps=6)


def calls_of(gas):
    return 12 // gas + 3


def train_all(rank, stages):
    results = {}
    for name, (gas, block, extra, _) in cases(stages).items():
        config = t.ds_config(gas, extra.get("optimizer", t.NADAMW), block, **extra.get("more", {}))
        results[name] = t.train(
            rank,
            stages,
            gas,
            calls_of(gas),
            config,
            gpt=extra.get("gpt"),
            between=extra.get("between"),
            **extra.get("build", {}),
        )
    return results


@functools.cache
def trained(stages):
    return run_ranks(train_all, stages, timeout=280, stages=stages)


@pytest.mark.parametrize(("stages", "name"), [(stages, name) for stages in (2, 4) for name in cases(stages)])
def test_equals_the_simulator(stages, name):
    gas, block, _, simulation = cases(stages)[name]
    simulation = {"make_optimizer": t.torch_nadam} | simulation
    losses, weights = t.simulate(stages, gas, calls_of(gas), block=block, **simulation)
    t.assert_same([r[name] for r in trained(stages)], losses, weights)


@pytest.mark.parametrize("stages", [2, 4])
def test_counters_and_reported_losses(stages):
    results = trained(stages)
    for gas in (1, 2, 4):
        runs = [r[f"stash K={gas}"] for r in results]
        calls = calls_of(gas)
        assert [r["global_steps"] for r in runs] == [calls] * stages
        assert [r["updates"] for r in runs] == [calls] * stages  # after the drain
        losses = runs[-1]["losses"]
        batch = [torch.tensor(losses[i : i + gas]).sum().item() / gas for i in range(0, len(losses), gas)]
        for stage, run in enumerate(runs):
            lag = -(-(stages - 1 - stage) // gas)
            assert all(value != value for value in run["returned"][:lag])  # nan: not known yet
            assert run["returned"][lag:] == pytest.approx(batch[: calls - lag], rel=1e-6)


def train_twin_and_stock(rank, stages):
    results = {}
    for gas in (1, 2, 4):
        nadam = {
            "type": "NAdam",
            "params": {"lr": 3e-3, "betas": [0.99, 0.999], "weight_decay": 0.01, "decoupled_weight_decay": True},
        }
        twin = {"schedule": "1f1b_flush"}
        results[gas] = {
            "stock": t.train(rank, stages, gas, 5, t.ds_config(gas, nadam)),
            "twin": t.train(rank, stages, gas, 5, t.ds_config(gas, nadam, twin)),
            "twin, our optimizer": t.train(rank, stages, gas, 5, t.ds_config(gas, t.NADAMW, twin)),
        }
    return results


@pytest.mark.parametrize("stages", [1, 4])
def test_flush_twin_is_stock_deepspeed(stages):
    for result in run_ranks(train_twin_and_stock, stages, stages=stages):
        for gas, runs in result.items():
            for name in ("twin", "twin, our optimizer"):
                assert runs[name]["losses"] == runs["stock"]["losses"]
                assert runs[name]["returned"] == runs["stock"]["returned"]
                for got, want in zip(runs[name]["weights"], runs["stock"]["weights"], strict=True):
                    assert torch.equal(got, want), (gas, name)


def train_one_stage(rank):
    return [
        t.train(rank, 1, 2, 4, t.ds_config(2, block={"schedule": name})) for name in ("1f1b_no_flush", "1f1b_flush")
    ]


def test_one_stage_has_nothing_to_flush():
    ours, twin = run_ranks(train_one_stage, 1)[0]
    assert ours["losses"] == twin["losses"]
    assert all(torch.equal(a, b) for a, b in zip(ours["weights"], twin["weights"], strict=True))
