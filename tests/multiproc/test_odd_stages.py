"""Stages with nothing to train or without weights, and what a stage, a loss or a batch must not be, in the engine."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from tests.multiproc import training as t
from tests.multiproc.ranks import run_ranks

pytestmark = pytest.mark.multiproc

FROZEN = {"first": (0,), "middle": (1,), "last": (2,), "two": (1, 2)}
WITHOUT_WEIGHTS = {"first": "RLL", "middle": "LRL"}


def layers(kinds="LLL", frozen=()):
    torch.manual_seed(3)
    made = [nn.Linear(8, 8) if kind == "L" else nn.ReLU() for kind in kinds]
    for index in frozen:
        made[index].requires_grad_(False)
    return made


def data(count):
    draw = torch.Generator().manual_seed(5)
    return [(torch.randn(3, 8, generator=draw), torch.randint(0, 8, (3,), generator=draw)) for _ in range(count)]


def engine_of(made, filtered=True, loss_fn=nn.functional.cross_entropy, block=None, **more):
    import deepspeed
    from deepspeed.pipe import PipelineModule

    module = PipelineModule(layers=made, num_stages=3, loss_fn=loss_fn, partition_method="uniform")
    learnt = [p for p in module.parameters() if p.requires_grad] if filtered else None
    engine, *_ = deepspeed.initialize(
        model=module, config=t.ds_config(1, block=block or {}, **more), model_parameters=learnt
    )
    return engine


def train(rank, cases, folder):
    results = []
    for number, (kinds, frozen, filtered) in enumerate(cases):
        engine = engine_of(layers(kinds, frozen), filtered)
        stream = iter(data(8))
        for call in range(8):
            engine.train_batch(stream)
            if call == 4:  # a checkpoint there and back
                engine.save_checkpoint(f"{folder}/{number}")
                engine.load_checkpoint(f"{folder}/{number}")
        engine.drain()
        weights = [p.detach().clone() for p in engine.module.parameters()]
        results.append((engine.batch_losses(), weights))
    return results


CASES = [
    *(("LLL", frozen, filtered) for frozen in FROZEN.values() for filtered in (True, False)),
    *((kinds, (), filtered) for kinds in WITHOUT_WEIGHTS.values() for filtered in (True, False)),
]


def test_a_stage_with_nothing_to_train_makes_empty_updates(tmp_path):
    from noflush.order.schedule import Schedule
    from noflush.simulate import DelaySimulator

    torch.set_num_threads(1)
    results = run_ranks(train, 3, cases=CASES, folder=str(tmp_path))
    for number, (kinds, frozen, _) in enumerate(CASES):
        optimizer = lambda ps: t.torch_nadam(ps or [nn.Parameter(torch.zeros(1))])  # noqa: E731
        sim = DelaySimulator(
            [nn.Sequential(layer) for layer in layers(kinds, frozen)],
            nn.functional.cross_entropy, optimizer, Schedule(3, 1),
        )  # fmt: skip
        losses = [sim.train_micro_batch(*batch).item() for batch in data(8)]
        sim.drain()
        assert list(results[2][number][0].values()) == losses
        for stage in range(3):
            got = [p for p in results[stage][number][1] if p.requires_grad or stage not in frozen]
            want = list(sim.parameters(stage).values())
            assert len(want) == (0 if stage in frozen or kinds[stage] == "R" else 2)
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=stage not in frozen))


def train_with_one_norm(rank):
    """A frozen stage of a twin that clips by all stages' norm."""
    engine = engine_of(layers(frozen=(1,)), gradient_clipping=0.1, block={"schedule": "1f1b_flush", "clip": "global"})
    stream = iter(data(3))
    for _ in range(3):
        engine.train_batch(stream)
    return float(engine.get_global_grad_norm())


def test_a_stage_with_nothing_to_train_has_the_pipelines_norm_too():
    norms = run_ranks(train_with_one_norm, 3)
    assert norms[0] == norms[1] == norms[2] > 0


def refused(rank, case):
    if case == "bf16":
        engine_of(layers(frozen=(1,)), bf16={"enabled": True})
    elif case == "all frozen":
        engine_of(layers(frozen=(0, 1, 2))).train_batch(iter(data(1)))
    elif case == "loss":
        engine_of(layers(), loss_fn=lambda x, y: {"lm": x.sum()}).train_batch(iter(data(1)))
    elif case == "outputs":
        made = layers()
        made[1].forward = lambda x: {"hidden": x}
        engine_of(made).train_batch(iter(data(1)))
    elif case == "batch":
        engine_of(layers()).train_batch(iter([{"x": x} for x, _ in data(1)]))


@pytest.mark.parametrize(
    ("case", "stage", "said"),
    [
        ("bf16", 1, "stage 1 has no parameter of its own to train"),
        ("all frozen", 2, "depends on nothing that trains"),
        ("loss", 2, "the last stage's loss is a dict {'lm': a tensor"),
        ("outputs", 1, "stage 1 returned a dict {'hidden': a tensor float32"),
        ("batch", 0, "stage 0 was given a dict {'x': a tensor"),
    ],
)
def test_the_stage_that_is_at_fault_says_so(case, stage, said):
    results = run_ranks(refused, 3, expect_errors=True, case=case)
    assert said in results[stage][1], results


class Listener(logging.Handler):
    def __init__(self):
        super().__init__()
        self.lines = []

    def emit(self, record):
        self.lines.append(record.getMessage())


def warned(rank):
    listener = Listener()
    logging.getLogger("noflush").addHandler(listener)
    shared, head = nn.Linear(8, 8), nn.Linear(8, 8)
    head.weight = shared.weight
    engine_of([shared, nn.ReLU(), shared])  # the module itself
    both = list(listener.lines)
    engine_of([shared, nn.ReLU(), head])  # one weight of it
    one = listener.lines[len(both) :]
    engine_of([nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)])
    return both, one, listener.lines[len(both) + len(one) :]


def test_what_stages_share_without_a_tie_is_warned_of():
    for both, one, none in run_ranks(warned, 3):
        assert [line.split(" is shared")[0] for line in both] == ["noflush: Linear.weight", "noflush: Linear.bias"]
        assert "layers 0 and 2, which lie on stages 0 and 2" in both[0]
        assert "TiedLayerSpec" in both[0]
        assert len(one) == 1
        assert none == []
