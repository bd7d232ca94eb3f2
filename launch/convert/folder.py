"""A Hugging Face folder on the disk: config.json, safetensors, tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from noflush.launch.arguments.settings import Tokens
from noflush.launch.data.tokenizer import auto_tokenizer

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
_TOKENIZERS = "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json"


def is_hugging_face(folder: str | Path) -> bool:
    """Whether ``folder`` has a model that transformers would load."""
    return (Path(folder) / CONFIG).is_file()


def has_tokenizer(folder: str | Path) -> bool:
    """Whether ``folder`` has a tokenizer beside its model; without one transformers makes one that knows no word."""
    return is_hugging_face(folder) and any((Path(folder) / name).is_file() for name in _TOKENIZERS)


def read_folder(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(config.json, weights), of one file of weights or several. Raises ValueError if a part is missing."""
    path = Path(folder)
    try:
        config: dict[str, Any] = json.loads((path / CONFIG).read_text())
        files = [WEIGHTS]
        if not (path / WEIGHTS).is_file() and (path / INDEX).is_file():
            files = sorted(set(json.loads((path / INDEX).read_text())["weight_map"].values()))
        if elsewhere := [name for name in files if Path(name).name != name]:
            raise ValueError(f"{INDEX} names {elsewhere[0]}, which is not in the folder")
        weights: dict[str, Tensor] = {}
        for name in files:
            weights |= load_file(path / name)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise ValueError(
            f"{folder} is no Hugging Face folder with {CONFIG} and {WEIGHTS}: {error} (a folder with pytorch_model.bin "
            "becomes one by from_pretrained and save_pretrained)"
        ) from None
    return config, weights


def write_folder(
    folder: str | Path,
    config: Mapping[str, Any],
    weights: dict[str, Tensor],
    tokens: Tokens | None = None,
    download: bool = True,
) -> None:
    """Writes what ``AutoModelForCausalLM.from_pretrained`` reads, and with ``tokens`` what ``AutoTokenizer`` does.

    ``download``: as `make_tokenizer`'s.

    Raises ValueError if ``folder`` is not empty or the tokenizer cannot be written.
    """
    path = Path(folder)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{folder} is not an empty folder: give a new one")
    path.mkdir(parents=True, exist_ok=True)
    if tokens is not None:
        _write_tokenizer(path, tokens, download)
    (path / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    save_file(weights, path / WEIGHTS, metadata={"format": "pt"})


def _write_tokenizer(path: Path, tokens: Tokens, download: bool) -> None:
    if tokens.type == "GPT2BPETokenizer":
        from tokenizers.implementations import ByteLevelBPETokenizer

        assert tokens.vocab_file is not None
        assert tokens.merge_file is not None
        end = "<|endoftext|>"
        shutil.copyfile(tokens.vocab_file, path / "vocab.json")
        shutil.copyfile(tokens.merge_file, path / "merges.txt")
        bpe = ByteLevelBPETokenizer(tokens.vocab_file, tokens.merge_file)
        bpe.add_special_tokens([end])
        # transformers 5 reads this file; from the two above it makes an empty vocabulary.
        bpe.save(str(path / "tokenizer.json"))
        of_fast = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": end, "eos_token": end}
        (path / "tokenizer_config.json").write_text(json.dumps(of_fast, indent=2) + "\n")
    elif tokens.type == "HuggingFaceTokenizer":
        auto_tokenizer(tokens, download).save_pretrained(path)
    else:
        raise ValueError(f"a {tokens.type} cannot be written for transformers: leave it out")
