"""A script that builds its own optimizer and schedule, as GPT-NeoX does: one key of the block replaces it by a rule."""

from __future__ import annotations

import pytest
import torch

from tests.multiproc import training as t
from tests.multiproc.ranks import run_ranks

RULE = {"type": "DelayAwareNAdamW", "params": {"betas": [0.95, 0.99]}}
CALLS, LR, DECAY = 6, 3e-3, 0.1


class Annealing:
    """A schedule of a host's own: it sets what its optimizer's groups hold, and knows nothing of torch's schedules."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.steps = 0
        self.step(0)

    def step(self, increment=1):
        self.steps += increment
        for group in self.optimizer.param_groups:
            group["lr"] = LR / (1 + self.steps)

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps = state["steps"]


def groups_of(parameters):
    parameters = list(parameters)
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": DECAY, "name": "decayed"},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0, "name": "rest"},
    ]


def theirs(parameters):
    return torch.optim.Adam(groups_of(parameters), lr=LR, betas=(0.8, 0.9))


def halving(optimizer):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: 0.5**update)


def initialize(case, rule=RULE):
    import deepspeed
    from deepspeed.pipe import PipelineModule

    parts = t.split_by_blocks(t.layers(), 2)
    module = PipelineModule(
        layers=[layer for part in parts for layer in part], num_stages=2, loss_fn=t.next_token_loss,
        partition_method="type:Block",
    )  # fmt: skip
    config = t.ds_config(1, block={"optimizer": rule} if rule else {})
    # GPT-NeoX reads its own optimizer from this section; with the key in the block it does not count.
    config["optimizer"] = {"type": "Adam", "params": {"lr": LR}}
    optimizer = theirs(module.parameters())
    schedule = {"their schedule": Annealing, "torch's schedule": halving}.get(case, lambda _: None)(optimizer)
    if case == "functions":
        optimizer, schedule = theirs, Annealing
    elif case == "has made updates":
        next(module.parameters()).grad = torch.zeros_like(next(module.parameters()))
        optimizer.step()
    elif case == "a schedule of nobody's":
        schedule = Annealing(optimizer)
        schedule.optimizer = None
    learnt = module.parameters() if case == "functions" else None
    engine, *_ = deepspeed.initialize(
        model=module, config=config, optimizer=optimizer, lr_scheduler=schedule, model_parameters=learnt
    )
    return engine


def train(rank, case):
    engine = initialize(case)
    stream = iter(t.data(CALLS))
    for _ in range(CALLS):
        engine.train_batch(stream)
    engine.drain()
    losses = engine.batch_losses()
    groups = [{k: v for k, v in g.items() if k != "params"} for g in engine.optimizer.param_groups]
    return type(engine.optimizer).__name__, losses, [p.detach() for p in engine.module.parameters()], groups


@pytest.mark.multiproc
@pytest.mark.parametrize("case", ["their schedule", "torch's schedule", "functions", "no schedule"])
def test_the_rule_trains_in_the_place_of_the_scripts_optimizer(case):
    from noflush.methods import DelayAwareNAdamW

    torch.set_num_threads(1)
    results = run_ranks(train, 2, case=case)
    make_lr = {"their schedule": Annealing, "functions": Annealing, "torch's schedule": halving}.get(case)
    losses, weights = t.simulate(
        2, 1, CALLS, lambda ps: DelayAwareNAdamW(groups_of(ps), lr=LR, betas=(0.95, 0.99)), make_lr=make_lr
    )
    for stage, (kind, learnt, got, groups) in enumerate(results):
        assert kind == "DelayAwareNAdamW"
        assert learnt == {n + 1: losses[n] for n in range(CALLS)}  # on every stage, each call's once
        assert all(torch.equal(a, b) for a, b in zip(got, weights[stage], strict=True))
        assert [g["weight_decay"] for g in groups] == [DECAY, 0.0]
        assert [g["name"] for g in groups] == ["decayed", "rest"]
        assert groups[0]["betas"] == (0.95, 0.99)


def refuse(rank, case):
    initialize(case)


@pytest.mark.multiproc
@pytest.mark.parametrize(
    ("case", "said"),
    [
        ("has made updates", "takes the place of the script's Adam, which has made updates already"),
        ("a schedule of nobody's", "Annealing has no attribute 'optimizer' that is the script's Adam"),
    ],
)
def test_what_cannot_be_taken_over_is_refused(case, said):
    for kind, message in run_ranks(refuse, 2, expect_errors=True, case=case):
        assert kind == "ConfigError"
        assert said in message


def keep_theirs(rank):
    return type(initialize("no schedule", rule=None).optimizer).__name__


@pytest.mark.multiproc
def test_without_the_key_the_script_keeps_its_own():
    assert run_ranks(keep_theirs, 2) == ["Adam", "Adam"]
