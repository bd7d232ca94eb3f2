"""The block, the facts it is checked with and the schedule: made in one place of launch/, the same for all."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

from noflush.launch import arguments
from noflush.launch.arguments.parser import ArgumentsError
from noflush.launch.arguments.pipelining import asked_for, schedule_of
from noflush.launch.arguments.understand import understand
from noflush.order.schedule import Schedule

LAUNCH = Path(arguments.__file__).parent.parent
RUN = (
    "--num-layers 4 --hidden-size 16 --num-attention-heads 4 --seq-length 8 --max-position-embeddings 8 "
    "--micro-batch-size 1 --global-batch-size 8 --train-iters 10 --lr 1e-3 --mock-data --tokenizer-type NullTokenizer "
    "--vocab-size 50 --untie-embeddings-and-output-weights --pipeline-model-parallel-size 4"
)
ON = {"enabled": True}


def understood(tmp_path, config, more=""):
    path = tmp_path / "ds_config.json"
    path.write_text(json.dumps(config))
    settings, _ = understand([*RUN.split(), *more.split(), "--deepspeed_config", str(path)], 4)
    return settings


def test_one_module_reads_the_block_and_makes_the_schedule():
    makers = {"parse_block", "read_block", "check_config", "check_run", "RunFacts", "Schedule"}
    found = set()
    for path in LAUNCH.rglob("*.py"):
        calls = [node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        if makers & {call.id for call in calls if isinstance(call, ast.Name)}:
            found.add(path.relative_to(LAUNCH).as_posix())
    assert found == {"arguments/pipelining.py"}


@pytest.mark.parametrize(
    ("block", "schedule"),
    [
        (ON, Schedule(4, 8)),
        (ON | {"weights": "latest", "extra_in_flight": 3}, Schedule(4, 8, weights="latest", extra_in_flight=3)),
        (ON | {"schedule": "1f1b_flush"}, Schedule(4, 8, "1f1b_flush")),
        ({"enabled": False}, Schedule(4, 8, "1f1b_flush")),
        (None, Schedule(4, 8, "1f1b_flush")),
    ],
)
def test_the_schedule(tmp_path, block, schedule):
    settings = understood(tmp_path, {} if block is None else {"async_pipeline": block})
    assert schedule_of(settings) == schedule
    assert (settings.block is None) == (block is None or not block["enabled"])


def test_the_schedule_is_of_the_full_batch(tmp_path):
    settings = understood(tmp_path, {"async_pipeline": ON}, "--rampup-batch-size 2 2 20")
    assert settings.deepspeed["gradient_accumulation_steps"] == 2
    assert schedule_of(settings).gas == 8


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({}, None),
        ({"async_pipeline": True}, None),
        ({"async_pipeline": {"enabled": False}}, None),
        ({"async_pipeline": {}}, "1f1b_no_flush"),
        ({"async_pipeline": {"schedule": "1f1b_flush"}}, "1f1b_flush"),
        ({"async_pipeline": {"schedule": None}}, "None"),
    ],
)
def test_what_is_asked_for(config, name):
    assert asked_for(config) == name


def test_a_wrong_block_is_refused_among_the_runs_other_faults(tmp_path):
    with pytest.raises(ArgumentsError) as error:
        understood(tmp_path, {"async_pipeline": {"schedule": None}}, "--hidden-dropout 2")
    first, second = error.value.faults
    assert first.startswith("--hidden-dropout is 2.0")
    assert second.startswith("async_pipeline.schedule is None: ")
