"""The megatron-core model under the engine: against the simulator, megatron-core's own, and split in every way."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from tests.launch.megatron import LLAMA, NADAMW, TIED, VOCABULARY, micro_batch, samples, settings, simulate, train
from tests.multiproc.ranks import run_ranks

pytestmark = pytest.mark.multiproc


@pytest.mark.parametrize("stages", [2, 4])
@pytest.mark.parametrize("arguments", ["", LLAMA + " --global-batch-size 4"], ids=["gpt", "llama K=2"])
def test_equals_the_simulator(stages, arguments, tmp_path):
    run = settings(f"--pipeline-model-parallel-size {stages} {arguments}", stages, tmp_path)
    results = run_ranks(train, stages, run=run, calls=10)
    ((losses, weights),) = run_ranks(simulate, 1, run=run, calls=10)
    assert results[-1]["losses"] == losses
    assert len(set(losses)) == len(losses) == 10 * run.gas
    for result, expected in zip(results, weights, strict=True):
        assert len(result["weights"]) == len(expected)
        assert all(torch.equal(a, b) for a, b in zip(result["weights"], expected, strict=True))


def test_equals_the_simulator_with_padding(tmp_path):
    """And no padded id has had a probability: the first loss would be that of 96 ids."""
    run = settings("--pipeline-model-parallel-size 2", 2, tmp_path)
    padded = dataclasses.replace(run.model, vocabulary=96, vocabulary_padding=96 - VOCABULARY)
    run = dataclasses.replace(run, model=padded)
    results = run_ranks(train, 2, run=run, calls=6)
    ((losses, weights),) = run_ranks(simulate, 1, run=run, calls=6)
    assert results[-1]["losses"] == losses
    assert losses[0] == pytest.approx(math.log(VOCABULARY), abs=0.05)
    assert all(torch.equal(a, b) for a, b in zip(results[-1]["weights"], weights[-1], strict=True))


def _parity(rank, run):
    """(our logits, megatron-core's, our loss, megatron-core's) of one batch with the same weights."""
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec

    from noflush.launch.gpt.config import transformer_config
    from noflush.launch.gpt.layers import NextTokenLoss
    from noflush.launch.gpt.pipeline import layer_specs
    from noflush.launch.training.random_state import seed_everything
    from noflush.launch.training.start import join

    join(run.ranks)
    seed_everything(1, 0)
    model = run.model
    config = transformer_config(model, 1)
    torch.cuda.current_device = lambda: "cpu"  # megatron-core's rotary embedding moves there
    whole = GPTModel(
        config,
        get_gpt_layer_local_spec(normalization=model.normalization, qk_layernorm=model.qk_norm),
        model.vocabulary,
        model.max_positions,
        position_embedding_type=model.positions,
        rotary_percent=model.rope_percent,
        rotary_base=model.rope_base,
        parallel_output=False,
    ).eval()
    assert model.positions != "rope" or isinstance(whole.rotary_pos_emb, RotaryEmbedding)
    layers = [spec.build() for spec in layer_specs(model, 7)]
    for parameter in layers[-2].parameters():
        torch.nn.init.normal_(parameter, 1.0, 0.1)
    embedding, *blocks, norm, head = layers
    state = {f"embedding.{k}": v for k, v in embedding.embedding.state_dict().items()}
    for number, block in enumerate(blocks):
        state |= {f"decoder.layers.{number}.{k}": v for k, v in block.layer.state_dict().items()}
    state |= {f"decoder.final_layernorm.{k}": v for k, v in norm.norm.state_dict().items()}
    state |= {f"output_layer.{k}": v for k, v in head.output_layer.state_dict().items()}
    whole.load_state_dict(state, strict=True)
    tokens, labels = samples(3)
    (tokens, positions), targets = micro_batch(tokens, labels)
    hidden = (tokens, positions)
    for layer in layers:
        layer.eval()
        hidden = layer(hidden)
    mask = torch.triu(torch.ones(1, 1, 16, 16, dtype=torch.bool), 1)
    theirs = whole(tokens, positions, mask)
    loss = whole(tokens, positions, mask, labels=labels).mean()
    ours = hidden.transpose(0, 1).detach().clone()  # the loss overwrites the logits
    return ours, theirs.detach(), NextTokenLoss()(hidden, targets).item(), loss.item()


@pytest.mark.parametrize(
    "arguments", ["", LLAMA, "--qk-layernorm --openai-gelu --position-embedding-type rope --rotary-percent 0.5"]
)
def test_logits_and_loss_are_those_of_megatron_cores_own_model(arguments, tmp_path):
    run = settings(arguments, 1, tmp_path)
    ((ours, theirs, our_loss, their_loss),) = run_ranks(_parity, 1, run=run)
    assert ours.std() > 0.01
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert our_loss == pytest.approx(their_loss, abs=1e-6)


def _losses(results):
    return [result["losses"] for result in results if result["losses"]]


@pytest.mark.parametrize("arguments", ["", LLAMA], ids=["gpt", "llama"])
def test_tensor_parallel_matches_one_slice(arguments, tmp_path):
    """Clipped, so that a norm that counted a replicated weight twice, or a split one once, would show."""
    arguments += " --pipeline-model-parallel-size 2 --clip-grad 0.5"
    whole = settings(arguments, 2, tmp_path)
    split = settings(arguments + " --tensor-model-parallel-size 2", 4, tmp_path)
    expected = run_ranks(train, 2, run=whole, calls=8)
    got = run_ranks(train, 4, run=split, calls=8)
    (reference,) = _losses(expected)
    first, second = _losses(got)
    assert first == second
    assert first == pytest.approx(reference, abs=2e-6)
    assert got[0]["norm"].item() == pytest.approx(expected[0]["norm"].item(), rel=1e-4)


ADAMW = {"type": "AdamW", "params": {"torch_adam": True}}
BLOCK = {"enabled": True}
KEEPERS = {
    "DeepSpeed's AdamW": {"optimizer": ADAMW, "async_pipeline": BLOCK},
    "ZeRO-1": {"optimizer": NADAMW, "async_pipeline": BLOCK, "zero_optimization": {"stage": 1}},
    "ZeRO-1, DeepSpeed's AdamW": {"optimizer": ADAMW, "async_pipeline": BLOCK, "zero_optimization": {"stage": 1}},
    "bf16": {"optimizer": NADAMW, "async_pipeline": BLOCK, "bf16": {"enabled": True}},
    "bf16, DeepSpeed's AdamW": {"optimizer": ADAMW, "async_pipeline": BLOCK, "bf16": {"enabled": True}},
}


@pytest.mark.parametrize("keeper", KEEPERS)
def test_norms_over_slices_wherever_the_weights_are_kept(keeper, tmp_path):
    """Clipped hard: a norm that missed or doubled a part would be another model after eight updates."""
    arguments = "--clip-grad 0.05 --global-batch-size 4"
    one = settings(arguments, 2, tmp_path, KEEPERS[keeper])
    split = settings(arguments + " --tensor-model-parallel-size 2", 4, tmp_path, KEEPERS[keeper])
    assert one.ranks.data == split.ranks.data == 2
    expected, got = run_ranks(train, 2, run=one, calls=6), run_ranks(train, 4, run=split, calls=6)
    error = 2e-2 if "bf16" in keeper else 2e-6
    assert _losses(got)[0] == _losses(got)[1]
    assert _losses(got)[0] == pytest.approx(_losses(expected)[0], abs=error)
    relative = 2e-2 if "bf16" in keeper else 1e-4
    assert [float(r["norm"]) for r in got] == pytest.approx([float(expected[0]["norm"])] * 4, rel=relative)


def test_data_parallel_matches_one_replica(tmp_path):
    arguments = "--pipeline-model-parallel-size 2 --global-batch-size 4 --clip-grad 0.5"
    one = settings(arguments + " --micro-batch-size 4", 2, tmp_path)
    two = settings(arguments, 4, tmp_path)
    assert (one.gas, two.gas) == (1, 1)
    (reference,) = _losses(run_ranks(train, 2, run=one, calls=8))
    first, second = _losses(run_ranks(train, 4, run=two, calls=8))
    assert [(a + b) / 2 for a, b in zip(first, second, strict=True)] == pytest.approx(reference, abs=2e-6)


@pytest.mark.parametrize("how", ["uniform", "block"])
def test_recomputed_activations_change_nothing(how, tmp_path):
    """With dropout: a recomputed forward that drew other masks would have another gradient."""
    arguments = "--pipeline-model-parallel-size 2 --attention-dropout 0.2 --hidden-dropout 0.2"
    more = f" --recompute-granularity full --recompute-method {how} --recompute-num-layers 1"
    plain = run_ranks(train, 2, run=settings(arguments, 2, tmp_path), calls=6)
    recomputed = run_ranks(train, 2, run=settings(arguments + more, 2, tmp_path), calls=6)
    assert _losses(plain) == _losses(recomputed)


def test_tied_embeddings_under_the_flush_are_those_of_one_stage(tmp_path):
    flush = {"optimizer": {"type": "PipeDreamAdamW"}, "async_pipeline": {"schedule": "1f1b_flush"}}
    run = [settings(f"{TIED} --clip-grad 0.5 --pipeline-model-parallel-size {p}", p, tmp_path, flush) for p in (1, 2)]
    (one,) = _losses(run_ranks(train, 1, run=run[0], calls=8))
    results = run_ranks(train, 2, run=run[1], calls=8)
    assert _losses(results) == [pytest.approx(one, abs=2e-6)]
    first, last = ([w for w in result["weights"] if w.shape == (VOCABULARY, 32)] for result in results)
    assert len(first) == len(last) == 1
    assert torch.equal(first[0], last[0]), "the copies drifted apart"


def _weights(rank, run):
    from noflush.launch.gpt.pipeline import layer_specs
    from noflush.launch.training.start import join

    join(run.ranks)
    return [sum(p.numel() for p in spec.build().parameters()) for spec in layer_specs(run.model, 7, run.ranks.tensor)]


@pytest.mark.parametrize(
    ("arguments", "tensor"), [("", 1), (LLAMA, 1), ("--add-qkv-bias --disable-bias-linear --qk-layernorm", 1), ("", 2)]
)
def test_weights_are_counted_without_building_them(arguments, tensor, tmp_path):
    from noflush.launch.gpt.size import parameters_by_stage

    run = settings(f"{arguments} --tensor-model-parallel-size {tensor}", tensor, tmp_path)
    built = run_ranks(_weights, tensor, run=run)[0]
    assert parameters_by_stage(run.model, (2, 2), tensor) == [sum(built[:3]), sum(built[3:])]
    assert parameters_by_stage(run.model, (1, 3, 0), tensor) == [sum(built[:2]), sum(built[2:5]), sum(built[5:])]
    assert parameters_by_stage(run.model, (4,), tensor) == [sum(built)]
