"""Checkpoints that version 0.1.0 wrote go on as they went on there."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

import pytest
import torch

from tests.multiproc import training as t
from tests.multiproc.ranks import run_ranks

pytestmark = pytest.mark.multiproc
SAVED = Path(__file__).parent / "checkpoints" / "0.1.0.tar.xz"
GPT = {"vocabulary": 16, "sequence": 6, "width": 8, "heads": 2, "depth": 2}
ZERO = {"zero_optimization": {"stage": 1}}
RUNS = {
    "nadamw": {},
    "nag": {"optimizer": {"type": "DelayAwareNAG", "params": {"lr": 1e-2, "momentum": 0.9}}},
    "adamw-bf16-zero1": {
        "optimizer": {"type": "PipeDreamAdamW", "params": {"lr": 3e-3}},
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        **ZERO,
    },
    "nadamw-zero1": ZERO,
}
"""Saved after 4 of 8 calls, P = 2, K = 1; ``losses.json`` has the last stage's losses of the other 4."""


def go_on(rank, folder, more):
    losses = []

    def loss_fn(outputs, labels):
        loss = t.next_token_loss(outputs, labels)
        if torch.is_grad_enabled():
            losses.append(loss.item())
        return loss

    engine = t.build(2, t.ds_config(1, block={}, **more), gpt=GPT, loss_fn=loss_fn)
    engine.load_checkpoint(folder)
    stream = iter(t.data(8, gpt=GPT)[4:])
    for _ in range(4):
        engine.train_batch(stream)
    return losses


@pytest.mark.parametrize("name", RUNS)
def test_a_checkpoint_of_version_0_1_0_goes_on(name, tmp_path):
    with tarfile.open(SAVED) as archive:
        archive.extractall(tmp_path, filter="data")
    losses = run_ranks(go_on, 2, folder=str(tmp_path / name), more=RUNS[name])[-1]
    # Not to the bit: another CPU than that which wrote them sums in another order.
    assert losses == pytest.approx(json.loads((tmp_path / "losses.json").read_text())[name], rel=1e-5)
