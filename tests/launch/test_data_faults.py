"""Data that cannot be what its index says, or that another tokenizer made: named with its file, rule and fix."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import pickle
import re
import struct

import numpy as np
import pytest
import torch

from noflush.launch.arguments.parser import ArgumentsError
from noflush.launch.arguments.understand import understand
from noflush.launch.data.batches import MicroBatches, SampleError
from noflush.launch.data.datasets import CheckedDataset, build_datasets
from noflush.launch.data.index import part_faults, prefix_faults
from noflush.launch.data.order import SampleOrder
from noflush.launch.data.token_ids import first_outside, vocabulary_faults
from noflush.launch.data.tokenizer import make_tokenizer
from noflush.launch.pretrain_gpt import settings_of
from noflush.launch.refusal import RefusedError
from tests.launch.megatron import SMALL
from tests.launch.test_data import tokens
from tests.launch.unprivileged import without_rights_to

DOCUMENTS = ([1, 2, 3], [4], [5, 6, 7, 8])


def write_pair(
    prefix, documents=DOCUMENTS, kind="<i4", version=1, code=4, lengths=None, pointers=None, marks=None, count=None
):
    """A pair as megatron-core has them, byte by byte; what is given overrides what belongs there."""
    data = b"".join(np.array(ids, kind).tobytes() for ids in documents)
    true = [len(ids) for ids in documents]
    lengths = true if lengths is None else lengths
    width = np.dtype(kind).itemsize
    pointers = [width * sum(true[:i]) for i in range(len(true))] if pointers is None else pointers
    marks = list(range(len(documents) + 1)) if marks is None else marks
    header = struct.pack("<QBQQ", version, code, len(documents) if count is None else count, len(marks))
    arrays = np.array(lengths, "<i4").tobytes() + np.array(pointers, "<i8").tobytes() + np.array(marks, "<i8").tobytes()
    (prefix.parent / f"{prefix.name}.bin").write_bytes(data)
    (prefix.parent / f"{prefix.name}.idx").write_bytes(b"MMIDIDX\x00\x00" + header + arrays)
    return str(prefix)


BAD_PAIRS = {
    "version": ({"version": 2}, r"d\.idx has version 2: only 1 is read; preprocess the data again"),
    "unknown type": ({"code": 9}, r"d\.idx says that its tokens are of type 9: token ids are whole numbers"),
    "floats": ({"code": 7}, r"d\.idx says that its tokens are of type 7: token ids are whole numbers"),
    "wider type": ({"code": 5}, r"d\.bin is truncated \(32 of the 48 bytes its index counts\)"),
    "more documents": ({"count": 4}, r"d\.idx is truncated \(\d+ of \d+ bytes\)"),
    "no end of documents": ({"marks": []}, r"d\.idx ends its last document at sequence None of 3"),
    "other documents": ({"marks": [0, 1, 2]}, r"d\.idx ends its last document at sequence 2 of 3: it must be all"),
    "far more": ({"count": 2**62}, r"d\.idx is truncated"),
    "length below zero": ({"lengths": [3, -1, 4]}, r"d\.idx is damaged: document 1 has -1 tokens from byte 12 on"),
    "long in the middle": ({"lengths": [3, 100, 4]}, r"d\.bin is truncated \(32 of the 412 bytes its index counts\)"),
    "pointer below zero": ({"pointers": [0, -8, 16]}, r"d\.idx is damaged: document 1 has 1 tokens from byte -8 on"),
    "pointer beyond": ({"pointers": [0, 4000, 16]}, r"d\.bin is truncated \(32 of the 4004 bytes its index counts\)"),
    "pointer without end": ({"pointers": [2**63 - 4, 12, 16]}, r"d\.idx is damaged: document 0 has 3 tokens from byte"),
    "no token": ({"documents": ([], [])}, r"d\.idx holds no token in its documents"),
}


@pytest.mark.parametrize("name", BAD_PAIRS)
def test_a_bad_pair_is_named(name, tmp_path):
    given, message = BAD_PAIRS[name]
    (fault,) = prefix_faults(write_pair(tmp_path / "d", **given))
    assert fault.startswith(f"data path {tmp_path}/d: {tmp_path}/d.")
    assert re.search(message, fault), fault
    assert "preprocess" in fault


def test_every_length_of_a_cut_file_is_named(tmp_path):
    prefix = write_pair(tmp_path / "d")
    for ending in ("idx", "bin"):
        path = tmp_path / f"d.{ending}"
        whole = path.read_bytes()
        for size in range(len(whole)):
            path.write_bytes(whole[:size])
            assert len(prefix_faults(prefix)) == 1, (ending, size)
        path.write_bytes(whole)
    assert prefix_faults(prefix) == []


@pytest.mark.parametrize(("kind", "code"), [("u1", 1), ("i1", 2), ("<i2", 3), ("<i4", 4), ("<i8", 5), ("<u2", 8)])
def test_right_pairs_of_every_type(kind, code, tmp_path):
    prefix = write_pair(tmp_path / "d", (*DOCUMENTS, []), kind=kind, code=code)
    assert prefix_faults(prefix) == []
    assert vocabulary_faults(prefix, 9) == []
    (fault,) = vocabulary_faults(prefix, 8)
    assert (
        f"data path {prefix}: document 2 has token id 8 at position 3, outside the tokenizer's vocabulary, 0 to 7"
        in (fault)
    )


def test_a_pair_beyond_one_piece(tmp_path, monkeypatch):
    monkeypatch.setattr("noflush.launch.data.index._PIECE", 2)
    assert prefix_faults(write_pair(tmp_path / "d")) == []
    (fault,) = prefix_faults(write_pair(tmp_path / "d", pointers=[0, 12, 20]))
    assert "truncated (32 of the 36 bytes" in fault
    (fault,) = prefix_faults(write_pair(tmp_path / "d", lengths=[3, 1, -4]))
    assert "document 2 has -4 tokens" in fault


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
@pytest.mark.parametrize("ending", ["idx", "bin"])
def test_a_pair_that_may_not_be_read(ending, tmp_path):
    prefix = write_pair(tmp_path / "d")
    with without_rights_to(tmp_path / f"d.{ending}"):
        faults = prefix_faults(prefix)
    assert faults == [f"data path {prefix}: {prefix}.{ending} cannot be read (Permission denied)"]


def test_a_part_without_a_token(tmp_path):
    prefix = write_pair(tmp_path / "d", ([1, 2], [], [3], []))
    assert part_faults(prefix, [2, 2, 0]) == []
    assert part_faults(prefix, [3, 1, 0]) == [
        f"--split 3,1,0 leaves documents 3 to 3 of {prefix} for validation, which have no token: make its part 0, or "
        "larger"
    ]


@pytest.mark.parametrize("kind", ["i1", "u1", "<i2", "<u2", "<i4", "<i8"])
def test_the_first_id_outside(kind):
    draw = np.random.default_rng(0)
    for _ in range(200):
        low = 0 if np.dtype(kind).kind == "u" else -3
        ids = draw.integers(low, 100, draw.integers(0, 5)).astype(kind)
        wrong = [at for at, token in enumerate(ids.tolist()) if not 0 <= token < 60]
        assert first_outside(ids, 60) == (wrong[0] if wrong else None)


def run_settings(prefix, folder, more=""):
    argv = SMALL.replace("--mock-data", f"--data-path {prefix}").replace("--vocab-size 63", "--vocab-size 9").split()
    argv += f"--data-cache-path {folder}/cache --tokenizer-type NullTokenizer --split 1,0,0 {more}".split()
    return [*argv, "--global-batch-size", "2"]


def test_another_tokenizers_data_is_refused_before_anything_starts(tmp_path):
    prefix = write_pair(tmp_path / "d", ([3] * 40, [4, 70_000]))
    with pytest.raises(ValueError, match=r"document 1 has token id 70000 at position 1, .*, 0 to 9; name the"):
        settings_of(run_settings(prefix, tmp_path), 1)


def dataset_of(documents, tmp_path, more="", **given):
    """The training samples of a run over ``documents`` with ids 0 to 9, built as the run builds them."""
    prefix = write_pair(tmp_path / "d", documents, **given)
    settings, _ = understand(run_settings(prefix, tmp_path, more), 1)
    train, _, _ = build_datasets(settings, make_tokenizer(tokens(type="NullTokenizer", vocab_size=9)), reads=True)
    return prefix, train


WRONG_IDS = {
    "far": (70_000, "<i4", 4),
    "next": (10, "<i4", 4),
    "what megatron-core takes for padding": (-1, "<i4", 4),
    "16 bits": (65_535, "<u2", 8),
    "64 bits": (2**40, "<i8", 5),
    "one byte, below zero": (-128, "i1", 2),
}


@pytest.mark.parametrize("mmap", ["", "--no-mmap-bin-files"])
@pytest.mark.parametrize("name", WRONG_IDS)
def test_an_id_outside_the_vocabulary_is_named_when_it_is_pulled(name, mmap, tmp_path):
    wrong, kind, code = WRONG_IDS[name]
    documents = [[1, 2, 3, 9]] * 50
    documents[31] = [1, 2, wrong, 3]
    prefix, train = dataset_of(documents, tmp_path, mmap, kind=kind, code=code)
    message = f"data path {prefix}: document 31 has token id {wrong} at position 2, outside the tokenizer's vocabulary"
    with pytest.raises(RefusedError, match=re.escape(message)):
        _ = [train[index] for index in range(len(train))]


def test_samples_of_right_data_are_megatrons_own(tmp_path):
    from megatron.core.datasets.gpt_dataset import GPTDataset

    draw = np.random.default_rng(1)
    documents = [draw.integers(0, 10, draw.integers(0, 30)).tolist() for _ in range(60)]
    _, train = dataset_of(documents, tmp_path)
    files = sorted(path.name for path in (tmp_path / "cache").iterdir())
    assert isinstance(train.dataset, CheckedDataset)
    theirs = GPTDataset(
        GPTDataset.build_low_level_dataset(train.dataset_path, train.config), train.dataset_path, train.indices,
        train.num_samples, train.index_split, train.config,
    )  # fmt: skip
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == files, "they share what is cached"
    assert len(theirs) == len(train)
    for ours, other in zip((train[i] for i in range(20)), (theirs[i] for i in range(20)), strict=True):
        assert ours.keys() == other.keys()
        assert all(torch.equal(ours[key], other[key]) for key in ours)


def test_other_data_of_the_same_name_is_not_read_by_the_indices_of_before(tmp_path):
    short, long = [[1, 2, 3]] * 30, [[4] * 8] * 30
    for documents in (short + long, long + short):  # as many documents, and as many tokens
        _, train = dataset_of(documents, tmp_path)
        text = [token for index in range(len(train)) for token in train[index]["tokens"].tolist()]
        assert len(train) >= 50
        # Documents are shuffled, not cut anew: 1, 2, 3 come in this order, unless a sample begins or ends there.
        for index in range(len(train)):
            row = train[index]["tokens"].tolist()
            for at, token in enumerate(row[:-1]):
                assert (token, row[at + 1]) in {(1, 2), (2, 3), (3, 1), (3, 4), (4, 4), (4, 1)}, row
        assert {1, 2, 3, 4} == set(text)


def cached(tmp_path, content):
    prefix, _ = dataset_of([[1, 2, 3]] * 60, tmp_path)
    path = sorted((tmp_path / "cache").glob("*-shuffle_index.npy"))[0]
    path.write_bytes(content(path.read_bytes()))
    with pytest.raises(ArgumentsError) as error:
        settings_of(run_settings(prefix, tmp_path), 1)
    (fault,) = error.value.faults
    assert fault.startswith(f"cached index {path}: ")
    return fault


class Planted:
    """Runs when it is unpickled."""

    def __reduce__(self):
        return (os.mkdir, ("planted",))


def test_code_in_a_cached_index_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "no array of numpy's, and megatron-core would run what" in cached(
        tmp_path, lambda _: pickle.dumps(Planted())
    )
    assert not (tmp_path / "planted").exists()


@pytest.mark.parametrize("size", [0, 5, 40, 130])
def test_a_cached_index_that_is_cut_short(size, tmp_path):
    assert "delete it, it is made again" in cached(tmp_path, lambda content: content[:size])


class Numbers:
    """Samples whose every token is their number; some cannot be read."""

    def __init__(self, broken=()):
        self.broken = dict(broken)

    def __len__(self):
        return 64

    def __getitem__(self, index):
        if index in self.broken:
            raise self.broken[index]
        row = torch.full((4,), index)
        return {"tokens": row, "labels": row, "position_ids": torch.arange(4), "loss_mask": torch.ones(4)}


def stream(dataset, workers):
    return MicroBatches(dataset, SampleOrder(64, 0, 2, 0, 1), workers)


def readers():
    return set(multiprocessing.active_children())


@pytest.mark.parametrize("workers", [0, 2])
class TestMicroBatches:
    """With and without processes that read ahead."""

    def test_order(self, workers):
        before = readers()
        batches = stream(Numbers(), workers)
        for number in range(32):
            (rows, positions), (labels, mask) = next(batches)
            assert rows[:, 0].tolist() == labels[:, 3].tolist() == [2 * number, 2 * number + 1]
            assert positions.tolist() == [[0, 1, 2, 3]] * 2
            assert mask.sum() == 8
        with pytest.raises(StopIteration):
            next(batches)
        batches.close()
        assert readers() == before

    def test_closed_in_the_middle(self, workers):
        before = readers()
        batches = stream(Numbers(), workers)
        next(batches)
        assert len(readers() - before) == workers
        batches.close()
        assert readers() == before
        assert list(itertools.islice(batches, 1)) == []
        batches.close()

    @pytest.mark.parametrize(
        ("error", "kind", "message"),
        [
            (RefusedError("data path d: document 3 ..."), RefusedError, "data path d: document 3 ..."),
            (
                IndexError("9 out"),
                SampleError,
                "sample 7 of the data cannot be read: IndexError: 9 out",
            ),
        ],
    )
    def test_a_sample_that_cannot_be_read_is_one_line_in_its_turn(self, error, kind, message, workers):
        batches = stream(Numbers({7: error}), workers)
        for _ in range(3):
            next(batches)
        with pytest.raises(kind) as found:
            next(batches)
        assert type(found.value) is kind
        assert str(found.value) == message
        batches.close()
