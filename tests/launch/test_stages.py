"""How many transformer layers each stage gets: Megatron's options of uneven stages, by its own rules; runs of them."""

from __future__ import annotations

import json
import re

import pytest
import torch

from noflush.launch.arguments.parser import ArgumentsError
from noflush.launch.convert.state_dict import read_weights
from noflush.launch.dry_run import print_dry_run
from noflush.launch.gpt.size import parameters_by_stage
from noflush.launch.start_lines import start_lines
from tests.launch.megatron import SMALL, TIED, settings, simulate, train
from tests.launch.processes import Run
from tests.multiproc.ranks import run_ranks

LAYOUT = "--pipeline-model-parallel-layout"
FIRST, LAST = "--decoder-first-pipeline-num-layers", "--decoder-last-pipeline-num-layers"
EMBEDDING, LOSS = "--account-for-embedding-in-pipeline-split", "--account-for-loss-in-pipeline-split"


@pytest.mark.parametrize(
    ("layers", "stages", "options", "by_stage"),
    [
        (4, 1, "", (4,)),
        (8, 4, "", (2, 2, 2, 2)),
        (7, 4, f"{FIRST} 1", (1, 2, 2, 2)),
        (7, 4, f"{LAST} 1", (2, 2, 2, 1)),
        (8, 4, f"{FIRST} 1 {LAST} 3", (1, 2, 2, 3)),
        (4, 2, f"{FIRST} 3 {LAST} 1", (3, 1)),
        (4, 1, f"{FIRST} 4", (4,)),
        (7, 4, EMBEDDING, (1, 2, 2, 2)),
        (7, 4, LOSS, (2, 2, 2, 1)),
        (6, 4, f"{EMBEDDING} {LOSS}", (1, 2, 2, 1)),
        (2, 4, f"{EMBEDDING} {LOSS}", (0, 1, 1, 0)),
        (6, 4, f"{LAYOUT} Et*3|(t|)*2tL", (3, 1, 1, 1)),
        (6, 4, f"{LAYOUT} E|t*2,|t*4|L", (0, 2, 4, 0)),
        (6, 1, f"{LAYOUT} Et*6L", (6,)),
        (3, 2, f"{LAYOUT} Et*3|L", (3, 0)),
    ],
)
def test_layers_by_stage(layers, stages, options, by_stage, tmp_path):
    run = settings(f"--num-layers {layers} --pipeline-model-parallel-size {stages} {options}", stages, tmp_path)
    assert run.layers_by_stage == by_stage


def by_megatron(layers, stages, options, layout):
    """What megatron-core's layers would be: its own count for every stage."""
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.transformer_block import get_num_layers_to_build

    config = TransformerConfig(
        num_layers=layers,
        hidden_size=16,
        num_attention_heads=4,
        pipeline_model_parallel_size=stages,
        pipeline_dtype=torch.float32,
        pipeline_model_parallel_layout=layout,
        **options,
    )
    if layout is None:
        return tuple(get_num_layers_to_build(config, pp_rank=stage) for stage in range(stages))
    there = config.pipeline_model_parallel_layout
    return tuple(there.get_num_layers_to_build(vp_stage=0, pp_rank=stage) for stage in range(stages))


@pytest.mark.parametrize("layout", [None, "Ett|tt|tt|ttL", "E(t|)*3t*5L", "E|(tt|t*2|)*1tttt|L", "E|t*8||L"])
def test_it_is_megatron_cores_own_answer(layout, tmp_path):
    """Over every count of the ends that fits 8 layers on 4 stages, and some that do not; but no stage is left empty."""
    cases = []
    if layout is not None:
        cases.append(({}, f"{LAYOUT} {layout}"))
    else:
        for first in (None, *range(1, 9)):
            for last in (None, *range(1, 9)):
                given = {"num_layers_in_first_pipeline_stage": first, "num_layers_in_last_pipeline_stage": last}
                words = [f"{option} {n}" for option, n in ((FIRST, first), (LAST, last)) if n is not None]
                cases.append((given, " ".join(words)))
    for options, words in cases:
        try:
            theirs = by_megatron(8, 4, options, layout)
        except (ValueError, AssertionError):
            theirs = None
        try:
            argv = f"--num-layers 8 --pipeline-model-parallel-size 4 {words}"
            ours = settings(argv, 4, tmp_path).layers_by_stage
        except ArgumentsError:
            ours = None
        refused = theirs is not None and min(theirs[1:-1]) < 1  # it makes stages of -1 layers too
        assert ours == (None if refused else theirs), words


def test_the_plan_and_the_memory_are_by_stage(tmp_path, capsys):
    run = settings(f"--pipeline-model-parallel-size 4 --num-layers 6 {LAYOUT} E|tt|t*4|L", 4, tmp_path)
    lines = start_lines(run, 1, {})
    assert "; layers by stage [0, 2, 4, 0]; micro-batch 2" in lines[1]
    print_dry_run(run, lines)
    said = capsys.readouterr().out
    rows = re.findall(r"^│ +(\d) │ +\S+ │ +(\d+) │ +(\S+) M", said, re.M)
    assert [(stage, layers) for stage, layers, _ in rows] == [("0", "0"), ("1", "2"), ("2", "4"), ("3", "0")]
    weights = parameters_by_stage(run.model, run.layers_by_stage)
    assert [float(count) for *_, count in rows] == [pytest.approx(count / 1e6, abs=0.05) for count in weights]
    assert weights[2] == 2 * weights[1] > weights[0]
    assert "if the stages take equally long" in said
    even = settings("--pipeline-model-parallel-size 4", 4, tmp_path)
    print_dry_run(even, start_lines(even, 1, {}))
    said = capsys.readouterr().out
    assert "layers by stage" not in said
    assert "equally long" not in said


# ---- runs -----------------------------------------------------------------------------------------------

FLUSH = {"optimizer": {"type": "PipeDreamAdamW"}, "async_pipeline": {"schedule": "1f1b_flush"}}
MUON = {"optimizer": {"type": "DelayAwareMuon", "params": {"look_ahead": 0.5}}, "async_pipeline": {"enabled": True}}
OF_TWO, OF_THREE = "--pipeline-model-parallel-size 2", "--pipeline-model-parallel-size 3"


def losses_of(results):
    return results[-1]["losses"]


@pytest.mark.multiproc
@pytest.mark.parametrize("tied", [pytest.param("", marks=pytest.mark.slow), TIED], ids=["untied", "tied"])
def test_with_the_flush_the_split_changes_no_loss(tied, tmp_path):
    """Weights are drawn by layer, whatever stage it lies on."""
    found = []
    for split in ("", f"{FIRST} 1", f"{LAYOUT} Et*4|L"):
        run = settings(f"{tied} {OF_TWO} {split}", 2, tmp_path, FLUSH)
        found.append(run_ranks(train, 2, run=run, calls=6))
    even, *others = found
    assert len(even[0]["weights"]) != len(others[0][0]["weights"])
    for other in others:
        assert losses_of(other) == losses_of(even)
    assert len(set(losses_of(even))) == 6


@pytest.mark.multiproc
@pytest.mark.parametrize(
    "config", [None, pytest.param(MUON, marks=pytest.mark.slow)], ids=["NAdamW", "Muon with a look-ahead"]
)
def test_without_the_flush_it_is_the_simulators_run(config, tmp_path):
    run = settings(f"{OF_THREE} {LAYOUT} Et*3|t|L --recompute-granularity full", 3, tmp_path, config)
    losses, weights = run_ranks(simulate, 1, run=run, calls=8)[0]
    results = run_ranks(train, 3, run=run, calls=8)
    assert losses_of(results) == losses
    for result, expected in zip(results, weights, strict=True):
        assert all(torch.equal(got, want) for got, want in zip(result["weights"], expected, strict=True))


@pytest.mark.parametrize(
    ("method", "layers", "numbers"),
    [("block", 2, {1, 2, 4, 5, 6}), ("block", 9, {*range(1, 7)}), ("uniform", 1, {*range(1, 7)})],
)
def test_the_first_layers_of_every_stage_recompute(method, layers, numbers, tmp_path):
    from noflush.launch.gpt.pipeline import recomputing

    more = f"--recompute-granularity full --recompute-method {method} --recompute-num-layers {layers}"
    run = settings(f"--num-layers 6 {OF_THREE} {LAYOUT} Ettt|tt|tL {more}", 3, tmp_path)
    assert recomputing(run) == numbers


def arguments(folder, more, block=None, untied=True):
    path = folder / "ds_config.json"
    path.write_text(json.dumps({"optimizer": {"type": "DelayAwareNAdamW"}, "async_pipeline": block or {}}))
    argv = [*SMALL.split(), "--log-interval", "1", "--deepspeed_config", str(path), *OF_TWO.split(), *more.split()]
    return argv if untied else [word for word in argv if word != "--untie-embeddings-and-output-weights"]


def finish(run, timeout=120):
    codes = run.wait(timeout)
    assert codes == [0] * len(codes), "\n".join(run.text(rank) for rank in range(len(codes)))
    return run.losses()


@pytest.mark.multiproc
@pytest.mark.timeout(280)
def test_it_resumes_as_if_it_had_never_stopped(tmp_path):
    common = f"--train-iters 10 --global-batch-size 4 {LAYOUT} Et|t*3L"
    whole = Run(arguments(tmp_path, f"{common} --save {tmp_path}/save --save-interval 6"), 2, tmp_path, "whole")
    losses = finish(whole)
    assert sorted(losses) == list(range(1, 11))
    assert "layers by stage [1, 3]" in whole.text(0)
    again = Run(arguments(tmp_path, f"{common} --load {tmp_path}/save --ckpt-step 6"), 2, tmp_path, "again")
    assert finish(again) == {iteration: losses[iteration] for iteration in range(7, 11)}
    assert "fills anew" not in again.text(0)


@pytest.mark.multiproc
@pytest.mark.timeout(280)
@pytest.mark.parametrize(
    ("untied", "more"),
    [
        pytest.param(True, "", marks=pytest.mark.slow),
        pytest.param(True, "--bf16", marks=pytest.mark.slow),
        (False, ""),
        pytest.param(False, "--bf16", marks=pytest.mark.slow),
    ],
    ids=["float32", "bf16", "tied", "bf16, tied"],
)
def test_a_checkpoint_goes_on_with_other_layers_a_stage(untied, more, tmp_path):
    """With the flush without a change: the run that was left alone is the oracle."""
    common, flush = f"--train-iters 8 {more}", FLUSH["async_pipeline"]
    first = f"{common} {FIRST} 1 --save {tmp_path}/save --save-interval 5"
    losses = finish(Run(arguments(tmp_path, first, flush, untied), 2, tmp_path, "whole"))
    again = f"{common} --load {tmp_path}/save --ckpt-step 5 --save {tmp_path}/again"
    even = Run(arguments(tmp_path, again, flush, untied), 2, tmp_path, "even")
    assert finish(even) == {iteration: losses[iteration] for iteration in (6, 7, 8)}
    assert "that had other layers: re-cut by layer" in even.text(0)
    # What conversion reads says nothing of stages either.
    model = settings(OF_TWO if untied else f"{TIED} {OF_TWO}", 2, tmp_path).model
    there, here = (read_weights(tmp_path / folder / "global_step8", model) for folder in ("save", "again"))
    assert there.keys() == here.keys()
    assert all(torch.equal(there[name], here[name]) for name in here)
