"""Muon by the names that hosts give it: DeepSpeed's in a config, torch's and DeepSpeed's passed by a script."""

from __future__ import annotations

import contextlib
import io

import pytest
import torch

from noflush.config import ConfigError
from noflush.methods import DelayAwareMuon
from noflush.patches.deepspeed import muon_section
from tests.multiproc import training as t
from tests.multiproc.ranks import run_ranks

pytestmark = pytest.mark.multiproc

CALLS = 6
PARAMS = {"lr": 3e-3, "momentum": 0.9, "weight_decay": 0.1, "ns_method": "standard", "look_ahead": 0.5}
ZERO, BF16 = {"zero_optimization": {"stage": 1}}, {"bf16": {"enabled": True}}
CASES = {"float32": {}, "ZeRO-1": ZERO, "bf16": BF16, "bf16 ZeRO-1": BF16 | ZERO}
CASES["bf16 ZeRO-1, fp32 sums"] = BF16 | ZERO | {"data_types": {"grad_accum_dtype": "fp32"}}


def train_all(rank):
    results = {}
    for name, more in CASES.items():
        for section in ({"type": "Muon", "params": PARAMS}, muon_section.ours(PARAMS)):
            with contextlib.redirect_stdout(io.StringIO()) as said:
                result = t.train(rank, 2, 1, CALLS, t.ds_config(1, section, {}, **more))
            results[name, section["type"]] = result | {"said": said.getvalue()}
    return results


def test_deepspeeds_muon_is_the_delay_aware_one_with_its_settings():
    """Two stages of two replicas, each with its data: bit for bit, whatever keeps the weights."""
    results = run_ranks(train_all, 4, timeout=280)
    for name in CASES:
        for rank, result in enumerate(results):
            theirs, ours = result[name, "Muon"], result[name, "DelayAwareMuon"]
            assert theirs["losses"] == ours["losses"], (name, rank)
            assert all(torch.equal(a, b) for a, b in zip(theirs["weights"], ours["weights"], strict=True)), name
            line = "noflush: optimizer Muon of the DeepSpeed config is DelayAwareMuon: lr 0.003 for matrices, 0.003 for"
            assert (line in theirs["said"]) == (rank == 0)
            assert line not in ours["said"]


def train_two_rates(rank, weights):
    section = {"type": "Muon", "params": {"muon_lr": 3e-3, "adam_lr": 1e-3}}
    config = t.ds_config(1, section, {"weights": weights})
    before = dict(config["optimizer"]["params"])
    result = t.train(rank, 2, 1, CALLS, config, groups=lambda parameters: [{"params": parameters}])
    assert config["optimizer"] == {"type": "Muon", "params": before}  # the script's own object
    return result


@pytest.mark.parametrize("weights", ["stash", "latest"])
def test_matrices_and_the_rest_may_have_rates_of_their_own(weights):
    torch.set_num_threads(1)

    def make(params):
        section = muon_section.ours({})["params"]
        return DelayAwareMuon(muon_section.by_rates(params, (3e-3, 1e-3)), **section)

    expected = t.simulate(2, 1, CALLS, make, {"weights": weights})
    t.assert_same(run_ranks(train_two_rates, 2, weights=weights), *expected)


def marks_left(rank):
    """Marks of DeepSpeed's that are left, modules whose parameters are matrices, and the groups' methods."""
    from noflush.methods.matrices import is_matrix

    engine = t.build(2, t.ds_config(1, {"type": "Muon", "params": {"lr": 3e-3}}, {}))
    tags = [hasattr(p, mark) for p in engine.module.parameters() for mark in ("use_muon", "muon_num_heads")]
    kinds = [type(m).__name__ for m in engine.module.modules() for p in m.parameters(recurse=False) if is_matrix(p)]
    return any(tags), sorted(set(kinds)), [g.get("method") for g in engine.optimizer.param_groups]


def test_no_mark_of_deepspeeds_is_left_for_its_zero():
    for tagged, kinds, methods in run_ranks(marks_left, 2):
        assert not tagged
        assert "Embedding" not in kinds
        assert methods == [None, "PipeDreamAdamW"]


def left_as_it_was(rank):
    found = []
    for block in (None, {"enabled": False}):
        engine = t.build(2, t.ds_config(1, {"type": "Muon", "params": {"lr": 3e-3, "torch_adam": True}}, block))
        found.append((type(engine).__name__, type(engine.optimizer).__name__))
    return found


def test_without_the_block_it_is_deepspeeds_own():
    for found in run_ranks(left_as_it_was, 2):
        assert found == [("PipelineEngine", "MuonWithAuxAdam")] * 2


# ---- a script's own ---------------------------------------------------------------------------------------


def build(optimizer, schedule=None, block=None, **more):
    import deepspeed
    from deepspeed.pipe import PipelineModule

    parts = t.split_by_blocks(t.layers(), 2)
    module = PipelineModule(
        layers=[layer for part in parts for layer in part], num_stages=2, loss_fn=t.next_token_loss,
        partition_method="type:Block",
    )  # fmt: skip
    built = optimizer(list(module.parameters()))
    config = t.ds_config(1, {"type": "Muon"}, block or {}, **more)
    engine, *_ = deepspeed.initialize(
        model=module, config=config, optimizer=built, lr_scheduler=schedule and schedule(built)
    )
    return engine


def trained(engine):
    stream = iter(t.data(CALLS))
    for _ in range(CALLS):
        engine.train_batch(stream)
    engine.drain()
    losses = [value for _, value in sorted(engine.batch_losses().items())]
    groups = [{k: v for k, v in g.items() if k != "params"} for g in engine.optimizer.param_groups]
    return losses, [p.detach() for p in engine.module.parameters()], groups


def two_groups(params):
    """Decayed and not, as scripts have them; each has matrices and others."""
    return [
        {"params": params[:8], "weight_decay": 0.1, "name": "first"},
        {"params": params[8:], "weight_decay": 0.0, "name": "last"},
    ]


def theirs(params):
    return torch.optim.Adam(two_groups(params), lr=3e-3)


def halving(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: 0.5**update)


RULE = {"type": "DelayAwareMuon", "params": {"look_ahead": 0.5, "momentum": 0.95}}


def train_rule(rank, more):
    return trained(build(theirs, halving, {"optimizer": RULE}, **more))


@pytest.mark.parametrize("more", [{}, ZERO], ids=["float32", "ZeRO-1"])
def test_it_takes_a_scripts_groups_and_schedule_over(more):
    """Groups are split into matrices and the rest, and the schedule's rate reaches both.

    The config names DeepSpeed's Muon, so that every parameter bears its marks.
    """
    torch.set_num_threads(1)
    results = run_ranks(train_rule, 2, more=more)

    def make(params):
        return DelayAwareMuon(two_groups(params), lr=3e-3, **RULE["params"])

    losses, weights = t.simulate(2, 1, CALLS, make, make_lr=halving, drain_after=(CALLS,))
    for stage, (got, learnt, groups) in enumerate(results):
        assert got == losses
        assert all(torch.equal(a, b) for a, b in zip(learnt, weights[stage], strict=True))
        assert {(g["name"], g.get("method")) for g in groups} == {
            (name, method) for name in ("first", "last") for method in (None, "PipeDreamAdamW")
        }
        assert {g["lr"] for g in groups} == {3e-3 * 0.5**CALLS}
        assert all(g["weight_decay"] == (0.1 if g["name"] == "first" else 0.0) for g in groups)


class TorchMuon(torch.optim.Optimizer):
    """torch's Muon takes matrices alone, so scripts put an AdamW beside it."""

    def __init__(self, params):
        self.both = [
            torch.optim.Muon([p for p in params if p.dim() == 2], lr=3e-3),
            torch.optim.AdamW([p for p in params if p.dim() != 2], lr=3e-3),
        ]
        super().__init__(params, {"lr": 3e-3})

    def step(self, closure=None):
        for one in self.both:
            one.step()


def train_torchs(rank):
    return trained(build(TorchMuon))


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_torchs_muon_of_a_script_is_exact_in_float32():
    torch.set_num_threads(1)
    losses, weights = t.simulate(2, 1, CALLS, TorchMuon)
    for stage, (got, learnt, _) in enumerate(run_ranks(train_torchs, 2)):
        assert got == losses
        assert all(torch.equal(a, b) for a, b in zip(learnt, weights[stage], strict=True))


def refused(rank):
    for more in (ZERO, BF16, BF16 | ZERO):
        with pytest.raises(ConfigError, match=r"the script's TorchMuon: it treats each matrix as a whole"):
            build(TorchMuon, zero_allow_untested_optimizer=True, **more)
    build(TorchMuon, block={"optimizer": RULE}, **ZERO)  # which sees whole matrices there too


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_a_scripts_muon_on_flat_tensors_is_refused():
    run_ranks(refused, 2)
