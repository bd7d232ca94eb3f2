"""Saves, evaluations, an exit and resumed runs change no loss: Megatron's default model, dropout on, no flush."""

from __future__ import annotations

import pytest

from noflush.stage.checkpoint import newest_complete
from tests.launch.megatron import NADAMW
from tests.launch.processes import Run
from tests.launch.test_pretrain import arguments
from tests.launch.test_pretrain import finish as plain_finish
from tests.launch.test_tied import finish, launched

pytestmark = [pytest.mark.multiproc, pytest.mark.timeout(280)]


@pytest.mark.parametrize(
    ("stages", "more", "how"),
    [(4, "--global-batch-size 4", "--async-save"), pytest.param(2, "--bf16", "", marks=pytest.mark.slow)],
    ids=["P4-K2-tied-async", "P2-bf16-tied"],
)
def test_a_run_that_is_stopped_and_goes_on_has_the_losses_of_one_that_is_left_alone(stages, more, how, tmp_path):
    common = f"--train-iters 12 {more} --make-vocab-size-divisible-by 1"
    alone, _ = finish(launched(tmp_path, stages, common), stages, tmp_path, "alone")
    assert sorted(alone) == list(range(1, 13))
    saves = (
        f"{common} {how} --save {tmp_path}/save --save-interval 5 --eval-interval 3 --eval-iters 2 --exit-interval 7"
    )
    losses, stopped = finish(launched(tmp_path, stages, saves), stages, tmp_path, "stopped")
    assert losses == {n: alone[n] for n in range(1, 8)}
    assert newest_complete(tmp_path / "save") == "global_step7"
    assert "drains the pipeline" not in stopped.text(0)
    for at in (7, 5):
        again = launched(tmp_path, stages, f"{common} --load {tmp_path}/save --ckpt-step {at}")
        assert finish(again, stages, tmp_path, f"{at}")[0] == {n: alone[n] for n in range(at + 1, 13)}, at


def tied(folder, more, config):
    return [word for word in arguments(folder, more, config) if word != "--untie-embeddings-and-output-weights"]


@pytest.mark.slow
def test_a_run_goes_on_with_other_stages(tmp_path):
    """With the flush, where stages change no number: the losses of the run that keeps its four."""
    config = {"optimizer": NADAMW, "async_pipeline": {"enabled": True, "schedule": "1f1b_flush"}}
    mocked = "--mock-data --train-iters 8 --pipeline-model-parallel-size"
    four = Run(tied(tmp_path, f"{mocked} 4 --save {tmp_path}/save --save-interval 5", config), 4, tmp_path, "four")
    losses = plain_finish(four)
    two = Run(tied(tmp_path, f"{mocked} 2 --load {tmp_path}/save --ckpt-step 5", config), 2, tmp_path, "two")
    assert plain_finish(two) == {n: losses[n] for n in (6, 7, 8)}
    assert "re-cut by layer for 2 stages" in two.text(0)
