"""The runs in launch/configs are what they say, wherever they are started from."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch

from noflush import launch
from noflush.launch.arguments.parser import ArgumentsError, expand
from noflush.launch.gpt.size import parameters
from noflush.launch.pretrain_gpt import main, settings_of
from noflush.launch.training.learning_rate import rates_of

CONFIGS = Path(launch.__file__).parent / "configs"
DATA = [
    "--mock-data",
    "--tokenizer-type",
    "NullTokenizer",
    "--vocab-size",
    "50256",
]  # and one id for the end of a document

PAPER = {
    "model.layers": 8, "model.hidden": 768, "model.heads": 12, "model.query_groups": 12, "model.ffn_hidden": 4 * 768,
    "model.sequence": 512, "model.max_positions": 512, "model.positions": "learned_absolute", "model.tied": False,
    "model.vocabulary": 50257, "model.activation": "relu", "model.gated": False, "model.normalization": "LayerNorm",
    "model.norm_epsilon": 1e-5, "model.attention_dropout": 0.0, "model.hidden_dropout": 0.0, "model.init_std": 0.02,
    "ranks.pipeline": 8, "ranks.data": 1, "ranks.tensor": 1, "batch.micro": 8, "gas": 1, "precision": "fp32",
    "steps.iterations": 50_000, "steps.samples": 400_000, "steps.eval_every": 1000, "steps.eval_iterations": 25,
    "optimizer.lr": 3e-4, "optimizer.min_lr": 3e-5, "optimizer.lr_init": 1e-7, "optimizer.decay_style": "cosine",
    "optimizer.warmup_samples": 3000 * 8, "optimizer.decay_samples": 50_000 * 8, "optimizer.weight_decay": (0.01, 0.01),
    "optimizer.decay_all": True, "deepspeed.gradient_clipping": 10, "deepspeed.optimizer.type": "DelayAwareNAdamW",
    "deepspeed.optimizer.params.betas": [0.99, 0.999], "deepspeed.optimizer.params.eps": 1e-8,
    "deepspeed.optimizer.params.lr": 3e-4, "deepspeed.optimizer.params.weight_decay": 0.01,
    "deepspeed.optimizer.params.momentum_decay": 0.004, "deepspeed.optimizer.params.momentum_schedule": "nadam",
    "deepspeed.async_pipeline.enabled": True, "deepspeed.async_pipeline.schedule": "1f1b_no_flush",
    "deepspeed.async_pipeline.weights": "stash", "deepspeed.async_pipeline.clip": "stage",
}  # fmt: skip


def understood(name, folder=CONFIGS, world=8):
    return settings_of([f"@{folder / name}.args", *DATA], world)[0]


def value_in(settings, path):
    for name in path.split("."):
        settings = settings[name] if isinstance(settings, dict) else getattr(settings, name)
    return settings


def test_the_papers_run_is_the_papers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = understood("gpt-134m-paper")
    assert {path: value_in(run, path) for path in PAPER} == PAPER
    # The header names what differs: biases of queries, keys and values here, of the output layer there.
    assert parameters(run.model) - 8 * 3 * 768 + 50257 == 134_324_305


def test_the_papers_learning_rates_and_decay():
    from noflush.launch.gpt.pipeline import parameter_groups

    run = understood("gpt-134m-paper")
    block = torch.nn.Sequential(torch.nn.LayerNorm(4), torch.nn.Linear(4, 4))
    optimizer = torch.optim.SGD(parameter_groups(block, run.optimizer.decay_all), lr=1.0)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 4
    schedule = rates_of(run)(optimizer)
    at = 0
    for update in (1, 2, 1500, 3000, 3001, 3002, 10_000, 26_501, 50_000):  # from 1 on, as theirs
        schedule.step(8 * (update - 1 - at))
        at = update - 1
        if update <= 3000:
            rate = 1e-7 + (3e-4 - 1e-7) * (update - 1) / 3000  # theirs: update / 3000, as the header says
        else:
            rate = 3e-5 + (3e-4 - 3e-5) * 0.5 * (1 + math.cos(math.pi * (update - 1 - 3000) / 47_000))
        for group in optimizer.param_groups:
            assert group["lr"] == pytest.approx(rate, rel=1e-12)
            assert group["weight_decay"] == 0.01


def test_unless_told_biases_and_norms_do_not_decay():
    from noflush.launch.gpt.pipeline import parameter_groups

    block = torch.nn.Sequential(torch.nn.LayerNorm(4), torch.nn.Linear(4, 4))
    decayed, others = parameter_groups(block)
    assert [tuple(p.shape) for p in decayed["params"]] == [(4, 4)]
    assert (len(others["params"]), others["wd_mult"]) == (3, 0.0)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.args")), ids=lambda path: path.stem)
def test_a_run_trains_what_its_first_line_says(path):
    run = understood(path.stem)
    section = run.deepspeed["optimizer"]
    if path.stem == "gpt-134m-paper":
        assert (section["type"], section["params"]["betas"]) == ("DelayAwareNAdamW", [0.99, 0.999])
    else:
        assert (section["type"], section["params"]["look_ahead"]) == ("DelayAwareMuon", 0.9)
    text = path.read_text()
    line = text.split("\n")[0]
    size, *_ = re.findall(r"([\d.]+) M parameters", line)
    assert float(size) == pytest.approx(parameters(run.model) / 1e6, abs=0.06)
    layers, hidden = map(int, re.search(r"(\d+) layers of (\d+)", line).groups())
    assert (layers, hidden) == (run.model.layers, run.model.hidden)
    if stages := re.search(r"on (\d) stages", line):
        assert int(stages[1]) == run.ranks.pipeline
    number, unit = re.search(r"# ([\d.]+) ([GM]) tokens", text).groups()
    tokens = run.steps.samples * run.model.sequence / {"G": 1e9, "M": 1e6}[unit]
    assert tokens == pytest.approx(float(number), rel=0.02)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.args")), ids=lambda path: path.stem)
def test_a_run_is_planned_from_anywhere(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([f"@{path}", *DATA, "--dry-run"]) == 0
    assert "nothing was started" in capsys.readouterr().out


def test_a_config_named_in_a_file_lies_beside_it(tmp_path, monkeypatch):
    folder = tmp_path / "there"
    folder.mkdir()
    (tmp_path / "mine.json").write_text(json.dumps({"optimizer": {"type": "DelayAwareNAG"}}))
    (folder / "mine.json").write_text((CONFIGS / "ds_config.json").read_text())
    text = (CONFIGS / "gpt-125m.args").read_text()
    monkeypatch.chdir(tmp_path)
    for named in (
        "--deepspeed_config mine.json",
        "--deepspeed_config=mine.json",
        f"--deepspeed_config {folder}/mine.json",
    ):
        (folder / "run.args").write_text(text.replace("--deepspeed_config ds_config.json", named))
        for where in (folder, Path("there")):
            assert understood("run", where).deepspeed["optimizer"]["type"] == "DelayAwareMuon"
    # The command line's is the command line's, and the last one counts.
    words = ["@there/run.args", "--deepspeed_config", "mine.json"]
    assert expand(words)[-1] == "mine.json"
    (folder / "run.args").write_text(text.replace("ds_config.json", "none.json"))
    with pytest.raises(ArgumentsError, match=r"--deepspeed_config there/none\.json cannot be read"):
        understood("run", Path("there"))
