"""Logits and losses: transformers' models against megatron-core's GPTModel and a trained pipeline, in float32.

Sums are in another order on either side: 1e-5 of logits of size 1, as measured with room; one wrong row is 1e-2.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from noflush.launch import convert_checkpoint
from noflush.launch.convert.folder import write_folder
from noflush.launch.convert.hugging_face import to_hugging_face
from noflush.launch.convert.state_dict import write_checkpoint
from tests.launch.models import MODELS, weights
from tests.launch.runs import write_config
from tests.multiproc.ranks import run_ranks

pytestmark = pytest.mark.multiproc

TOLERANCE = 1e-5
TOKENS = torch.arange(2 * 16).reshape(2, 16) * 7 % 96


def _logits_of_transformers(folder):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(TOKENS).logits


def _logits(rank, folder):
    """By model, logits [b, s, v] of megatron-core's GPTModel, of the pipeline's layers, and of transformers."""
    from deepspeed.pipe import TiedLayerSpec
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel

    from noflush.launch.gpt.config import layer_spec, transformer_config
    from noflush.launch.gpt.pipeline import layer_specs
    from noflush.patches.megatron_core import dropout as megatron_core

    parallel_state.initialize_model_parallel(1, 1)
    megatron_core.patch()
    torch.cuda.current_device = lambda: "cpu"  # where GPTModel's own rotary embedding goes
    positions = torch.arange(16).expand(2, -1)
    found = {}
    for name, model in MODELS.items():
        state, path = weights(model), Path(folder) / name
        write_folder(path / "hf", *to_hugging_face(state, model))
        theirs = _logits_of_transformers(path / "hf")

        core = GPTModel(
            transformer_config(model, 1),
            layer_spec(model),
            model.vocabulary,
            model.max_positions,
            share_embeddings_and_output_weights=model.tied,
            position_embedding_type=model.positions,
            rotary_base=model.rope_base,
            rope_scaling=model.rope_scaling is not None,
            rope_scaling_factor=model.rope_scaling or 1.0,
            seq_len_interpolation_factor=model.rope_interpolation,
        ).eval()
        lost = core.load_state_dict(state, strict=False)
        assert not lost.unexpected_keys
        assert all(key.endswith("_extra_state") for key in lost.missing_keys), lost.missing_keys
        checkpoint = write_checkpoint(path / "ck", state, model)
        hidden, embedding = (TOKENS, positions), None
        with torch.no_grad():
            cores = core(TOKENS, positions, None)
            for number, spec in enumerate(layer_specs(model, seed=1)):
                if isinstance(spec, TiedLayerSpec) and embedding is not None:
                    hidden = spec.forward_fn(embedding, hidden)
                    continue
                layer = spec.build().eval()
                # As DeepSpeed's PipelineModule loads it.
                layer.load_state_dict(torch.load(checkpoint / f"layer_{number:02d}-model_00-model_states.pt"))
                embedding = embedding or layer
                hidden = layer(hidden)
        found[name] = cores, hidden.transpose(0, 1), theirs
    return found


def test_logits_are_those_of_megatron_core(tmp_path):
    for name, (core, ours, theirs) in run_ranks(_logits, 1, timeout=100, folder=str(tmp_path))[0].items():
        assert core.std() > 0.3, name
        assert (ours - core).abs().max() < TOLERANCE, name
        assert (theirs - core).abs().max() < TOLERANCE, name


# ---- a run -----------------------------------------------------------------------------------------------

MODEL = """--num-layers 2 --hidden-size 32 --ffn-hidden-size 48 --num-attention-heads 4 --group-query-attention
    --num-query-groups 2 --seq-length 16 --max-position-embeddings 16 --position-embedding-type rope --swiglu
    --normalization RMSNorm --disable-bias-linear --untie-embeddings-and-output-weights --attention-dropout 0
    --hidden-dropout 0 --init-method-std 0.2 --make-vocab-size-divisible-by 48"""
TRAINING = """--micro-batch-size 2 --global-batch-size 4 --train-iters 2 --lr 1e-2 --vocab-size 90 --mock-data
    --pipeline-model-parallel-size 2"""


def _batches(seed):
    draw = torch.Generator().manual_seed(seed)
    while True:
        tokens = torch.randint(0, 91, (2, 17), generator=draw)
        positions, mask = torch.arange(16).expand(2, -1).contiguous(), torch.ones(2, 16)
        yield (tokens[:, :-1].contiguous(), positions), (tokens[:, 1:].contiguous(), mask)


def _engine(argv, world):
    from noflush.launch.pretrain_gpt import settings_of
    from noflush.launch.training.start import build_engine, join

    settings, _ = settings_of(argv, world)
    join(settings.ranks)
    return settings, build_engine(settings)


def _train(rank, argv):
    """Four iterations, a checkpoint; losses of two held-out micro-batches before and after."""
    from noflush.launch.arguments.progress import Position
    from noflush.launch.training import checkpoint

    settings, engine = _engine(argv, 4)
    before = float(engine.eval_batch(_batches(9), num_micro_batches=2))
    data = _batches(1)
    for _ in range(4):
        engine.train_batch(data_iter=data)
    checkpoint.save(engine, settings.checkpoints, settings.model, settings.tokens, Position(iteration=4))
    return before, float(engine.eval_batch(_batches(9), num_micro_batches=2))


def _go_on(rank, argv):
    """Losses of a run that starts from an imported checkpoint: of two held-out micro-batches, then of training on them.

    Of the second only the last stage knows it at once.
    """
    from noflush.launch.training import checkpoint

    settings, engine = _engine(argv, 2)
    position = checkpoint.load(engine, settings.checkpoints, "global_step0")
    assert position.iteration == 0
    held_out = float(engine.eval_batch(_batches(9), num_micro_batches=2))
    return held_out, float(engine.train_batch(data_iter=_batches(9)))


AHEAD = {"optimizer": {"type": "DelayAwareMuon", "params": {"look_ahead": 0.5}}, "async_pipeline": {}}


@pytest.mark.parametrize("config", [None, AHEAD], ids=["adam", "muon with a look-ahead"])
def test_a_run_goes_out_and_comes_back(config, tmp_path):
    """TP 2 x PP 2 trains; its export has the loss it evaluated; PP 2 goes on from that import at that very loss.

    Of 96 rows 91 are token ids: in the run five random ones are padding, in its export and import there are none.
    Forwards that look ahead compute with other weights; what is saved, exported and evaluated are the true ones.
    """
    from transformers import AutoModelForCausalLM

    run, exported, imported = (str(tmp_path / name) for name in ("run", "hf", "im"))
    split = ["--tensor-model-parallel-size", "2", "--save", run]
    if config is not None:
        split += ["--deepspeed_config", str(write_config(tmp_path / "ds_config.json", config))]
    before, after = run_ranks(_train, 4, timeout=120, argv=[*MODEL.split(), *TRAINING.split(), *split])[-1]
    assert abs(before - after) > 0.01  # the checkpoint is not the start

    convert_checkpoint.to_hf(run, exported, None, None)
    network = AutoModelForCausalLM.from_pretrained(exported, local_files_only=True).eval()
    assert network.config.vocab_size == 91
    losses = []
    for (tokens, _), (labels, _) in itertools.islice(_batches(9), 2):
        with torch.no_grad():
            losses.append(F.cross_entropy(network(tokens).logits.flatten(0, 1), labels.flatten()))
    assert abs(float(sum(losses)) / 2 - after) < TOLERANCE

    convert_checkpoint.from_hf(exported, imported, None)
    argv = [f"@{imported}/model.args", *TRAINING.split(), "--load", imported, "--finetune"]
    held_out, first = run_ranks(_go_on, 2, timeout=120, argv=argv)[-1]
    assert abs(held_out - after) < TOLERANCE
    assert abs(first - after) < TOLERANCE
