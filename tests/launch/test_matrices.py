"""megatron-core's weights as the matrices that attention and MLP use; Muon and SOAP by Megatron's arguments."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from noflush.launch.arguments.parser import ArgumentsError
from noflush.methods import DelayAwareMuon, DelayAwareSOAP
from noflush.methods.matrices import is_matrix, piece_of
from tests.launch import models
from tests.launch.megatron import LLAMA, settings, simulate, train
from tests.multiproc.ranks import run_ranks

pytestmark = pytest.mark.multiproc

MODELS = {
    "plain": models.GPT2,
    "grouped queries, SwiGLU": models.LLAMA,
    "one group": dataclasses.replace(models.LLAMA, query_groups=1),
    "gated GELU": dataclasses.replace(models.GPT2, gated=True),
}
BLOCK = {"async_pipeline": {"enabled": True}}


def parts_of(p):
    """The matrices that a parameter is, [rows, n] each."""
    return [matrix.of(p.detach().view(-1)).reshape(matrix.shape) for matrix in piece_of(p).matrices()]


def layers_of(model, tensor=1):
    from noflush.launch.gpt.matrices import mark_matrices
    from noflush.launch.gpt.pipeline import layer_specs

    layers = [spec.build() for spec in layer_specs(model, 7, tensor)]
    for layer in layers:
        mark_matrices(layer, model, tensor)
    return layers


def by_parts(rank):
    """By model: how far queries, keys, values and the MLP's output of the parts are from the layer's."""
    from megatron.core import parallel_state

    from noflush.patches.megatron_core import dropout as megatron_core

    parallel_state.initialize_model_parallel(1, 1)
    megatron_core.patch()
    found = {}
    for name, model in MODELS.items():
        embedding, block, *_, head = layers_of(model)
        for parameter in block.parameters():
            torch.nn.init.normal_(parameter, 0.0, 0.3)
        x = torch.randn(5, 2, model.hidden)
        attention, mlp = block.layer.self_attention, block.layer.mlp
        bias = attention.linear_qkv.bias
        if bias is not None:
            bias.data.zero_()
        theirs = attention.get_query_key_value_tensors(x)
        ours = [x @ part.T for part in parts_of(attention.linear_qkv.weight)]
        apart = [(a.flatten(2) - b).abs().max().item() for a, b in zip(theirs, ours, strict=True)]
        output, _ = mlp(x)
        first = [x @ part.T for part in parts_of(mlp.linear_fc1.weight)]
        if mlp.linear_fc1.bias is not None:
            biases = mlp.linear_fc1.bias.chunk(len(first))
            first = [part + b for part, b in zip(first, biases, strict=True)]
        activation = F.silu if model.activation == "silu" else lambda x: F.gelu(x, approximate="tanh")
        middle = activation(first[0]) * (first[1] if model.gated else 1)
        apart.append((middle @ mlp.linear_fc2.weight.T - output).abs().max().item())
        none = [n for layer in (embedding, head) for n, p in layer.named_parameters() if p.dim() == 2 and is_matrix(p)]
        matrices = sorted(n for n, p in block.named_parameters() if is_matrix(p))
        found[name] = apart, none, matrices, [len(parts_of(mlp.linear_fc1.weight)), len(ours)]
    return found


def test_parts_are_what_attention_and_mlp_multiply_by():
    """Sums in another order: 1e-5 of values of size 1; another layout would be of their size."""
    for name, (apart, none, matrices, counts) in run_ranks(by_parts, 1)[0].items():
        assert max(apart) < 2e-5, name
        assert none == []
        assert [n.removeprefix("layer.") for n in matrices] == [
            "mlp.linear_fc1.weight", "mlp.linear_fc2.weight",
            "self_attention.linear_proj.weight", "self_attention.linear_qkv.weight",
        ]  # fmt: skip
        assert counts == [1 + MODELS[name].gated, 3]


def updated(rank, method):
    """A layer's fused weights after three updates, and its parts updated as parameters of their own."""
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(1, 1)
    found = []
    for model in MODELS.values():
        _, block, *_ = layers_of(model)
        for fused in (block.layer.self_attention.linear_qkv.weight, block.layer.mlp.linear_fc1.weight):
            alone = [torch.nn.Parameter(part.clone()) for part in parts_of(fused)]
            one, several = method([fused], lr=0.1), method(alone, lr=0.1)
            for _ in range(3):
                fused.grad = torch.randn_like(fused)
                for p, matrix in zip(alone, piece_of(fused).matrices(), strict=True):
                    p.grad = matrix.of(fused.grad.view(-1)).reshape(matrix.shape).clone()
                one.step()
                several.step()
            pairs = zip(parts_of(fused), alone, strict=True)
            found.append(max((a - b.detach()).abs().max().item() for a, b in pairs))
    return found


@pytest.mark.parametrize("method", [DelayAwareMuon, DelayAwareSOAP])
def test_an_update_with_cuts_is_the_update_of_each_matrix(method):
    assert max(run_ranks(updated, 1, method=method)[0]) < 1e-5


def marks_of_slices(rank):
    """Shapes of the matrices of a rank's half of a layer."""
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(2, 1)
    _, block, *_ = layers_of(models.LLAMA, tensor=2)
    attention, mlp = block.layer.self_attention, block.layer.mlp
    return [[tuple(part.shape) for part in parts_of(p)] for p in (attention.linear_qkv.weight, mlp.linear_fc1.weight)]


def test_a_slice_has_whole_groups():
    # 4 heads of 16 in 2 groups, hidden 32, ffn 80, over two ranks
    assert run_ranks(marks_of_slices, 2) == [[[(32, 32), (16, 32), (16, 32)], [(40, 32), (40, 32)]]] * 2


# ---- runs -------------------------------------------------------------------------------------------------

AHEAD = {"type": "DelayAwareMuon", "params": {"look_ahead": 0.5, "momentum": 0.95}}
RUNS = {
    "muon": ("--optimizer muon --muon-use-nesterov --muon-extra-scale-factor 0.2", None),
    "muon, llama": (LLAMA + " --optimizer muon --muon-scale-mode unit_rms_norm --global-batch-size 4", None),
    "muon, whole qkv": (LLAMA + " --optimizer muon --muon-no-split-qkv --muon-extra-scale-factor 0.2", None),
    "muon with a look-ahead": (LLAMA, AHEAD),
    "soap": (LLAMA + " --optimizer soap", None),
    "DeepSpeed's section": ("", {"type": "DelayAwareMuon", "params": {"scale_mode": "shape_scaling"}}),
}


@pytest.mark.parametrize("name", RUNS)
def test_equals_the_simulator(name, tmp_path):
    arguments, section = RUNS[name]
    config = BLOCK | ({} if section is None else {"optimizer": section})
    run = settings(f"--pipeline-model-parallel-size 2 {arguments}", 2, tmp_path, config)
    results = run_ranks(train, 2, run=run, calls=10)
    ((losses, weights),) = run_ranks(simulate, 1, run=run, calls=10)
    assert results[-1]["losses"] == losses
    assert len(set(losses)) == len(losses) == 10 * run.gas
    for result, expected in zip(results, weights, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(result["weights"], expected, strict=True))


@pytest.mark.parametrize("mode", ["duplicated", "distributed", "blockwise"])
def test_tensor_parallel_ranks_put_matrices_together_or_take_their_slices(mode, tmp_path):
    """Gathered it is one slice's method, to sums in another order; by slice it is another."""
    arguments = f"{LLAMA} --pipeline-model-parallel-size 2 --optimizer muon --muon-tp-mode {mode}"
    arguments += " --muon-extra-scale-factor 0.2"
    whole = settings(arguments, 2, tmp_path, BLOCK)
    split = settings(f"{arguments} --tensor-model-parallel-size 2", 4, tmp_path, BLOCK)
    gathered = mode != "blockwise"
    assert split.deepspeed["optimizer"]["params"]["tensor_parallel"] == ("gathered" if gathered else "blockwise")
    assert any("its own slice of a weight for the matrix, with the" in note for note in split.notes) is not gathered
    first, second = (r["losses"] for r in run_ranks(train, 4, run=split, calls=6) if r["losses"])
    assert first == second
    apart = max(abs(a - b) for a, b in zip(first, run_ranks(train, 2, run=whole, calls=6)[-1]["losses"], strict=True))
    assert (apart < 2e-6) is gathered, apart


def section_of(words, tmp_path, **config):
    return settings(f"--pipeline-model-parallel-size 2 {words}", 2, tmp_path, BLOCK | config)


def test_megatrons_options_are_the_methods_parameters(tmp_path):
    words = "--muon-momentum 0.8 --muon-use-nesterov --muon-scale-mode shape_scaling --muon-num-ns-steps 4"
    found = section_of(f"--optimizer muon {words} --muon-extra-scale-factor 0.3 --adam-beta2 0.95", tmp_path)
    assert found.deepspeed["optimizer"] == {
        "type": "DelayAwareMuon",
        "params": {
            "lr": 3e-3, "weight_decay": 0.1, "betas": [0.9, 0.95], "eps": 1e-8, "momentum": 0.8, "nesterov": True,
            "scale_mode": "shape_scaling", "extra_scale_factor": 0.3, "ns_steps": 4,
            "tensor_parallel": "blockwise",
        },
    }  # fmt: skip
    assert any(
        note.startswith("--optimizer muon is DelayAwareMuon: momentum 0.8") and '"look_ahead": 0.9' in note
        for note in found.notes
    )
    assert section_of("--optimizer muon", tmp_path).deepspeed["optimizer"]["params"]["nesterov"] is False
    soap = section_of("--optimizer soap --adam-beta1 0.95", tmp_path)
    assert soap.deepspeed["optimizer"]["type"] == "DelayAwareSOAP"
    assert soap.deepspeed["optimizer"]["params"]["betas"] == [0.95, 0.999]
    sharded = section_of("--optimizer dist_muon", tmp_path)
    assert sharded.deepspeed["zero_optimization"] == {"stage": 1}
    assert "zero_optimization" not in section_of("--optimizer muon", tmp_path).deepspeed


def test_what_takes_no_effect_is_said(tmp_path):
    named = section_of("--muon-momentum 0.8", tmp_path, optimizer=AHEAD)
    assert any(note.startswith("--muon-momentum: the optimizer is the one in the DeepSpeed") for note in named.notes)
    adam = section_of("--muon-momentum 0.8", tmp_path)
    assert any(note.startswith("--muon-momentum: without effect, for there is no --optim") for note in adam.notes)
    flush = section_of("--optimizer muon", tmp_path, async_pipeline={"schedule": "1f1b_flush"})
    assert not any("look_ahead" in note for note in flush.notes)


@pytest.mark.parametrize(
    ("words", "config", "said"),
    [
        (
            "--optimizer muon",
            {"async_pipeline": {"enabled": False}},
            "noflush's DelayAwareMuon, and async_pipeline is not",
        ),
        (
            "--optimizer soap",
            {"async_pipeline": {"enabled": False}},
            "noflush's DelayAwareSOAP, and async_pipeline is not",
        ),
        (
            "",
            {"optimizer": {"type": "Muon", "params": {"adam_lr": 1e-3}}},
            "adam_lr is 0.001 .* --lr and its schedule are",
        ),
    ],
)
def test_what_cannot_be_had_is_refused(words, config, said, tmp_path):
    with pytest.raises(ArgumentsError, match=said) as refused:
        section_of(words, tmp_path, **config)
    assert len(refused.value.faults) == 1
