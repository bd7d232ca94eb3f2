"""Argument lists of real scripts, in `scripts/` as their authors wrote them: they parse, and train two iterations.

Only sizes change (`SMALL`, by option, where a script has it); the paths they leave to their user are $NAMES. What
noflush refuses in a script is listed with it, as is what takes its place.
"""

from __future__ import annotations

import json
import math
import shlex
from dataclasses import dataclass
from pathlib import Path
from string import Template

import pytest

from noflush.launch.arguments.options import options
from noflush.launch.arguments.parser import ArgumentsError
from noflush.launch.pretrain_gpt import settings_of
from tests.launch import runs
from tests.multiproc.ranks import run_ranks

SCRIPTS = Path(__file__).parent / "scripts"
WORLD = 2

SMALL = {
    "--num-layers": "2",
    "--hidden-size": "32",
    "--ffn-hidden-size": "48",
    "--num-attention-heads": "4",
    "--num-query-groups": "2",
    "--num-key-value-heads": "2",
    "--kv-channels": "8",
    "--seq-length": "16",
    "--max-position-embeddings": "16",
    "--micro-batch-size": "1",
    "--global-batch-size": "4",
    "--rampup-batch-size": "2 2 4",
    "--step-batch-size-schedule": "0:2,64:4",  # tokens
    "--tensor-model-parallel-size": "1",
    "--pipeline-model-parallel-size": "2",
    "--expert-model-parallel-size": "1",
    "--vocab-size": "200",
    "--train-iters": "2",
    "--train-samples": "8",
    "--train-tokens": str(2 * 4 * 16),
    "--eval-iters": "1",
    "--lr-warmup-iters": "1",
}
SMALL_CONFIG = {"train_batch_size": 4, "train_micro_batch_size_per_gpu": 1}


@dataclass(frozen=True)
class Script:
    """What a script needs besides smaller sizes.

    Attributes:
        refused: options it gives that are refused, with what the fault must say.
        instead: what is given in place of those.
        sizes: overrides of `SMALL`.
        config: overrides of its DeepSpeed config.
        schedule: of noflush.
    """

    refused: tuple[tuple[str, str], ...] = ()
    instead: tuple[str, ...] = ()
    sizes: tuple[tuple[str, str], ...] = ()
    config: tuple[tuple[str, object], ...] = ()
    schedule: str = "1f1b_no_flush"


FLUSH = "1f1b_flush"
RENAMED = ("--activations-checkpoint-method", "use --recompute-granularity full --recompute-method")
RECOMPUTE = ("--recompute-granularity", "full", "--recompute-method", "uniform")
CASES = {
    # Tied, as Megatron has it by default; the batch grows while it trains.
    "lm_gpt3_175b": Script(),
    # The same of the newest release.
    "lm_gpt3_175b_0.19": Script(),
    # One stage, two replicas.
    "lm_llama3_8b_fp8": Script(
        refused=(
            ("--apply-layernorm-1p", "leave it out"),
            ("--decoupled-lr", "all parameters share one learning rate"),
            ("--decoupled-min-lr", "all parameters share one learning rate"),
            ("--grad-reduce-in-bf16", "communication_data_type"),
            ("--calculate-per-token-loss", "leave it out"),
            ("--fp8-format", "use --bf16"),
            ("--fp8-param-gather", "use --bf16"),
        ),
    ),
    "lm_sc21_76b": Script(refused=(RENAMED,), instead=RECOMPUTE),
    "lm_mixtral_8x7b": Script(
        refused=(("--num-experts", "leave it out for a dense model"),), sizes=(("--split", "90,8,2"),)
    ),
    # Two slices of one stage: nothing is tied across ranks, and there is nothing to flush.
    "mds_gpt_345m_mp": Script(
        sizes=(("--tensor-model-parallel-size", "2"), ("--pipeline-model-parallel-size", "1")),
    ),
    # The same with the flush.
    "mds_gpt3_175b": Script(refused=(RENAMED,), instead=RECOMPUTE, schedule=FLUSH),
    "mds_llama": Script(),
    "mds_llama2": Script(),
    "mds_universal_llama_bf16": Script(),
    "mds_universal_gpt_fp16": Script(),
    "mds_rebase_13b": Script(),
    "mds_rebase_rope_1.3b": Script(),
    "mds_zero_bubble_1.3b": Script(
        refused=(("--zero-stage", 'set "zero_optimization": {"stage": 1}'),),
        instead=("--zero-stage", "1"),
        config=(("zero_optimization", {"stage": 1}), ("prescale_gradients", False)),
    ),
}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """What the $NAMES in the scripts stand for."""
    folder = tmp_path_factory.mktemp("scripts")
    vocabulary, merges = runs.gpt2_vocabulary(folder)
    names = {"VOCAB": vocabulary, "MERGES": merges, "PIECES": runs.sentencepiece_model(folder)}
    for number, name in enumerate(("DATA", "DATA_2", "DATA_3")):
        names[name] = runs.indexed_data(folder / name, 50257, seed=number)
    names["PIECES_DATA"] = runs.indexed_data(folder / "pieces", 36)
    return names


def words_of(name: str) -> list[list[str]]:
    """A script's options, each with its values."""
    lines = (SCRIPTS / f"{name}.args").read_text().splitlines()[1:]
    return [shlex.split(line.replace("=", " ", 1)) for line in lines]


def arguments(name: str, places: dict[str, Path], folder: Path, refused: bool = False) -> list[str]:
    """The script's arguments in small; with ``refused``, as its author wants them."""
    script = CASES[name]
    sizes = SMALL | dict(script.sizes)
    out = [option for option, _ in script.refused]
    argv: list[str] = []
    for option, *values in words_of(name):
        if option in out and not refused:
            continue
        argv.append(option)
        argv += sizes[option].split() if option in sizes else values
    argv += [] if refused else script.instead
    config = {}
    if (SCRIPTS / f"{name}.json").exists():
        config = json.loads((SCRIPTS / f"{name}.json").read_text()) | SMALL_CONFIG
    if not refused:
        config |= dict(script.config)
    config["async_pipeline"] = {"enabled": True, "schedule": FLUSH if refused else script.schedule}
    path = runs.write_config(folder / "ds_config.json", config)
    if "--deepspeed_config" not in argv:
        argv += ["--deepspeed_config", "$CONFIG"]
    known = {"FOLDER": folder, "CONFIG": path} | places
    return [Template(word).substitute(known) for word in argv]


def test_every_script_is_a_case_and_names_its_origin():
    assert {path.stem for path in SCRIPTS.glob("*.args")} == set(CASES)
    for path in SCRIPTS.glob("*.args"):
        assert path.read_text().startswith(("# NVIDIA/Megatron-LM, core_v0.1", "# deepspeedai/Megatron-DeepSpeed,"))
    assert [name for name, script in CASES.items() if script.schedule == FLUSH] == ["mds_gpt3_175b"]


@pytest.mark.parametrize("name", CASES)
def test_parses(name, places, tmp_path):
    """Every option takes effect or is named as one without meaning."""
    argv = arguments(name, places, tmp_path)
    settings, without_meaning = settings_of(argv, WORLD)
    named = {option for kind in without_meaning.values() for option in kind}
    meaning = {string: option.meaning for option in options() for string in option.options}
    for option in (word for word in argv if word.startswith("--")):
        assert meaning[option] in ("used", "anyway") or (option in named) == (meaning[option] == "ignored"), option
    assert settings.model.layers == 2
    assert settings.deepspeed["train_micro_batch_size_per_gpu"] == 1
    grows = settings.batch.rampup or settings.batch.schedule
    iterations = 2 + 2 if grows else 2 * settings.batch.global_size  # of a ramp, the first two
    assert settings.steps.samples == (8 if settings.steps.by_samples else iterations)


@pytest.mark.parametrize("name", [name for name, script in CASES.items() if script.refused])
def test_what_is_refused_names_an_alternative(name, places, tmp_path):
    with pytest.raises(ArgumentsError) as error:
        settings_of(arguments(name, places, tmp_path, refused=True), WORLD)
    faults = error.value.faults
    for option, alternative in CASES[name].refused:
        about = [fault for fault in faults if fault.startswith(f"{option}") or option == "--zero-stage"]
        assert any(alternative in fault for fault in about), (option, faults)
    assert len(faults) == len(CASES[name].refused)


def train(rank, argv):
    from deepspeed.accelerator import get_accelerator
    from megatron.core import parallel_state

    from noflush.launch.gpt.size import parameters
    from noflush.launch.pretrain_gpt import prepare
    from noflush.launch.signals import Signals
    from noflush.launch.start_lines import start_lines

    # DeepSpeed says no; torch can, slowly.
    type(get_accelerator()).is_fp16_supported = lambda self: True
    settings, without_meaning = settings_of(argv, WORLD)
    count = parameters(settings.model)
    training = prepare(settings, rank, start_lines(settings, count, without_meaning), count, Signals(()))
    losses = []
    train_batch = training.engine.train_batch

    def recorded(data_iter):
        loss = train_batch(data_iter=data_iter)
        losses.append(loss.item())
        return loss

    training.engine.train_batch = recorded
    reason = training.run()
    built = sum(p.numel() for p in training.engine.module.parameters())
    parallel_state.destroy_model_parallel()
    return reason, training.position.iteration, losses, built, type(training.engine).__module__


# Half of them always: both repositories, with and without the flush, tensor parallel.
ALWAYS = {
    "lm_gpt3_175b",
    "lm_gpt3_175b_0.19",
    "lm_llama3_8b_fp8",
    "mds_gpt_345m_mp",
    "mds_gpt3_175b",
    "mds_llama2",
    "mds_universal_llama_bf16",
}


@pytest.mark.multiproc
@pytest.mark.parametrize(
    "name", [name if name in ALWAYS else pytest.param(name, marks=pytest.mark.slow) for name in CASES]
)
def test_trains_two_iterations(name, places, tmp_path, monkeypatch):
    argv = arguments(name, places, tmp_path)
    settings, _ = settings_of(argv, WORLD)
    results = run_ranks(train, WORLD, timeout=60, environment={"WANDB_MODE": "offline"}, argv=argv)
    for reason, iteration, losses, _, engine in results:
        assert (reason, len(losses)) == (None, iteration)
        assert engine == "noflush.patches.deepspeed.engine"
        assert iteration == (
            3 if (settings.batch.rampup or settings.batch.schedule) and settings.steps.by_samples else 2
        )
    *_, (_, _, losses, _, _) = results
    assert losses == pytest.approx([math.log(settings.model.token_ids)] * len(losses), rel=0.03)
    if settings.checkpoints.save:
        assert (Path(settings.checkpoints.save) / "latest").read_text() == f"global_step{len(losses)}"
