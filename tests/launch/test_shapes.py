"""A checkpoint under launch/ goes on with other stages, replicas or tensor-parallel slices."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from noflush.launch.convert.state_dict import read_weights
from noflush.launch.training.beside_weights import write_model
from noflush.launch.training.checkpoint import model_faults
from tests.launch.megatron import LLAMA, SMALL, settings
from tests.launch.processes import Run

FLUSH = {"schedule": "1f1b_flush"}
slow = pytest.mark.slow


def run(shape, more, folder, name, optimizer="DelayAwareNAdamW", ends=0):
    """An ended run of ``shape`` (stages, slices, replicas); returns its losses by iteration, and what rank 0 said."""
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"optimizer": {"type": optimizer}, "async_pipeline": FLUSH}))
    stages, slices, replicas = shape
    argv = [*SMALL.split(), "--log-interval", "1", "--deepspeed_config", str(path), "--global-batch-size", "4"]
    argv += f"--pipeline-model-parallel-size {stages} --tensor-model-parallel-size {slices} {more}".split()
    started = Run(argv, stages * slices * replicas, folder, name)
    codes = started.wait(150)
    assert codes == [ends] * len(codes), "\n".join(started.text(rank) for rank in range(len(codes)))
    return {step: float(loss) for step, loss in started.losses().items()}, started.text(0)


def padded(slices):
    """The vocabulary of two slices for one."""
    return f"--make-vocab-size-divisible-by {128 // slices}"


@pytest.mark.multiproc
@pytest.mark.timeout(580)
@pytest.mark.parametrize(
    ("before", "after", "more"),
    [
        ((1, 1, 1), (2, 1, 1), ""),
        pytest.param((2, 1, 1), (1, 1, 1), "--bf16", marks=slow),
        pytest.param((1, 1, 2), (1, 1, 1), "--bf16", marks=slow),
        pytest.param((1, 1, 1), (1, 1, 2), "--bf16", marks=slow),
        ((1, 2, 1), (2, 1, 1), LLAMA),
        pytest.param((2, 1, 1), (1, 2, 1), "", marks=slow),
        pytest.param((1, 2, 1), (1, 1, 1), f"--bf16 {LLAMA}", marks=slow),
        pytest.param((1, 1, 2), (1, 2, 1), f"--bf16 {LLAMA}", marks=slow),
    ],
    ids=str,
)
def test_another_shape_goes_on(before, after, more, tmp_path):
    """With the flush every shape computes the same but for the order of sums: the oracle is the run left alone."""
    common = f"--train-iters 8 {more}"
    first = f"{common} {padded(before[1])} --save {tmp_path}/save --save-interval 5"
    losses, _ = run(before, first, tmp_path, "first")
    again = f"{common} {padded(after[1])} --load {tmp_path}/save --ckpt-step 5 --save {tmp_path}/again"
    resumed, said = run(after, again, tmp_path, "again")
    assert "the pipeline fills anew" in said
    bf16 = "bf16" in more  # in which weights are saved, to a part in 256
    assert resumed == {step: pytest.approx(losses[step], abs=1e-3 if bf16 else 1e-4) for step in (6, 7, 8)}
    model = settings(f"{more} {padded(1)}", 1, tmp_path).model
    there, here = (read_weights(tmp_path / folder / "global_step8", model) for folder in ("save", "again"))
    assert there.keys() == here.keys()
    for name, weight in there.items():
        torch.testing.assert_close(here[name], weight, rtol=2**-7 if bf16 else 0, atol=1e-3 if bf16 else 1e-4)


@slow
@pytest.mark.multiproc
@pytest.mark.timeout(580)
def test_weights_alone_reach_other_slices(tmp_path):
    run((1, 2, 1), f"--train-iters 4 {padded(2)} --save {tmp_path}/save", tmp_path, "first")
    found = []
    for slices in (2, 1):
        more = f"--finetune --train-iters 4 {padded(slices)} --load {tmp_path}/save"
        found.append(run((1, slices, 1), more, tmp_path, f"of {slices}")[0])
    assert found[1] == {step: pytest.approx(loss, abs=1e-4) for step, loss in found[0].items()}
    assert len(found[1]) == 4


@slow
@pytest.mark.multiproc
@pytest.mark.timeout(580)
def test_bases_of_a_slices_matrices_are_not_divided(tmp_path):
    soap = "DelayAwareSOAP"
    run((1, 2, 1), f"--train-iters 4 {padded(2)} --save {tmp_path}/save", tmp_path, "first", soap)
    more = f"--train-iters 6 {padded(1)} --load {tmp_path}/save"
    _, said = run((1, 1, 1), more, tmp_path, "again", soap, ends=2)
    assert "is of the matrices that its 2 tensor-parallel slices had, and cannot be divided into 1" in said


@pytest.mark.parametrize(
    ("slices", "rows", "hint"), [(2, 128, "; give --make-vocab-size-divisible-by 64"), (1, 96, "")]
)
def test_another_padding_of_the_vocabulary_is_named_with_the_option_that_mends_it(slices, rows, hint, tmp_path):
    """A fault as before where the slices are as many: then the option was another."""
    folder = tmp_path / "global_step1"
    folder.mkdir()
    here = settings("--tensor-model-parallel-size 2", 2, tmp_path)
    there = dataclasses.replace(here.model, vocabulary=rows)
    write_model(folder, there)
    for number in range(3 - slices):
        (folder / f"layer_01-model_{number:02d}-model_states.pt").touch()
    load = dataclasses.replace(here.checkpoints, load=str(tmp_path), tag=folder.name)
    (fault,) = model_faults(load, here.model, here.ranks)
    assert fault.endswith(f"vocabulary = {rows}, the arguments say {here.model.vocabulary}{hint}")
