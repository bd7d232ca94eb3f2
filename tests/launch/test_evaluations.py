"""Evaluations: after which iterations, of which samples, in batches of their own; training does not notice."""

from __future__ import annotations

import json
import re

import pytest

from noflush.launch.arguments.settings import Steps
from noflush.launch.training.evaluations import evaluated_before, evaluates_at, evaluations_until
from tests.launch.megatron import NADAMW, SMALL
from tests.launch.processes import Run


def steps(every, first):
    return Steps(
        **dict.fromkeys(Steps.__dataclass_fields__) | {"eval_every": every, "eval_from": first},
    )


@pytest.mark.parametrize("every", [1, 3, 4])
@pytest.mark.parametrize("first", [None, 0, 1, 3, 4, 5, 8, 9, 100])
def test_each_takes_the_samples_behind_those_before_it(every, first):
    """Counted one by one, over runs of any length."""
    for end in range(20):
        done = 0
        for iteration in range(1, end):
            assert evaluated_before(iteration, every, 10, first) == 10 * done
            done += evaluates_at(iteration, steps(every, first))
        assert evaluated_before(end, every, 10, first) == 10 * done
        assert evaluations_until(end, every, first) == done + (end > 0 and evaluates_at(end, steps(every, first)))


# ---- runs -----------------------------------------------------------------------------------------------

ON = {"optimizer": NADAMW, "async_pipeline": {"enabled": True}}
STOCK = {"optimizer": {"type": "AdamW", "params": {"torch_adam": True}}, "async_pipeline": {"enabled": False}}
COMMON = "--pipeline-model-parallel-size 2 --global-batch-size 4 --train-iters 8 --eval-interval 2 --eval-iters 3 "


def run(folder, name, more, config=ON):
    """(training losses, validation losses by iteration) of a run."""
    path = folder / "ds_config.json"
    path.write_text(json.dumps(config))
    argv = [*SMALL.split(), "--log-interval", "1", "--deepspeed_config", str(path), *COMMON.split(), *more.split()]
    made = Run(argv, 2, folder, name)
    codes = made.wait(180)
    assert codes == [0, 0], made.text(0) + made.text(1)
    found = re.findall(r"validation loss at iteration (\d+) \| lm loss value: (\S+)", made.text(-1))
    return made.losses(), {int(iteration): float(loss) for iteration, loss in found}


@pytest.mark.multiproc
@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    "config", [ON, pytest.param(STOCK, marks=pytest.mark.slow)], ids=["noflush", "DeepSpeed's own pipeline"]
)
def test_batches_of_its_own_change_neither_its_samples_nor_training(config, tmp_path):
    trained, found = run(tmp_path, "plain", "", config)
    assert sorted(found) == [2, 4, 6, 8]
    for name, more in (("large", "--eval-micro-batch-size 4"), ("small", "--eval-micro-batch-size 1")):
        also_trained, also_found = run(tmp_path, name, more, config)
        assert also_trained == trained
        assert also_found == pytest.approx(found, rel=2e-6)


@pytest.mark.multiproc
@pytest.mark.timeout(400)
def test_it_begins_late_and_a_resumed_run_goes_on(tmp_path):
    """Of 3 batches of 8 samples; the one at the end is made in any case."""
    more = f"--start-eval-at-iter 3 --eval-global-batch-size 8 --eval-micro-batch-size 4 --save {tmp_path}/save"
    trained, found = run(tmp_path, "late", f"{more} --save-interval 5")
    assert sorted(found) == [4, 6, 8]
    again, found_again = run(tmp_path, "again", f"{more} --load {tmp_path}/save --ckpt-step 5")
    assert again == {iteration: trained[iteration] for iteration in (6, 7, 8)}
    assert found_again == {iteration: found[iteration] for iteration in (6, 8)}
