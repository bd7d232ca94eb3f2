"""A rank killed at any moment: the others end in bounded time and say why; resumed, the run is the undisturbed one."""

from __future__ import annotations

import json
import random
import re
import time

import pytest
import torch

from noflush.stage.checkpoint import newest_complete
from tests.launch.megatron import NADAMW, SMALL
from tests.launch.processes import Run

pytestmark = [pytest.mark.multiproc, pytest.mark.timeout(900)]

STAGES = 4
ITERATIONS = 24
BOUND = 75.0  # seconds; a rank that dies before all have met is missed after --distributed-timeout-minutes


def arguments(folder, save):
    config = folder / "ds_config.json"
    config.write_text(json.dumps({"optimizer": NADAMW, "async_pipeline": {"enabled": True, "peer_timeout_s": 30}}))
    return [
        *SMALL.split(), "--pipeline-model-parallel-size", str(STAGES), "--train-iters", str(ITERATIONS),
        "--log-interval", "1", "--hidden-dropout", "0.1", "--attention-dropout", "0.1", "--save", str(save),
        "--load", str(save), "--save-interval", "4", "--distributed-timeout-minutes", "1",
        "--deepspeed_config", str(config), "--data-cache-path", str(folder / "cache"),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """(losses by iteration, seconds) of a run that nobody disturbs."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run = Run(arguments(folder, folder / "save"), STAGES, folder, "run")
    codes = run.wait(120)
    seconds = time.monotonic() - run.start
    assert codes == [0] * STAGES, run.text(0) + run.text(-1)
    losses = run.losses()
    assert sorted(losses) == list(range(1, ITERATIONS + 1))
    return losses, seconds


def check_complete(save):
    """Every file of the newest complete checkpoint can be read."""
    tag = newest_complete(save)
    if tag is not None:
        files = sorted((save / tag).glob("*.pt"))
        assert len(files) >= STAGES + 6, [file.name for file in files]
        for file in files:
            torch.load(file, weights_only=False)


def kill_and_resume(folder, seed, undisturbed):
    expected, seconds = undisturbed
    draw = random.Random(seed)
    victim, moment = draw.randrange(STAGES), draw.uniform(0.1, 0.95) * seconds
    save = folder / "save"
    run = Run(arguments(folder, save), STAGES, folder, "killed")
    time.sleep(max(0.0, run.start + moment - time.monotonic()))
    run.processes[victim].kill()
    told = time.monotonic()
    codes = run.wait(BOUND)
    context = f"rank {victim} killed after {moment:.1f} of {seconds:.1f} s, the others ended with {codes}"
    survivors = [rank for rank in range(STAGES) if rank != victim]
    assert None not in codes, f"{context}: ranks still there after {BOUND} s"
    if all(codes[rank] == 0 for rank in survivors):  # it was done already
        assert run.losses().keys() >= {ITERATIONS}, context
    else:
        assert time.monotonic() - told < BOUND, context
        for rank in survivors:
            assert codes[rank] == 1, f"{context}\n{run.text(rank)}"
            assert f"noflush: stage {rank} (rank {rank} of {STAGES}) ends" in run.text(rank), run.text(rank)
        texts = [run.text(rank) for rank in survivors]
        gone = [set(re.findall(r"noflush: stage (\d) \(rank \d\) is gone: ", text)) for text in texts]
        assert all(stages <= {str(victim)} for stages in gone), f"{context}\n" + "\n".join(texts)
        if run.losses():  # they had met: somebody saw who was missing
            assert {str(victim)} in gone, f"{context}\n" + "\n".join(texts)
    check_complete(save)
    again = Run(arguments(folder, save), STAGES, folder, "resumed")
    assert again.wait(120) == [0] * STAGES, again.text(0) + again.text(-1)
    losses = run.losses() | again.losses()
    assert losses == expected, context
    check_complete(save)
    assert newest_complete(save) == f"global_step{ITERATIONS}"


@pytest.mark.parametrize("seed", [0])
def test_a_killed_rank(seed, tmp_path, undisturbed):
    kill_and_resume(tmp_path, seed, undisturbed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(1, 20))
def test_a_killed_rank_at_more_moments(seed, tmp_path, undisturbed):
    kill_and_resume(tmp_path, seed, undisturbed)
