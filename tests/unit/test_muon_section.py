"""DeepSpeed's Muon in a config: its keys, defaults and marks, and that the step is DeepSpeed's own."""

from __future__ import annotations

import pytest
import torch
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.muon import original_muon
from torch import nn

from noflush.methods import DelayAwareMuon
from noflush.methods.matrices import is_matrix, piece_of
from noflush.patches.deepspeed import muon_section
from noflush.patches.deepspeed.muon_section import by_rates, faults, line, ours, rates, take_tags


def test_what_is_not_said_is_as_deepspeed_has_it():
    section = ours({})
    assert section["type"] == "DelayAwareMuon"
    groups = [{"params": [nn.Parameter(torch.zeros(2, 2))], "use_muon": True}]
    groups.append({"params": [nn.Parameter(torch.zeros(2))], "use_muon": False})
    matrices, rest = original_muon.MuonWithAuxAdam(groups).param_groups
    for key in ("lr", "momentum", "weight_decay"):
        assert section["params"][key] == matrices[key]
    assert (section["params"]["betas"], section["params"]["eps"]) == (list(rest["betas"]), rest["eps"])
    assert rates({}) == (matrices["lr"], rest["lr"])


def test_what_is_said_wins_and_ours_too():
    said = {"lr": 1e-3, "momentum": 0.9, "weight_decay": 0.1, "betas": [0.8, 0.9], "eps": 1e-6, "look_ahead": 0.5}
    said |= {"scale_mode": "spectral", "extra_scale_factor": 0.2, "ns_steps": 4, "nesterov": False}
    assert ours({**said, "ns_method": "standard", "per_head_muon": False, "torch_adam": True})["params"] == said
    assert faults(said) == []
    assert rates({"lr": 1.0, "adam_lr": 2.0}) == (1.0, 2.0)
    assert rates({"lr": 1.0, "muon_lr": 2.0}) == (2.0, 1.0)
    assert not {"lr", "weight_decay"} & ours({}, schedules=True)["params"].keys()


def test_every_key_that_deepspeed_reads_is_known():
    read = {*DeepSpeedEngine._MUON_HALF_KEYS, *DeepSpeedEngine._ADAM_HALF_KEYS, "muon_lr", "adam_lr", "per_head_muon"}
    assert not [key for key in read if any("is not a parameter" in fault for fault in faults({key: None}))]


def test_the_line_says_what_became_of_each():
    said = line({"muon_lr": 0.01, "ns_method": "gram"}, ours({"muon_lr": 0.01, "ns_method": "gram"}))
    for words in (
        "Muon of the DeepSpeed config is DelayAwareMuon: lr 0.01 for matrices, 0.0003 for the rest; momentum 0.95",
        "scale_mode shape_scaling, extra_scale_factor 1.0, weight_decay 0.0",
        "by PipeDreamAdamW, betas [0.9, 0.95], eps 1e-10",
        '"look_ahead": 0.9 in its params',
        "without effect: ns_method gram",
    ):
        assert words in said
    assert "has forwards look" not in line({"look_ahead": 0.5}, ours({"look_ahead": 0.5}))


def _steps(shape, count=3, heads=None):
    """Gradients, and where DeepSpeed's function and `DelayAwareMuon` move a weight by them."""
    torch.manual_seed(1)
    weight = torch.randn(shape)
    p = nn.Parameter(weight.clone())
    if heads:
        p.use_muon, p.muon_num_heads, p.muon_head_dim = True, heads, shape[0] // heads
        take_tags([p])
    section = ours({"lr": 0.1, "weight_decay": 0.01})
    optimizer = DelayAwareMuon([p], **section["params"])
    momentum = torch.zeros(shape)
    with torch.compiler.set_stance("force_eager"):
        for _ in range(count):
            gradient = torch.randn(shape)
            p.grad = gradient.clone()
            optimizer.step()
            update = original_muon.muon_update(gradient.clone(), momentum, beta=0.95, num_heads=heads)
            weight = weight * (1 - 0.1 * 0.01) - 0.1 * update
    return p.detach(), weight


@pytest.mark.parametrize(("shape", "heads"), [((8, 8), None), ((24, 8), None), ((6, 30), None), ((24, 16), 4)])
@pytest.mark.parametrize("precise", [True, False])
def test_the_step_is_deepspeeds(shape, heads, precise, monkeypatch):
    """Per element, of steps of some .1: to 2e-6 in float32; to 2e-3 in the half precision that DeepSpeed chooses."""
    if precise:
        monkeypatch.setattr(original_muon, "ns_compute_dtype", lambda method: torch.float32)
    found, expected = _steps(shape, heads=heads)
    assert (found - expected).abs().max() < (2e-6 if precise else 2e-3)


def test_marks_of_deepspeeds_become_ours_and_go():
    matrix, other, bias = (nn.Parameter(torch.zeros(shape)) for shape in ((8, 4), (8, 4), (8,)))
    for p, used in ((matrix, True), (other, False), (bias, False)):
        p.use_muon, p.muon_num_heads, p.muon_head_dim = used, None, None
    take_tags([matrix, other, bias])
    assert [is_matrix(p) for p in (matrix, other, bias)] == [True, False, False]
    assert piece_of(matrix).cut is None
    for p in (matrix, other, bias):
        assert not [mark for mark in ("use_muon", "muon_num_heads", "muon_head_dim") if hasattr(p, mark)]


def test_rates_that_differ_are_groups():
    matrix, bias, other = (nn.Parameter(torch.zeros(shape)) for shape in ((8, 4), (8,), (4, 4)))
    made = by_rates([{"params": [matrix, bias], "weight_decay": 0.0}, other], (1.0, 2.0))
    assert all(g["params"][0] is p for g, p in zip(made, (matrix, bias, other), strict=True))
    assert [g.get("weight_decay") for g in made] == [0.0, 0.0, None]
    assert [g["lr"] for g in made] == [1.0, 2.0, 1.0]
    groups = DelayAwareMuon(made, **ours({})["params"]).param_groups
    assert [(g["lr"], g.get("method")) for g in groups] == [(1.0, None), (2.0, "PipeDreamAdamW"), (1.0, None)]
    assert by_rates([{"params": [matrix], "lr": 5.0}], (1.0, 2.0))[0]["lr"] == 5.0


def test_the_name_is_taken_in_any_case_and_nothing_else_is():
    assert all(muon_section.names_it({"type": name}) for name in ("Muon", "muon", "MUON"))
    assert not any(muon_section.names_it(section) for section in (None, {}, {"type": "DelayAwareMuon"}, "Muon"))
