"""Data and sizes of a rehearsal: bytes of the standard library's text, and a model that two cores train in a minute."""

from __future__ import annotations

import json
import subprocess
import sys

from tokenizers.pre_tokenizers import ByteLevel

from noflush.demo.text import documents

ITERATIONS = 40
SLICE = 16
"""Iterations of a slice."""
STAGES = 4
BATCH, SEQUENCE = 4, 64
_DOCUMENTS = 24
"""Of 64 KiB each, the last tenth for validation."""


def size(stages):
    """The launcher's arguments that make the paper's model a tiny one of ``stages`` layers."""
    return (
        *("--num-layers", str(stages), "--hidden-size", "32", "--num-attention-heads", "2"),
        *("--seq-length", str(SEQUENCE), "--max-position-embeddings", str(SEQUENCE)),
        *("--micro-batch-size", str(BATCH), "--global-batch-size", str(BATCH)),
        *("--eval-iters", "4", "--log-interval", "2"),
    )


def prepare(folder):
    """(prefix of the data, vocabulary, merges) in ``folder``; made if they are not there.

    Raises RuntimeError, with what it said last, if the text cannot be made tokens.
    """
    prefix, vocabulary, merges = folder / "corpus", folder / "vocab.json", folder / "merges.txt"
    data = folder / "corpus_text_document"
    if data.with_suffix(".idx").exists():
        return data, vocabulary, merges
    folder.mkdir(parents=True, exist_ok=True)
    letters = {letter: number for number, letter in enumerate(sorted(ByteLevel.alphabet()))}
    vocabulary.write_text(json.dumps(letters | {"<|endoftext|>": len(letters)}))
    merges.write_text("#version: 0.2\n")
    with open(folder / "corpus.jsonl", "w") as lines:
        lines.writelines(json.dumps({"text": document}) + "\n" for document in documents()[:_DOCUMENTS])
    command = [sys.executable, "-m", "noflush.launch.preprocess_data", "--input", str(folder / "corpus.jsonl")]
    command += ["--output-prefix", str(prefix), "--workers", "1", "--tokenizer-type", "GPT2BPETokenizer"]
    command += ["--vocab-file", str(vocabulary), "--merge-file", str(merges)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"the text cannot be made tokens: {(done.stderr.strip() or 'no reason').splitlines()[-1]}")
    return data, vocabulary, merges
