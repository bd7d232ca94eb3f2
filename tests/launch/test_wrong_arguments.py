"""Wrong argument lists: each one clear error, with the value seen and the fix, before anything is started or allocated.

A case is what is added to a right command line (an option given again wins; one with a leading ``!`` is taken out),
and what its only fault must say.
"""

from __future__ import annotations

import json
import re
import struct

import pytest
import torch
from hypothesis import HealthCheck, example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from noflush.launch.arguments.parser import ArgumentsError
from noflush.launch.arguments.settings import Settings
from noflush.launch.pretrain_gpt import main, settings_of
from tests.launch import runs

WORLD = 2

RIGHT = (
    "--num-layers 4 --hidden-size 32 --num-attention-heads 4 --seq-length 16 --max-position-embeddings 16 "
    "--micro-batch-size 2 --global-batch-size 8 --train-iters 10 --lr 1e-3 --lr-decay-iters 10 --eval-iters 1 "
    "--pipeline-model-parallel-size 2 --untie-embeddings-and-output-weights --data-path $data --vocab-file $vocab "
    "--merge-file $merges --tokenizer-type GPT2BPETokenizer --split 90,9,1"
)

BLOCK = {"async_pipeline": {"enabled": True}}
ADAM = {"type": "PipeDreamAdamW", "params": {"lr": 0.5}}

WRONG = {
    # The command line itself.
    "unknown option": ("--num-layer 4", "--num-layer is not an option: did you mean --num-layers"),
    "unknown option, nothing near": ("--xyzzy", "--xyzzy is not an option: Megatron-LM and .* have no such option"),
    "stray word": ("--bf16 stray", "'stray' belongs to no option"),
    "no number": ("--num-layers four", "--num-layers: invalid int value: 'four'"),
    "no such choice": ("--lr-decay-style sine", r"--lr-decay-style: invalid choice: 'sine' \(choose from"),
    "argument file missing": ("@$folder/none.args", "none.args cannot be read as a file of arguments"),
    "needed option missing": ("!--num-layers", "--num-layers is missing: every Megatron GPT run needs it"),
    "learning rate missing": ("!--lr", "--lr is missing"),
    "zero": ("--hidden-size 0", "--hidden-size is 0: it must be 1 or more"),
    "negative": ("--micro-batch-size -2", "--micro-batch-size is -2: it must be 1 or more"),
    "renamed": ("--batch-size 4", "--batch-size 4: it was renamed: use --micro-batch-size"),
    "renamed long ago": (
        "--activations-checkpoint-method uniform",
        "it was renamed: use --recompute-granularity full --recompute-method",
    ),
    # The model and how it is split.
    "layers by stages": ("--num-layers 5", "--num-layers 5 on --pipeline-model-parallel-size 2: .* use 4 layers"),
    "no layer for another stage": (
        "--decoder-first-pipeline-num-layers 4",
        "-first-pipeline-num-layers 4 leave 0 of --num-layers 4 for the 1 other stages .*: they share the rest",
    ),
    "layers left over": (
        "--decoder-first-pipeline-num-layers 1 --decoder-last-pipeline-num-layers 2",
        "-first-pipeline-num-layers 1 and --decoder-last-.* 2 leave 1 of --num-layers 4 for the 0 other",
    ),
    "more layers than there are": ("--decoder-last-pipeline-num-layers 9", "9 leave -5 of --num-layers 4"),
    "no layer at the first stage": (
        "--decoder-first-pipeline-num-layers 0",
        "--decoder-first-pipeline-num-layers is 0: it must be 1 or more",
    ),
    "embedding counted": (
        "--account-for-embedding-in-pipeline-split",
        "--num-layers 4 on .*-size 2 with --account-for-embedding-.*: every stage gets the same .* use 3 layers",
    ),
    "two ways to say which layers": (
        "--account-for-loss-in-pipeline-split --pipeline-model-parallel-layout Ett|ttL",
        "--pipeline-model-parallel-layout and --account-for-loss-in-pipeline-split each say .*: give one",
    ),
    "layout of no letters": (
        "--pipeline-model-parallel-layout Ett|xxL",
        r"-layout Ett\|xxL: it is made of E \(embedding\), .* Et\|\(tt\|\)\*2tL is four stages",
    ),
    "layout nested": ("--pipeline-model-parallel-layout E((t)*2|)*2L", "it is made of E .*, not nested"),
    "layout without end": ("--pipeline-model-parallel-layout E(t*99999999)*999999|L", "N at most 6"),
    "layout of nothing": ("--pipeline-model-parallel-layout=", "it has 1 stages, and .*-size is 2"),
    "layout of interleaved stages": (
        "--pipeline-model-parallel-layout Et|t|t|tL",
        "it has 4 stages, and --pipeline-model-parallel-size is 2: give as many",
    ),
    "layout in another order": ("--pipeline-model-parallel-layout tEt|ttL", "E comes first and L last, once each"),
    "layout without loss": ("--pipeline-model-parallel-layout Ett|tt", "E comes first and L last, once each"),
    "layout of other layers": ("--pipeline-model-parallel-layout Ett|tL", "it has 3 .* --num-layers is 4: make them"),
    "layout with an empty stage": ("--pipeline-model-parallel-layout |E(t)*4L", "stage 0 has nothing in it: give it"),
    "multi-token prediction": ("--pipeline-model-parallel-layout Ett|ttmL", "m is a layer of multi-token prediction"),
    "heads by tensor size": (
        "--num-attention-heads 1 --tensor-model-parallel-size 2 --pipeline-model-parallel-size 1",
        "--num-attention-heads 1 on --tensor-model-parallel-size 2: it must be a multiple",
    ),
    "ffn by tensor size": (
        "--ffn-hidden-size 33 --tensor-model-parallel-size 2 --pipeline-model-parallel-size 1",
        "--ffn-hidden-size 33 on --tensor-model-parallel-size 2",
    ),
    "hidden by heads": ("--num-attention-heads 5", "--hidden-size 32 with --num-attention-heads 5: .*--kv-channels"),
    "groups": ("--group-query-attention --num-query-groups 3", "3 key-value heads for --num-attention-heads 4"),
    "two numbers of groups": (
        "--group-query-attention --num-query-groups 2 --num-key-value-heads 2",
        "--num-key-value-heads and --num-query-groups mean the same: give one",
    ),
    "no ffn left": ("--swiglu --hidden-size 16", "--swiglu with --hidden-size 16 .*: give --ffn-hidden-size"),
    "two activations": ("--swiglu --squared-relu --ffn-hidden-size 32", "--swiglu and --squared-relu: give one"),
    "relu and another": ("--relu --openai-gelu", "--openai-gelu and --relu: give one"),
    "ranks": ("--pipeline-model-parallel-size 4", "2 ranks for .* the number of ranks must be a multiple"),
    "sequence": ("--seq-length 32", "--seq-length 32 is more than --max-position-embeddings 16: raise the second"),
    "positions": (
        "--position-embedding-type relative",
        "--position-embedding-type relative: use learned_absolute, rope",
    ),
    "odd rotation": (
        "--position-embedding-type rope --rotary-percent 0.4",
        "of 8 channels a head is 3: .* even number",
    ),
    "dropout": ("--hidden-dropout 1.5", "--hidden-dropout is 1.5: it must be at least 0 and below 1"),
    "vocabulary multiple": ("--make-vocab-size-divisible-by 0", "--make-vocab-size-divisible-by is 0: .* 1 or more"),
    "padded vocabulary": ("--padded-vocab-size 100", "--padded-vocab-size 100 for a tokenizer with 50257 token ids"),
    "interleaved, old and new": (
        "--use-rotary-position-embeddings --position-embedding-type none",
        "--use-rotary-position-embeddings, --position-embedding-type none: give one",
    ),
    # Batches, lengths, schedules.
    "global batch": ("--global-batch-size 7", "--global-batch-size 7 is no multiple of .* = 2: use 6 or 8"),
    "ramp-up does not fit": ("--rampup-batch-size 3 2 100", "--rampup-batch-size 3 2 100: .*multiples of 2"),
    "ramp-up from nothing": ("--rampup-batch-size 0 2 100", "--rampup-batch-size 0 2 100"),
    "ramp-up over nothing": ("--rampup-batch-size 2 2 0", "over 1 sample or more"),
    "two lengths": ("--train-samples 80", "--train-iters 10 and --train-samples 80: give one"),
    "two lengths, in tokens": ("--train-tokens 800", "--train-iters 10 and --train-tokens 800: give one"),
    "no length": ("!--train-iters !--lr-decay-iters", "neither --train-iters nor --train-samples nor --train-tokens"),
    "too short": ("!--train-iters --train-samples 4", "4 samples are less than one global batch of 8"),
    "min-lr": ("--min-lr 0.1", "--min-lr 0.1 with --lr 0.001"),
    "warm-up": ("--lr-warmup-iters 10", "80 samples of warm-up for a decay over 80: .*shorten the warm-up"),
    "two warm-ups": ("--lr-warmup-iters 1 --lr-warmup-fraction 0.1", "lr-warmup-fraction and .*: give one length"),
    "two decays": ("--lr-decay-samples 80", "--lr-decay-iters 10 and --lr-decay-samples 80: .*give one"),
    "WSD": ("--lr-decay-style WSD", "--lr-decay-style WSD needs --lr-wsd-decay-iters"),
    "weight decay grows": ("--weight-decay-incr-style linear", "both are needed"),
    "negative weight decay": ("--weight-decay -0.1", "--weight-decay is -0.1: it must be 0 or more"),
    "beta": ("--adam-beta2 1.0", "--adam-beta2 is 1.0: it must be at least 0 and below 1"),
    "infinite": ("--lr inf", "--lr is inf: it must be more than 0"),
    "no number at all": ("--clip-grad nan", "--clip-grad is nan: it must be 0 or more"),
    "layers without end": ("--num-layers 1000000000", "--num-layers is 1000000000: it must be at most 65536"),
    "hidden without end": ("--hidden-size 10000000000000", "--hidden-size is 10000000000000: it must be at most 10995"),
    "more workers than any machine": ("--num-workers 100000", "--num-workers is 100000: it must be at most 4096"),
    "a time-out beyond clocks": (
        "--distributed-timeout-minutes 1000000000000",
        "--distributed-timeout-minutes is 1000000000000: it must be at most 525600",
    ),
    "a scale beyond floats": (
        "--initial-loss-scale 1e300 --fp16",
        r"--initial-loss-scale is 1e\+300: it must be at most",
    ),
    "evaluation's micro-batch": (
        "--eval-micro-batch-size 3",
        "-micro-batch-size 3 x 1 data-parallel .* --eval-global-batch-size 8 .*: .* multiple of 3; use 6 or 9",
    ),
    "evaluation's batch": (
        "--eval-global-batch-size 7",
        "-size 2 x 1 data-parallel .* --eval-global-batch-size 7 .* 6 or",
    ),
    "evaluation of nothing": ("--eval-global-batch-size 0", "--eval-global-batch-size is 0: it must be 1 or more"),
    "evaluation before the start": ("--start-eval-at-iter -1", "--start-eval-at-iter is -1: it must be 0 or more"),
    "no padding, and slices": (
        "--no-pad-vocab-size --tensor-model-parallel-size 2 --pipeline-model-parallel-size 1",
        "--no-pad-vocab-size with a tokenizer of 50257 token ids on --tensor-model-parallel-size 2: .* a multiple",
    ),
    "optimizer": ("--optimizer lion", '--optimizer lion: use adam, sgd, muon, dist_muon or soap, or an "optimizer"'),
    "Muon's momentum": (
        "--optimizer muon --muon-momentum 1",
        "--muon-momentum is 1.0: it must be at least 0 and below 1",
    ),
    "log interval": ("--log-interval 0", "--log-interval is 0: it must be 1 or more"),
    "recompute method": ("--recompute-method block", "--recompute-method block without --recompute-granularity full"),
    "exit signal": (
        "--exit-signal-handler --exit-signal SIGNAL",
        "--exit-signal SIGNAL: no signal that a program can hear",
    ),
    "world size": ("--world-size 2", "--world-size goes with --dry-run alone"),
    # Precision.
    "fp16 and bf16": ("--fp16 --bf16", "--fp16 and --bf16: give one"),
    "fp8": ("--bf16 --fp8-format hybrid", "--fp8-format hybrid: fp8 and fp4 are not supported; use --bf16"),
    "loss scale": ("--fp16 --initial-loss-scale 0", "--initial-loss-scale is 0.0: it must be 1 or more"),
    # What is refused.
    "experts": ("--num-experts 8", r"--num-experts \[?8\]?: mixture of experts is not supported; leave it out"),
    "context parallel": (
        "--context-parallel-size 2",
        "--context-parallel-size 2: sequences are not split .* use size 1",
    ),
    "offloading": ("--optimizer-cpu-offload", "--optimizer-cpu-offload: the next version is written on the device"),
    # Tokenizers.
    "vocabulary missing": ("--vocab-file $folder/none.json", "--vocab-file .*none.json is no file"),
    "merges missing": ("--merge-file $folder/none.txt", "--merge-file .*none.txt is no file"),
    "no vocabulary": ("!--vocab-file", "GPT2BPETokenizer without --vocab-file: add it"),
    "no vocabulary in it": ("--vocab-file $junk", "are no GPT-2 vocabulary"),
    "unknown tokenizer": ("--tokenizer-type Gpt2", "--tokenizer-type: invalid choice: 'Gpt2'"),
    "tokenizer not supported": ("--tokenizer-type TikTokenizer", "TikTokenizer: use one of GPT2BPETokenizer, Hugging"),
    "hugging face, no folder": (
        "--tokenizer-type HuggingFaceTokenizer --tokenizer-model $folder/none",
        "--tokenizer-model .*none cannot be loaded by transformers",
    ),
    "hugging face, nothing named": ("--tokenizer-type HFTokenizer", "without --tokenizer-model: give a folder"),
    "sentencepiece, no model": (
        "--tokenizer-type GPTSentencePieceTokenizer --tokenizer-model $junk",
        "--tokenizer-model .* is no sentencepiece model",
    ),
    "null, no size": ("--tokenizer-type NullTokenizer", "NullTokenizer without --vocab-size: add it"),
    # Data.
    "no data": ("!--data-path", "no data: give --data-path PREFIX"),
    "mock and real": ("--mock-data", "--data-path, --train-data-path ... and --mock-data: give one"),
    "data missing": ("--data-path $folder/none", "none.idx and .*none.bin missing; preprocess_data.py makes it"),
    "prefix with .bin": ("--data-path $data.bin", "give the path without .bin or .idx"),
    "truncated .bin": ("--data-path $short_bin", r"\.bin is truncated \(\d+ of the \d+ bytes its index counts\)"),
    "truncated .idx": ("--data-path $short_idx", r"\.idx is truncated \(\d+ of \d+ bytes\)"),
    "cut-off .idx": ("--data-path $stub", "is no index of megatron-core's; preprocess the data again"),
    "wrong header": ("--data-path $header", "is no index of megatron-core's; preprocess the data again"),
    "empty data": ("--data-path $empty", r"empty\.idx holds no document; preprocess a text that is not empty"),
    "split": ("--split ninety,ten", "--split ninety,ten: give three parts such as 969,30,1"),
    "split of nothing": ("--split 0,0,0", "--split 0,0,0: give three parts .* more than 0"),
    "split too fine": ("--split 99999,1,0", "--split 99999,1,0 leaves no document of the 400 in .* for validation"),
    "weights of nothing": ("--data-path 0 $data 0 $data", "every weight is 0"),
    "weights missing": ("--data-path 0.5 $data $data", "a weight before every prefix"),
    "lists of paths": (
        "!--data-path --per-split-data-args-path $strings",
        "give a list of prefixes for each split",
    ),
    "list of paths missing": ("!--data-path --data-args-path $folder/none", "the file of data paths cannot be read"),
    "validation alone": ("!--data-path --valid-data-path $data", "without --train-data-path: add it"),
    "old format": ("--data-impl lazy", "--data-impl: invalid choice: 'lazy'"),
    # Checkpoints and logs.
    "another model": ("--load $checkpoint", "the checkpoint's model has hidden = 64, the arguments say 32"),
    "unreadable checkpoint": ("--load $broken", "model.json cannot be read .* name another"),
    "no such step": ("--load $checkpoint --ckpt-step 7", "--load .* has no checkpoint global_step7"),
    "must exist": ("--load $folder/none --exit-on-missing-checkpoint", "none holds no checkpoint"),
    "save under a file": ("--save $junk/save", "--save .*: .* is no folder"),
    "wandb without name": ("--wandb-project p", "--wandb-project p without --wandb-exp-name: name the experiment"),
}

CONFIGS = {
    "not there": (None, "--deepspeed_config .* cannot be read: No such file"),
    "no JSON": ("{", "--deepspeed_config .* is no JSON"),
    "a list": ([], "holds a list: it must be a JSON object"),
    "unknown key": (
        {"async_pipeline": {"wieghts": "stash"}},
        "async_pipeline.wieghts is not a key: did you mean 'weights'",
    ),
    "misspelt block": ({"async_pipelin": {}}, "'async_pipelin' is not a key .*: did you mean 'async_pipeline'"),
    "no block in it": ({"async_pipeline": True}, "async_pipeline is True: it must be a JSON object"),
    "micro batch": (
        BLOCK | {"train_micro_batch_size_per_gpu": 4},
        "is 4 in the DeepSpeed config, but --micro-batch-size",
    ),
    "batch": (BLOCK | {"train_batch_size": 4}, "train_batch_size is 4 in .*, but --global-batch-size makes it 8"),
    "scheduler": (BLOCK | {"scheduler": {"type": "WarmupLR"}}, "has a scheduler, .*: take the section out"),
    "learning rate": (BLOCK | {"optimizer": ADAM}, r"optimizer.params.lr is 0.5 .*, but --lr says 0.001: take one out"),
    "precision": (
        BLOCK | {"bf16": {"enabled": True}, "fp16": {"enabled": True}},
        "fp16 says|bf16.enabled is True .*fp16",
    ),
    "section": (BLOCK | {"bf16": True}, "bf16 is True in the DeepSpeed config: it must be a JSON object"),
    "parameters": (
        BLOCK | {"optimizer": {"type": "Adam", "params": 3}},
        "optimizer.params is 3 .* must be a JSON object",
    ),
    "ZeRO-2": (BLOCK | {"zero_optimization": {"stage": 2}}, "stage is 2: ZeRO-2 and ZeRO-3 .*; use stage 0 or 1"),
    "offload": (BLOCK | {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}}, "take it out"),
    "2bw": ({"async_pipeline": {"weights": "2bw", "extra_in_flight": 9}}, "2bw"),
}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """What the $names stand for."""
    folder = tmp_path_factory.mktemp("wrong")
    names = {"folder": folder, "junk": folder / "junk", "data": runs.indexed_data(folder / "data", 50257, 400)}
    names["vocab"], names["merges"] = runs.gpt2_vocabulary(folder)
    names["junk"].write_text("{")
    whole = {end: (folder / f"data.{end}").read_bytes() for end in ("bin", "idx")}
    for name, binary, index in (
        ("short_bin", whole["bin"][:-1], whole["idx"]),
        ("short_idx", whole["bin"], whole["idx"][:-1]),
        ("stub", whole["bin"], whole["idx"][:20]),
        ("header", whole["bin"], b"TNTIDX" + whole["idx"][6:]),
        ("empty", b"", b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 4, 0, 1) + bytes(8)),
    ):
        names[name] = folder / name
        (folder / f"{name}.bin").write_bytes(binary)
        (folder / f"{name}.idx").write_bytes(index)
    names["strings"] = folder / "strings.json"
    names["strings"].write_text(json.dumps({"train": "one", "valid": "two", "test": "three"}))
    for name, text in (("checkpoint", json.dumps({"hidden": 64})), ("broken", "{")):
        names[name] = folder / name
        (names[name] / "global_step5").mkdir(parents=True)
        (names[name] / "latest").write_text("global_step5")
        (names[name] / "global_step5" / "model.json").write_text(text)
    return {f"${name}": str(path) for name, path in names.items()}


def command_line(change, places):
    """`RIGHT` with ``change``; a list of one's own where that is one."""
    argv = RIGHT.split()
    for word in change.split():
        if word.startswith("!"):
            at = argv.index(word[1:])
            end = next((i for i in range(at + 1, len(argv)) if argv[i].startswith("--")), len(argv))
            del argv[at:end]
        else:
            argv.append(word)
    names = sorted(places, key=len, reverse=True)  # $data.bin before ...
    for name in names:
        argv = [word.replace(name, places[name]) for word in argv]
    return argv


def faults_of(argv, world=WORLD):
    """The faults; asserts that finding them started nothing and allocated no weight."""
    made = []
    init = torch.nn.Parameter.__new__
    torch.nn.Parameter.__new__ = lambda *args, **kwargs: made.append(args) or init(*args, **kwargs)
    try:
        with pytest.raises(ArgumentsError) as error:
            settings_of(argv, world)
    finally:
        torch.nn.Parameter.__new__ = init
    assert not torch.distributed.is_initialized()
    assert not made
    return error.value.faults


def test_the_right_one(places):
    found, without_meaning = settings_of(command_line("", places), WORLD)
    assert found.model.vocabulary == 50304
    assert without_meaning == {}


@pytest.mark.parametrize("name", WRONG)
def test_wrong(name, places):
    change, message = WRONG[name]
    faults = faults_of(command_line(change, places))
    assert len(faults) == 1, faults
    assert_says(faults[0], message)


def test_tied_embeddings_need_gradients_that_are_in_reach(places, tmp_path):
    config = BLOCK | {"optimizer": {"type": "Adam"}, "bf16": {"enabled": True}}
    path = runs.write_config(tmp_path / "ds_config.json", config)
    tied = command_line("!--untie-embeddings-and-output-weights", places)
    (fault,) = faults_of([*tied, "--bf16", "--deepspeed_config", str(path)])
    assert fault.startswith("tied layers 'embedding' with optimizer 'Adam' in mixed precision")
    assert "pass --untie-embeddings-and-output-weights, or set the schedule" in fault


def test_a_batch_that_grows_and_another_groups_stage_do_not_go_together(places, tmp_path):
    replicas = {"lighthouse": "127.0.0.1:29510", "reroute": True}
    path = runs.write_config(tmp_path / "ds_config.json", {"async_pipeline": {"replicas": replicas}})
    growing = command_line("--rampup-batch-size 4 4 100", places)
    (fault,) = faults_of([*growing, "--deepspeed_config", str(path)])
    assert fault.startswith("--rampup-batch-size with async_pipeline.replicas.reroute in the DeepSpeed config")


@pytest.mark.parametrize("name", CONFIGS)
def test_wrong_deepspeed_config(name, places, tmp_path):
    config, message = CONFIGS[name]
    path = tmp_path / "ds_config.json"
    if config is not None:
        path.write_text(config if isinstance(config, str) else json.dumps(config))
    faults = faults_of([*command_line("", places), "--deepspeed_config", str(path)])
    assert_says("\n".join(faults), message)
    assert len(faults) == 1 or name in ("precision", "not there"), faults


def assert_says(text, message):
    assert re.search(message, text, re.S), text


def test_every_fault_is_listed_at_once(places):
    change = "--num-layers 5 --global-batch-size 7 --min-lr 1 --num-experts 8 --split x --foo --vocab-file none"
    faults = faults_of(command_line(change, places))
    assert len(faults) == 5
    assert str(ArgumentsError(faults)).count("\n  - ") == 5


def test_the_program_says_it_and_ends(places, monkeypatch, capsys):
    for name in ("RANK", "WORLD_SIZE", "SLURM_JOB_ID", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    argv = command_line("--num-layers 5 --pipeline-model-parallel-size 3", places)
    assert main(argv) == 2
    said = capsys.readouterr().err
    assert "--num-layers 5 on --pipeline-model-parallel-size 3" in said
    assert "Traceback" not in said


INTEGERS = (
    "num-layers hidden-size ffn-hidden-size num-attention-heads kv-channels num-key-value-heads seq-length "
    "max-position-embeddings micro-batch-size global-batch-size train-iters train-samples train-tokens lr-decay-iters "
    "lr-warmup-iters lr-warmup-samples eval-iters eval-interval tensor-model-parallel-size "
    "pipeline-model-parallel-size vocab-size padded-vocab-size make-vocab-size-divisible-by recompute-num-layers "
    "hysteresis seed num-workers rotary-base"
)
FLOATS = (
    "lr min-lr lr-warmup-fraction weight-decay clip-grad adam-beta1 adam-eps attention-dropout init-method-std "
    "layernorm-epsilon rotary-percent loss-scale initial-loss-scale loss-scale-window min-loss-scale"
)
FLAGS = (
    "fp16 bf16 swiglu group-query-attention use-rotary-position-embeddings use-distributed-optimizer "
    "checkpoint-activations accumulate-allreduce-grads-in-fp32"
)


@hypothesis_settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@example({"global-batch-size": -1}, {}, set(), (-2, -2, 1), 1)  # a ramp that leads nowhere once had no end
@given(
    st.dictionaries(st.sampled_from(INTEGERS.split()), st.integers(-2, 9) | st.just(10**12), max_size=5),
    st.dictionaries(
        st.sampled_from(FLOATS.split()), st.floats(-2, 3) | st.sampled_from([0.0, 1e300, float("inf")]), max_size=4
    ),
    st.sets(st.sampled_from(FLAGS.split()), max_size=3),
    st.none() | st.tuples(*[st.integers(-2, 9)] * 3),
    st.integers(1, 4),
)
def test_odd_numbers_end_in_settings_or_in_faults(integers, floats, flags, rampup, world):
    argv = RIGHT.replace("--data-path $data --vocab-file $vocab --merge-file $merges", "--mock-data").split()
    argv += ["--tokenizer-type", "NullTokenizer", "--vocab-size", "50"]
    for name, value in integers.items():
        argv += [f"--{name}={value}"]
    for name, value in floats.items():
        argv += [f"--{name}={value!r}"]
    argv += [f"--{flag}" for flag in flags]
    if rampup:
        argv += ["--rampup-batch-size", *map(str, rampup)]
    try:
        found, _ = settings_of(argv, world)
    except ArgumentsError:
        return
    assert isinstance(found, Settings)
    assert found.gas >= 1
    assert found.model.vocabulary > 50
    assert 0 <= found.optimizer.warmup_samples < found.optimizer.decay_samples
