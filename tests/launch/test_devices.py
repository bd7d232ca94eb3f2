"""What a run asks of its devices, with made-up GPUs."""

from __future__ import annotations

import dataclasses
import importlib.machinery
import importlib.util

import pytest
import torch

from noflush.launch.arguments.parser import ArgumentsError
from noflush.launch.arguments.understand import understand
from noflush.launch.pretrain_gpt import settings_of
from noflush.launch.training import devices
from noflush.launch.training.beside_weights import read_model, write_model
from noflush.launch.training.checkpoint import model_faults
from tests.launch.models import GPT2
from tests.launch.test_meaning import NEEDED

TE = "--transformer-impl transformer_engine"
WORDS = f"{NEEDED} --attention-dropout 0"


def settings(more=""):
    return understand(f"{WORDS} {more}".split(), 1)[0]


def installed(monkeypatch, there):
    find = importlib.util.find_spec
    asked = {"transformer_engine": importlib.machinery.ModuleSpec("transformer_engine", None) if there else None}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: asked[name] if name in asked else find(name, *rest)
    )


@pytest.fixture
def gpu(monkeypatch):
    """There is a GPU, and Transformer Engine is installed."""
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    installed(monkeypatch, True)


def faults_of(more="", environ=()):
    return devices.device_faults(settings(more), dict(environ))


def test_gloo_is_for_cpus(gpu):
    assert faults_of() == faults_of("--distributed-backend nccl") == []
    (fault,) = faults_of("--distributed-backend gloo")
    assert "--distributed-backend gloo on a GPU" in fault
    assert "leave the option out" in fault
    assert faults_of("--distributed-backend gloo", {"DS_ACCELERATOR": "cpu"}) == []


@pytest.mark.parametrize("backend", ["nccl", "gloo"])
def test_without_a_gpu_either_will_do(backend, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert faults_of(f"--distributed-backend {backend}") == []


def test_gloo_with_a_gpu_ends_before_training(gpu, capsys):
    from noflush.launch.pretrain_gpt import main

    assert main([*WORDS.split(), "--distributed-backend", "gloo"]) == 2
    assert "--distributed-backend gloo on a GPU: gloo does not send" in capsys.readouterr().err


def test_a_dry_run_asks_for_no_device(gpu):
    settings_of([*WORDS.split(), "--distributed-backend", "gloo", "--dry-run"], 1)


def test_more_processes_than_devices_end_before_training(monkeypatch, capsys):
    from noflush.launch.pretrain_gpt import main

    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    there = {"RANK": "2", "WORLD_SIZE": "4", "LOCAL_RANK": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in there.items():
        monkeypatch.setenv(name, value)
    assert main([*WORDS.split(), "--global-batch-size", "4"]) == 2
    assert "rank 2: it is process 2 of its machine" in capsys.readouterr().err


def test_transformer_engine_is_taken_when_it_is_asked_for(gpu, monkeypatch):
    from noflush.launch.gpt import config

    monkeypatch.setattr(config, "get_gpt_layer_with_transformer_engine_spec", lambda qk_layernorm: "TE")
    assert settings().model.transformer_impl == "local"
    assert config.layer_spec(settings().model) != "TE"
    assert faults_of(TE) == []
    assert config.layer_spec(settings(TE).model) == "TE"


@pytest.mark.parametrize(
    ("cuda", "there", "needs"),
    [
        (False, True, "needs a GPU, and"),
        (True, False, "needs Transformer Engine, and"),
        (False, False, "needs a GPU and Transformer Engine, and"),
    ],
)
def test_transformer_engine_that_is_not_there(cuda, there, needs, gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    installed(monkeypatch, there)
    (fault,) = faults_of(TE)
    assert needs in fault
    assert "--transformer-impl local" in fault


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ("--transformer-impl inference_optimized", "its layers cannot be trained"),
        (f"{TE} --reset-attention-mask", "--transformer-impl local"),
    ],
)
def test_implementations_that_cannot_train_it(more, says):
    with pytest.raises(ArgumentsError, match=says):
        settings(more)


@pytest.fixture
def checkpoints(tmp_path):
    """A folder with a checkpoint of whatever model; ``given(load, model)`` are the faults of loading it as another."""

    def given(there, here, old=False):
        folder = tmp_path / "global_step1"
        folder.mkdir(exist_ok=True)
        (tmp_path / "latest").write_text(folder.name)
        write_model(folder, there)
        if old:
            path = folder / "model.json"
            path.write_text(path.read_text().replace(',\n "transformer_impl": "local"', ""))
            assert "transformer_impl" not in path.read_text()
        run = settings()
        load = dataclasses.replace(run.checkpoints, load=str(tmp_path), tag=folder.name)
        return model_faults(load, here, run.ranks), folder

    return given


ENGINE = dataclasses.replace(GPT2, transformer_impl="transformer_engine")


@pytest.mark.parametrize("old", [False, True])
def test_local_weights_are_not_loaded_into_transformer_engines_layers(checkpoints, old):
    (fault,), folder = checkpoints(GPT2, ENGINE, old)
    assert "is of --transformer-impl local" in fault
    assert "give --transformer-impl local" in fault
    assert checkpoints(GPT2, GPT2, old)[0] == []
    assert read_model(folder) == GPT2


def test_transformer_engines_weights_are_not_loaded_into_local_layers(checkpoints):
    (fault,), folder = checkpoints(ENGINE, GPT2)
    assert "give --transformer-impl transformer_engine" in fault
    assert "convert_checkpoint.py" in fault
    assert checkpoints(ENGINE, ENGINE)[0] == []
    assert read_model(folder) == ENGINE
