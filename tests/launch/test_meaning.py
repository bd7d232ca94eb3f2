"""Every option of Megatron's two parsers takes effect, is refused, or has no meaning here: its row says which."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path

import pytest

from noflush.launch import arguments
from noflush.launch.arguments import settings as settings_module
from noflush.launch.arguments.options import RULES, by_dest, gone, options
from noflush.launch.arguments.parser import ArgumentsError, read
from noflush.launch.arguments.understand import understand

LAUNCH = Path(arguments.__file__).parent.parent
MEGATRONS = [option for option in options() if option.parsers != ("noflush",)]

NEEDED = (
    "--num-layers 4 --hidden-size 16 --num-attention-heads 4 --seq-length 8 --max-position-embeddings 8 "
    "--micro-batch-size 1 --global-batch-size 4 --train-iters 10 --lr 1e-3 --mock-data --tokenizer-type NullTokenizer "
    "--vocab-size 50 --untie-embeddings-and-output-weights"
)


def names_read(files):
    """Attributes and strings in the code of ``files``: what could read a value by its name."""
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text()))]
    found = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    texts = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return found | {word for text in texts for word in text.split()}


def test_every_option_has_a_meaning():
    assert len({option.dest for option in MEGATRONS}) > 700
    for option in options():
        assert option.meaning in ("used", "anyway", "ignored", "refused"), option
        assert bool(option.why) == (option.meaning in ("ignored", "refused")), option
        assert bool(option.help) == (option not in MEGATRONS), option
        assert set(option.parsers) <= {"lm", "deepspeed", "noflush"}, option


def test_rows_of_one_attribute_say_the_same_of_it():
    for option in options():
        first = by_dest()[option.dest]
        for name in ("meaning", "why", "one_is_none", "rule", "most", "needed", "values", "otherwise", "sets"):
            assert getattr(option, name) == getattr(first, name), (option, name)


def test_what_a_value_must_be_is_asked_of_what_is_used():
    for option in options():
        asked = option.rule, option.values, option.sets
        assert option.meaning in ("used", "anyway") or not any((*asked, option.needed)), option
        assert option.rule is None or (option.rule in RULES and option.type in ("int", "float")), option
        assert option.rule or not option.needed, option
        assert bool(option.values) == bool(option.otherwise), option
        if option.choices:
            assert set(option.values or ()) <= set(option.choices), option


def test_every_number_that_is_used_has_a_rule():
    """But for those with lists of them, and what is compared with others alone."""
    free = {"encoder_num_layers", "encoder_seq_length", "rampup_batch_size"}
    for option in options():
        if option.meaning == "used" and option.kind == "value" and option.type in ("int", "float"):
            assert option.rule or option.dest in free, option


def test_a_default_keeps_its_rule():
    for option in options():
        if option.rule and option.default is not None:
            assert RULES[option.rule](option.default), option
            assert option.default <= option.most, option


def test_what_no_parser_has_any_more_is_refused():
    assert not gone().keys() & {string for option in options() for string in option.options}
    for string, why in gone().items():
        assert read([string, "1"]).faults == [f"{string}: {why}"]


def test_what_is_taken_as_it_stands_is_a_setting():
    sections = {f.name: f.type for f in dataclasses.fields(settings_module.Settings)} | {"settings": "Settings"}
    taken = [option.sets for option in by_dest().values() if option.sets]
    assert len(taken) == len(set(taken))
    for name in taken:
        section, field = name.split(".")
        assert field in {f.name for f in dataclasses.fields(getattr(settings_module, sections[section]))}, name


def test_what_takes_effect_is_read():
    """As it stands, or by the code that understands it."""
    folder = LAUNCH / "arguments"
    others = ("understand.py", "deepspeed_config.py", "optimizer_section.py")
    files = [*folder.glob("of_*.py"), *(folder / name for name in others)]
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text()))]
    read_as = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    read_as |= {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    used = {option.dest for option in options() if option.meaning == "used" and not option.sets}
    assert not used - read_as


def test_every_setting_is_used():
    """What the arguments are understood as reaches the run."""
    used = names_read(path for path in LAUNCH.rglob("*.py") if not path.name.startswith(("settings", "of_")))
    classes = [
        c
        for c in vars(settings_module).values()
        if dataclasses.is_dataclass(c) and c.__module__ == settings_module.__name__
    ]
    unused = [f"{c.__name__}.{f.name}" for c in classes for f in dataclasses.fields(c) if f.name not in used]
    assert not unused


def value_for(option):
    if option.choices:
        return str(option.choices[-1])
    return {"int": "3", "float": "0.5", "str": "x", "bool": "true"}[option.type]


def test_every_option_parses():
    """At a value of its type; one that is refused becomes a fault, one without meaning is named."""
    for option in options():
        words = [option.options[0]]
        if option.kind == "value":
            words += [value_for(option)] * (option.nargs if isinstance(option.nargs, int) else 1)
        given = read(words)
        written = words[0]
        assert given.named == {option.dest: written}
        named = [name for names in given.without_meaning.values() for name in names]
        assert named == ([written] if option.meaning == "ignored" else []), written
        if option.meaning != "refused":
            assert not given.faults


@pytest.mark.parametrize(
    ("words", "path", "value"),
    [
        ("--ffn-hidden-size 24", "model.ffn_hidden", 24),
        ("--swiglu --ffn-hidden-size 32", "model.gated", True),
        ("--group-query-attention --num-query-groups 2", "model.query_groups", 2),
        ("--num-key-value-heads 2", "model.query_groups", 2),
        ("--kv-channels 8", "model.kv_channels", 8),
        ("--position-embedding-type rope --rotary-base 500000", "model.rope_base", 500000),
        ("--use-rotary-position-embeddings --rotary-position-embeddings-theta 500000", "model.rope_base", 500000),
        ("--use-rotary-position-embeddings", "model.positions", "rope"),
        ("--no-position-embedding", "model.positions", "none"),
        ("--normalization rmsnorm", "model.normalization", "RMSNorm"),
        ("--norm-epsilon 1e-6", "model.norm_epsilon", 1e-6),
        ("--disable-bias-linear", "model.bias", False),
        ("--squared-relu", "model.activation", "squared_relu"),
        ("--relu", "model.activation", "relu"),
        ("--apply-wd-to-all", "optimizer.decay_all", True),
        ("--init-method-std 0.01", "model.init_std", 0.01),
        ("--attention-dropout 0.2", "model.attention_dropout", 0.2),
        ("--tensor-model-parallel-size 2", "ranks.tensor", 2),
        ("--pipeline-model-parallel-size 4", "ranks.pipeline", 4),
        ("--distributed-timeout-minutes 3", "ranks.timeout_minutes", 3),
        ("--rampup-batch-size 4 4 10 --global-batch-size 8", "batch.rampup", (4, 4, 10)),
        ("--lr-warmup-fraction 0.5", "optimizer.warmup_samples", 20),
        ("--lr-warmup-iters 3", "optimizer.warmup_samples", 12),
        ("--lr-warmup-tokens 80", "optimizer.warmup_samples", 10),
        ("--lr-decay-samples 100", "optimizer.decay_samples", 100),
        ("--weight-decay 0.3", "optimizer.weight_decay", (0.3, 0.3)),
        ("--adam-beta2 0.9", "optimizer.betas", (0.9, 0.9)),
        ("--optimizer soap", "deepspeed.optimizer.type", "DelayAwareSOAP"),
        ("--optimizer muon", "deepspeed.optimizer.params.extra_scale_factor", 1.0),
        ("--optimizer muon --muon-momentum 0.8", "deepspeed.optimizer.params.momentum", 0.8),
        ("--optimizer muon --muon-nesterov", "deepspeed.optimizer.params.nesterov", True),
        ("--optimizer muon --muon-no-split-qkv", "optimizer.split_qkv", False),
        ("--clip-grad 0.5", "deepspeed.gradient_clipping", 0.5),
        ("--bf16", "deepspeed.bf16.enabled", True),
        ("--bf16 --accumulate-allreduce-grads-in-fp32", "deepspeed.zero_optimization.stage", 1),
        ("--fp16 --loss-scale 64", "deepspeed.fp16.loss_scale", 64),
        ("--fp16 --initial-loss-scale 4096", "deepspeed.fp16.initial_scale_power", 12),
        ("--fp16 --hysteresis 5", "deepspeed.fp16.hysteresis", 5),
        ("--use-distributed-optimizer", "deepspeed.zero_optimization.stage", 1),
        ("--recompute-granularity full --recompute-method block --recompute-num-layers 2", "steps.recompute_layers", 2),
        ("--checkpoint-activations", "steps.recompute", "uniform"),
        ("--exit-signal-handler --exit-signal SIGINT", "steps.exit_signals", (2, 10)),
        ("--eval-iters 7", "steps.eval_iterations", 7),
        ("", "steps.eval_size", 4),
        ("--eval-global-batch-size 12", "steps.eval_size", 12),
        ("--eval-micro-batch-size 2 --eval-global-batch-size 8", "steps.eval_micro", 2),
        ("--start-eval-at-iter 5", "steps.eval_from", 5),
        ("--no-pad-vocab-size", "model.pad_vocabulary_to", 1),
        ("--seed 5", "steps.seed", 5),
        ("--dataloader-type cyclic", "data.order", "cyclic"),
        ("--num-workers 0", "data.workers", 0),
        ("--reset-attention-mask", "data.reset_mask", True),
        ("--eod-mask-loss", "data.mask_eod", True),
        ("--no-mmap-bin-files", "data.mmap", False),
        ("--load a --ckpt-step 30", "checkpoints.tag", "global_step30"),
        ("--load a --finetune", "checkpoints.load_optimizer", False),
        ("--pretrained-checkpoint b --load a", "checkpoints.load", "b"),
        ("--load a --no-load-rng", "checkpoints.load_rng", False),
        ("--tensorboard-dir t --tensorboard-log-interval 4", "logs.tensorboard_every", 4),
        ("--log-throughput", "logs.throughput", True),
    ],
)
def test_values_reach_the_settings(words, path, value):
    found, _ = understand([*NEEDED.split(), *words.split()], 4)
    for name in path.split("."):
        found = found[name] if isinstance(found, dict) else getattr(found, name)
    assert found == value


@pytest.mark.parametrize(
    ("words", "note"),
    [
        ("--num-query-groups 2", "--num-query-groups: without effect, for there is no --group-query-attention"),
        ("--rotary-percent 0.5", "--rotary-percent: without effect"),
        ("--save-interval 5", "--save-interval: without effect, for there is no --save"),
        ("--ckpt-step 5", "--ckpt-step: without effect, for there is no --load"),
        ("--loss-scale 5", "--loss-scale 5.0: only --fp16 scales the loss"),
        ("--accumulate-allreduce-grads-in-fp32", "--accumulate-allreduce-grads-in-fp32: without effect in fp32"),
        ("--exit-signal SIGINT", "--exit-signal: without effect"),
        ("--wandb-exp-name x", "--wandb-exp-name: without effect, for there is no --wandb-project"),
        (
            "--no-pad-vocab-size --make-vocab-size-divisible-by 8",
            "--make-vocab-size-divisible-by: without effect, for there is no padding of the vocabulary",
        ),
    ],
)
def test_what_takes_no_effect_for_want_of_another_option_is_said(words, note):
    found, _ = understand([*NEEDED.split(), *words.split()], 1)
    assert any(line.startswith(note) for line in found.notes), found.notes


def test_a_refused_option_at_its_default_is_harmless():
    assert not read(["--context-parallel-size", "1", "--ds-sequence-parallel-size", "1"]).faults


def test_the_value_of_an_unknown_option_is_no_second_fault():
    with pytest.raises(ArgumentsError) as error:
        understand([*NEEDED.split(), "--num-layer", "3"], 1)
    assert error.value.faults == ["--num-layer is not an option: did you mean --num-layers?"]
