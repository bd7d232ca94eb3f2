"""The simulator itself: without delay it is plain training; with delay it is the recurrence written by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from noflush.__main__ import main
from noflush.demo.gpt import gpt_layers, next_token_loss, split_by_blocks
from noflush.order.schedule import Schedule
from noflush.simulate import DelaySimulator

GPT = {"vocabulary": 16, "sequence": 6, "width": 8, "heads": 2, "depth": 4}


def data(count):
    draw = torch.Generator().manual_seed(2)
    return [tuple(torch.randint(0, 16, (2, 6), generator=draw) for _ in range(2)) for _ in range(count)]


def stages(count):
    torch.manual_seed(3)
    return split_by_blocks(gpt_layers(**GPT), count)


def adamw(params):
    return torch.optim.AdamW(params, lr=1e-2)


@pytest.mark.parametrize("gas", [1, 3])
def test_without_delay_it_is_plain_training(gas):
    simulator = DelaySimulator(stages(4), next_token_loss, adamw, Schedule(4, gas, "1f1b_flush"), clip=0.1)
    parts = stages(4)
    optimizers = [adamw(list(p.parameters())) for p in parts]
    for m, (tokens, labels) in enumerate(data(12)):
        x = tokens
        for part in parts:
            x = part(x)
        loss = next_token_loss(x, labels)
        (loss / gas).backward()
        assert simulator.train_micro_batch(tokens, labels).item() == loss.item()
        if (m + 1) % gas == 0:
            for part, optimizer in zip(parts, optimizers, strict=True):
                torch.nn.utils.clip_grad_norm_(part.parameters(), 0.1)
                optimizer.step()
                optimizer.zero_grad()
    for s, part in enumerate(parts):
        for got, want in zip(simulator.parameters(s).values(), part.parameters(), strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("weights", ["stash", "latest"])
def test_recomputation_changes_what_latest_sees_and_nothing_else(weights):
    losses = []
    for recompute in (0, 1, 9):
        simulator = DelaySimulator(
            stages(4), next_token_loss, adamw, Schedule(4, 1, weights=weights), recompute=recompute
        )
        losses.append([simulator.train_micro_batch(*batch).item() for batch in data(12)])
    assert (losses[0] == losses[1]) is (weights == "stash")
    assert (losses[1] == losses[2]) is (weights == "stash")  # segments of one layer, and whole stages


@pytest.mark.parametrize("weights", ["stash", "latest"])
def test_delay_is_the_recurrence_by_hand(weights):
    """Two stages y = a b x with scalar weights and SGD, K = 1: stage 0 is one update behind, stage 1 is not."""

    class Scale(nn.Module):
        def __init__(self, value):
            super().__init__()
            self.w = nn.Parameter(torch.tensor([value], dtype=torch.float64))

        def forward(self, x):
            return x * self.w

    simulator = DelaySimulator(
        [Scale(1.5), Scale(0.5)],
        lambda y, t: (y - t).square().sum(),
        lambda ps: torch.optim.SGD(ps, lr=0.1),
        Schedule(2, 1, weights=weights),
    )
    a, b = [1.5], 0.5
    for m in range(8):
        x, t = 1.0 + 0.1 * m, 0.3
        old_a = a[max(0, m - 1)]
        d = 2 * (old_a * b * x - t)
        grad_b, grad_a = d * old_a * x, d * b * x
        simulator.train_micro_batch(torch.tensor([x], dtype=torch.float64), torch.tensor([t], dtype=torch.float64))
        a.append(a[-1] - 0.1 * grad_a)
        b -= 0.1 * grad_b
        assert simulator.parameters(0)["w"].item() == pytest.approx(a[-1], rel=1e-12)
        assert simulator.parameters(1)["w"].item() == pytest.approx(b, rel=1e-12)


def test_drain_forgets_the_delay():
    sim, sync = (
        DelaySimulator(stages(2), next_token_loss, adamw, Schedule(2, 1, name))
        for name in ("1f1b_no_flush", "1f1b_flush")
    )
    for tokens, labels in data(4):
        sim.train_micro_batch(tokens, labels)
        sim.drain()
        sync.train_micro_batch(tokens, labels)
    for s in range(2):
        for got, want in zip(sim.parameters(s).values(), sync.parameters(s).values(), strict=True):
            assert torch.equal(got, want)


def test_stage_count_must_fit():
    with pytest.raises(ValueError, match="2 stage modules for a schedule of 4"):
        DelaySimulator(stages(2), next_token_loss, adamw, Schedule(4, 1))


def test_command_trains_many_virtual_stages(capsys, tmp_path):
    text = tmp_path / "text.txt"
    text.write_bytes(b"the quick brown fox jumps over the lazy dog. " * 6000)
    arguments = ["--stages", "32", "--updates", "6", "--width", "16", "--sequence", "16", "--text", str(text)]
    assert main(["simulate", *arguments, "--json", str(tmp_path / "out.json")]) == 0
    out = capsys.readouterr().out
    assert "price of staleness" in out
    assert (tmp_path / "out.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--updates", "0"], "must be 1 or more"),
        (["--text", "/does/not/exist"], "give a readable text file"),
        (["--optimizer", "Magic"], "not one of DelayAwareNAdamW"),
        (["--optimizer-params", "{"], "not JSON"),
        (["--optimizer-params", '{"speed": 1}'], "no parameter speed: it has lr, betas"),
        (["--stages", "4", "--depth", "6"], "6 blocks do not divide into 4 stages"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    assert main(["simulate", *arguments]) == 2
    assert message in capsys.readouterr().err
