"""Saves, evaluations, an exit and resumed runs change no loss: Megatron's default model, dropout on, no flush."""

from __future__ import annotations

import pytest

from noflush.stage.checkpoint import newest_complete
from tests.launch.test_tied import finish, launched

pytestmark = [pytest.mark.multiproc, pytest.mark.timeout(280)]


@pytest.mark.parametrize(
    ("stages", "more"),
    [(4, "--global-batch-size 4"), pytest.param(2, "--bf16", marks=pytest.mark.slow)],
    ids=["P4-K2-tied", "P2-bf16-tied"],
)
def test_a_run_that_is_stopped_and_goes_on_has_the_losses_of_one_that_is_left_alone(stages, more, tmp_path):
    common = f"--train-iters 12 {more} --make-vocab-size-divisible-by 1"
    alone, _ = finish(launched(tmp_path, stages, common), stages, tmp_path, "alone")
    assert sorted(alone) == list(range(1, 13))
    saves = f"{common} --save {tmp_path}/save --save-interval 5 --eval-interval 3 --eval-iters 2 --exit-interval 7"
    losses, stopped = finish(launched(tmp_path, stages, saves), stages, tmp_path, "stopped")
    assert losses == {n: alone[n] for n in range(1, 8)}
    assert newest_complete(tmp_path / "save") == "global_step7"
    assert "drains the pipeline" not in stopped.text(0)
    for at in (7, 5):
        again = launched(tmp_path, stages, f"{common} --load {tmp_path}/save --ckpt-step {at}")
        assert finish(again, stages, tmp_path, f"{at}")[0] == {n: alone[n] for n in range(at + 1, 13)}, at
