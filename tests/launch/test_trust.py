"""Code in folders: nothing that lies in a checkpoint or a Hugging Face folder decides that it runs."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from safetensors.torch import save_file

from noflush.launch import convert_checkpoint
from noflush.launch import generate as generating
from noflush.launch.arguments.parser import ArgumentsError, expand, read
from noflush.launch.arguments.settings import Tokens
from noflush.launch.convert.folder import INDEX, WEIGHTS, read_folder, write_folder
from noflush.launch.convert.hugging_face import to_hugging_face
from noflush.launch.convert.state_dict import write_checkpoint
from noflush.launch.training.beside_weights import TOKENS, read_tokens, write_tokens
from tests.launch.models import GPT2, weights


@pytest.fixture
def ran(tmp_path, monkeypatch):
    """File that planted code writes."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *_: "y")  # who asks on the terminal gets a yes
    return tmp_path / "planted code ran"


def plant_tokenizer(folder, marker):
    """A Hugging Face tokenizer that works, by a class of its own."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder.mkdir()
    words = Tokenizer(models.WordLevel({str(n): n for n in range(79)} | {"<end>": 79}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.save(str(folder / "tokenizer.json"))
    (folder / "planted.py").write_text(
        f"from transformers import PreTrainedTokenizerFast\nopen({str(marker)!r}, 'w').close()\n"
        "class Planted(PreTrainedTokenizerFast):\n    pass\n"
    )
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "tokenizer_class": "Planted",
                "auto_map": {"AutoTokenizer": ["planted.Planted", "planted.Planted"]},
                "eos_token": "<end>",
            }
        )
    )


def run_that_trusts(folder, tokenizer):
    """A run's folder whose tokenizer.json says that the code in ``tokenizer`` may run."""
    checkpoint = write_checkpoint(folder, weights(GPT2), GPT2)
    tokens = Tokens("HuggingFaceTokenizer", str(tokenizer), None, None, None, 0, True)
    (checkpoint / TOKENS).write_text(json.dumps(dataclasses.asdict(tokens)))
    return str(folder)


def test_a_checkpoint_cannot_have_its_tokenizers_code_run(ran, tmp_path, capsys):
    plant_tokenizer(tmp_path / "tok", ran)
    run = run_that_trusts(tmp_path / "run", tmp_path / "tok")
    prompt = ["--load", run, "--prompt", "3 1", "--max-new-tokens", "2"]

    assert generating.main(prompt) == 2
    assert "--trust-remote-code" in capsys.readouterr().err
    assert convert_checkpoint.main(["--to-hf", run, str(tmp_path / "hf")]) == 0
    assert "no tokenizer: " in capsys.readouterr().out
    assert not (tmp_path / "hf" / "tokenizer_config.json").exists()
    assert not ran.exists()

    # On the command line it is what it says, and what was planted is what would have run.
    assert generating.main([*prompt, "--trust-remote-code"]) == 0
    assert capsys.readouterr().out.startswith("3 1")
    assert ran.exists()
    assert convert_checkpoint.main(["--to-hf", run, str(tmp_path / "hf2"), "--trust-remote-code"]) == 0
    assert (tmp_path / "hf2" / "tokenizer_config.json").exists()


def test_trust_is_not_saved(tmp_path):
    tokens = Tokens("HuggingFaceTokenizer", "tok", None, None, None, 0, True)
    write_tokens(tmp_path, tokens)
    assert "trust" not in (tmp_path / TOKENS).read_text()
    assert read_tokens(tmp_path) == dataclasses.replace(tokens, trust_remote_code=False)


@pytest.mark.parametrize("change", [{"vocab_size": "79"}, {"model": ["tok"]}, {"extra_ids": None}, {"type": 3}])
def test_what_is_no_tokenizer_is_none(change, tmp_path):
    write_tokens(tmp_path, Tokens("NullTokenizer", None, None, None, 79, 0, False))
    fields = json.loads((tmp_path / TOKENS).read_text())
    assert read_tokens(tmp_path) is not None
    (tmp_path / TOKENS).write_text(json.dumps(fields | change))
    assert read_tokens(tmp_path) is None


def test_a_hugging_face_folders_code_is_not_run(ran, tmp_path, capsys):
    """Of a model and of a tokenizer; where transformers would ask on the terminal, nobody is asked."""
    folder = tmp_path / "hf"
    plant_tokenizer(folder, ran)
    code = f"open({str(ran)!r}, 'w').close()\nfrom transformers import GPT2Config as Conf, GPT2LMHeadModel as Net\n"
    (folder / "net.py").write_text(code)
    config, state = to_hugging_face(weights(GPT2), GPT2)
    auto_map = {"AutoConfig": "net.Conf", "AutoModelForCausalLM": "net.Net"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "planted", "auto_map": auto_map}))
    save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="--trust-remote-code"):
        generating.load_model(str(folder))
    assert generating.main(["--load", str(folder), "--prompt", "3"]) == 2
    assert "--trust-remote-code" in capsys.readouterr().err
    assert convert_checkpoint.main(["--from-hf", str(folder), str(tmp_path / "im")]) == 2
    assert not ran.exists()


def test_a_config_names_no_attention_kernel(tmp_path):
    """transformers fetches one of a hub's from a name with a slash, and runs it."""
    config, state = to_hugging_face(weights(GPT2), GPT2)
    write_folder(tmp_path / "hf", config | {"attn_implementation": "somebody/kernel"}, state)
    assert generating.load_model(str(tmp_path / "hf")).config._attn_implementation == "eager"


def test_a_pickle_of_weights_is_not_read(tmp_path, capsys):
    config, state = to_hugging_face(weights(GPT2), GPT2)
    write_folder(tmp_path / "hf", config, state)
    (tmp_path / "hf" / WEIGHTS).unlink()
    torch.save(state, tmp_path / "hf" / "pytorch_model.bin")
    with pytest.raises(ValueError, match="safetensors"):
        generating.load_model(str(tmp_path / "hf"))
    assert convert_checkpoint.main(["--from-hf", str(tmp_path / "hf"), str(tmp_path / "im")]) == 2
    assert "safetensors" in capsys.readouterr().err


def test_an_index_names_files_of_its_folder_alone(tmp_path):
    config, state = to_hugging_face(weights(GPT2), GPT2)
    write_folder(tmp_path / "hf", config, state)
    (tmp_path / "hf" / WEIGHTS).rename(tmp_path / "others.safetensors")
    (tmp_path / "hf" / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(state, "../others.safetensors")}))
    with pytest.raises(ValueError, match=r"names \.\./others.safetensors, which is not in the folder"):
        read_folder(tmp_path / "hf")


def test_a_name_in_a_checkpoint_is_not_downloaded(tmp_path, monkeypatch):
    asked = []

    def from_pretrained(name, **options):
        asked.append((name, options["local_files_only"], options["trust_remote_code"]))
        raise OSError("not here")

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", from_pretrained)
    run = run_that_trusts(tmp_path / "run", "somebody/tokenizer")
    assert generating.main(["--load", run, "--prompt", "3"]) == 2
    convert_checkpoint.main(["--to-hf", run, str(tmp_path / "hf")])
    named = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", "my/own"]
    assert generating.main(["--load", run, "--prompt", "3", *named]) == 2
    assert asked == [("somebody/tokenizer", True, False)] * 2 + [("my/own", False, False)]


def test_a_file_of_arguments_cannot_allow_code(tmp_path):
    """An imported checkpoint comes with one, to train by."""
    (tmp_path / "model.args").write_text("--num-layers 2 --trust-remote-code\n")
    with pytest.raises(ArgumentsError, match=r"--trust-remote-code in @.*model.args: no file can allow code"):
        expand([f"@{tmp_path / 'model.args'}"])
    assert read(["--trust-remote-code"]).values["trust_remote_code"] is True
