"""Megatron's default model, whose output layer is the word embedding, without a flush: its owner computes."""

from __future__ import annotations

import re

import pytest
import torch

from noflush.launch import convert_checkpoint
from noflush.launch import generate as generating
from noflush.launch.arguments.pipelining import schedule_of
from noflush.launch.gpt.size import bytes_by_stage, parameters_by_stage
from noflush.launch.training.beside_weights import checkpoint_in, read_model
from tests.launch.megatron import NADAMW, SMALL, TIED, settings, simulate, train
from tests.launch.processes import Run
from tests.launch.runs import write_config
from tests.multiproc.ranks import run_ranks

pytestmark = [pytest.mark.multiproc, pytest.mark.timeout(280)]
BLOCK = {"async_pipeline": {"enabled": True}, "optimizer": NADAMW}
ZERO = {"zero_optimization": {"stage": 1}}
BF16 = {"bf16": {"enabled": True}}


@pytest.mark.parametrize(("gas", "clip"), [(1, 0.0), (2, 0.0), (2, 0.05)])
@pytest.mark.parametrize("stages", [2, 3, 4])
def test_tied_embeddings_equal_the_simulator(stages, gas, clip, tmp_path):
    """Megatron's default: the first stage owns the words' weights, and the last one reads what it reads."""
    layers = 6 if stages == 3 else 4
    arguments = f"{TIED} --num-layers {layers} --pipeline-model-parallel-size {stages} --global-batch-size {2 * gas}"
    arguments += f" --clip-grad {clip}"
    run = settings(arguments, stages, tmp_path)
    assert (run.model.tied, run.gas) == (True, gas)
    results = run_ranks(train, stages, run=run, calls=10)
    ((losses, weights),) = run_ranks(simulate, 1, run=run, calls=10)
    assert len(set(losses)) == 10 * gas
    if clip:  # the norm's parts are added up in another order
        assert results[-1]["losses"] == pytest.approx(losses, abs=2e-6)
        return
    assert results[-1]["losses"] == losses
    for result, expected in zip(results, weights, strict=True):
        assert len(result["weights"]) == len(expected)
        assert all(torch.equal(a, b) for a, b in zip(result["weights"], expected, strict=True))
    assert torch.equal(results[0]["weights"][0], results[-1]["weights"][0])


def test_muon_leaves_a_tied_embedding_to_adamw_at_its_owner(tmp_path):
    arguments = f"{TIED} --pipeline-model-parallel-size 2 --optimizer muon"
    run = settings(arguments, 2, tmp_path, {"async_pipeline": {"enabled": True}})
    assert run.deepspeed["optimizer"]["type"] == "DelayAwareMuon"
    results = run_ranks(train, 2, run=run, calls=8)
    ((losses, weights),) = run_ranks(simulate, 1, run=run, calls=8)
    assert results[-1]["losses"] == losses
    for result, expected in zip(results, weights, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(result["weights"], expected, strict=True))


def words(result):
    """A tied layer is the first of its stage, and its words are its first weight."""
    return result["weights"][0]


KEEPERS = {"float32": BLOCK, "ZeRO-1": BLOCK | ZERO, "bf16": BLOCK | BF16, "bf16 ZeRO-1": BLOCK | BF16 | ZERO}


@pytest.mark.parametrize(
    "split", ["--tensor-model-parallel-size 2", "--global-batch-size 4"], ids=["slices", "replicas"]
)
@pytest.mark.parametrize(
    "keeper",
    ["float32", "bf16 ZeRO-1", *(pytest.param(keeper, marks=pytest.mark.slow) for keeper in ("ZeRO-1", "bf16"))],
)
def test_slices_and_replicas_match_one(keeper, split, tmp_path):
    """Clipped hard: a weight that counted at both ends, or of which a part was lost, would make another model."""
    arguments = f"{TIED} --pipeline-model-parallel-size 2 --clip-grad 0.05 "
    of_one = "--global-batch-size 4 --micro-batch-size 4" if "batch" in split else ""
    one = settings(arguments + of_one, 2, tmp_path, KEEPERS[keeper])
    two = settings(arguments + split, 4, tmp_path, KEEPERS[keeper])
    assert one.gas == two.gas == 1
    expected, got = run_ranks(train, 2, run=one, calls=8), run_ranks(train, 4, run=two, calls=8)
    first, second = (result["losses"] for result in got[2:])
    losses = first
    if two.ranks.data == 2:
        losses = [(a + b) / 2 for a, b in zip(first, second, strict=True)]
    else:
        assert first == second
    assert losses == pytest.approx(expected[1]["losses"], abs=2e-2 if "bf16" in keeper else 2e-6)
    norms = [float(result["norm"]) for result in (expected[0], expected[0], expected[1], expected[1])]
    relative = 3e-2 if "bf16" in keeper else 1e-4
    assert [float(result["norm"]) for result in got] == pytest.approx(norms, rel=relative)
    assert norms[0] > 0.05
    for owner, reader in ((0, 2), (1, 3)):
        assert torch.equal(words(got[owner]), words(got[reader]))


def test_a_reader_keeps_no_moments_and_no_versions(tmp_path):
    """By hand: of 64 x 32 words the last stage has the weights and their gradients, 8 bytes a number, and no more."""
    for schedule, of_words in (("1f1b_no_flush", 8), ("1f1b_flush", 16)):
        config = {"async_pipeline": {"enabled": True, "schedule": schedule}, "optimizer": NADAMW}
        run = settings(f"{TIED} --pipeline-model-parallel-size 2", 2, tmp_path, config)
        *_, last = bytes_by_stage(run, schedule_of(run))
        *_, count = parameters_by_stage(run.model, run.layers_by_stage)
        assert last.weights == (count - 64 * 32) * 16 + 64 * 32 * of_words


def launched(folder, stages, more):
    config = write_config(folder / "ds_config.json", {"async_pipeline": {"enabled": True}, "optimizer": NADAMW})
    small = SMALL.replace("--untie-embeddings-and-output-weights ", "").replace("--attention-dropout 0 ", "")
    small = small.replace("--hidden-dropout 0 ", "").split()
    argv = [*small, "--log-interval", "1", "--pipeline-model-parallel-size", str(stages), "--deepspeed_config"]
    return [*argv, str(config), *more.split()]


def finish(argv, world, folder, name):
    run = Run(argv, world, folder, name)
    codes = run.wait(120)
    assert codes == [0] * world, "\n".join(run.text(rank) for rank in range(world))
    return run.losses(), run


@pytest.mark.parametrize(
    "stages", [2, pytest.param(3, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.slow)]
)
def test_trains_goes_on_and_travels(stages, tmp_path, capsys):
    """Dropout on, as by default: stopped and resumed as never stopped; out to transformers and in again; text."""
    save = tmp_path / "save"
    common = f"--num-layers {6 if stages == 3 else 4} --eval-iters 1 --eval-interval 3 --train-iters 10 "
    common += "--make-vocab-size-divisible-by 1"
    losses, whole = finish(
        launched(tmp_path, stages, f"{common} --save {save} --save-interval 6"), stages, tmp_path, "whole"
    )
    assert sorted(losses) == list(range(1, 11))
    more = f"{common} --load {save} --ckpt-step 6 --save {tmp_path}/again"
    after, resumed = finish(launched(tmp_path, stages, more), stages, tmp_path, "resumed")
    assert after == {iteration: losses[iteration] for iteration in range(7, 11)}
    validated = [re.findall(r"validation loss at iteration (\d+) \| lm loss value: (\S+)", run.text(-1))
                 for run in (whole, resumed)]  # fmt: skip
    assert validated[1] == [found for found in validated[0] if int(found[0]) > 6]

    assert convert_checkpoint.main(["--to-hf", str(save), str(tmp_path / "hf")]) == 0
    assert convert_checkpoint.main(["--from-hf", str(tmp_path / "hf"), str(tmp_path / "back")]) == 0
    assert read_model(checkpoint_in(tmp_path / "back")).tied
    tuned = []
    for number, folder in enumerate((save, tmp_path / "back")):
        more = f"{common} --load {folder} --finetune --train-iters 4"
        tuned.append(finish(launched(tmp_path, stages, more), stages, tmp_path, f"tuned-{number}")[0])
    assert tuned[0] == tuned[1]
    assert sorted(tuned[0]) == [1, 2, 3, 4]
    capsys.readouterr()
    assert generating.main(["--load", str(save), "--prompt", "3 1 4", "--max-new-tokens", "5"]) == 0
    assert capsys.readouterr().out.startswith("3 1 4 ")
