"""launch/preprocess_data.py and what it may meet: one line that names file and line, in bounded time, nothing left."""

from __future__ import annotations

import contextlib
import gzip
import itertools
import json
import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from noflush.launch.data.documents import Document
from noflush.launch.data.encoding import encode_all
from noflush.launch.data.tokenizer import Tokenizer, make_tokenizer
from noflush.launch.preprocess_data import main
from tests.launch import runs
from tests.launch.test_data import tokens
from tests.launch.unprivileged import without_rights_to

NULL = tokens(type="NullTokenizer", vocab_size=100)
GOOD = b'{"text": "1 2"}\n'


@pytest.fixture
def out(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def preprocess(out, *files, more=()):
    """The exit status over ``files`` with numbers below 100 for a vocabulary, in this process."""
    command = ["--input", *map(str, files), "--output-prefix", str(out / "c"), "--workers", "1"]
    return main([*command, "--tokenizer-type", "NullTokenizer", "--vocab-size", "100", *more])


def written(out, key="text"):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(out / f"c_{key}_document"))
    return [dataset[i].tolist() for i in range(len(dataset))]


def refused(status, out, capsys):
    """The one line that is said; asserts that it ended by itself and left nothing."""
    said = capsys.readouterr().err
    assert status == 2
    assert said.startswith("preprocess_data: ")
    assert said.count("\n") == 1, said
    assert not list(out.iterdir())
    return said


BAD_LINES = {
    "null": (b'{"text": null}', "text is null, not a string"),
    "number": (b'{"text": 12}', "text is a number, not a string"),
    "list": (b'{"text": ["1"]}', "text is a list, not a string"),
    "object": (b'{"text": {"a": "1"}}', "text is an object, not a string"),
    "true": (b'{"text": true}', "text is true or false, not a string"),
    "half a pair": (rb'{"text": "1 \udc80"}', r"text holds half a surrogate pair, \udc80, at character 2"),
    "latin-1": (b'{"text": "caf\xe9"}', "byte 0xe9 at offset 13 of the line is no UTF-8"),
    "UTF-8 cut short": (b'{"text": "\xe2\x82', "byte 0xe2 at offset 10 of the line is no UTF-8"),
    "a surrogate in UTF-8": (b'{"text": "\xed\xa0\x80"}', "byte 0xed at offset 10 of the line is no UTF-8"),
    "no key": (b'{"txt": "3"}', "no JSON object with text (its keys: 'txt')"),
    "no object": (b'["text"]', "a list, no JSON object with text"),
    "a string": (b'"text"', "a string, no JSON object with text"),
    "nothing": (b"null", "null, no JSON object with text"),
    "cut off": (b'{"text": "1 2', "no JSON object (Unterminated string"),
    "two objects": (b'{"text": "1"}{"text": "2"}', "no JSON object (Extra data"),
    "no JSON": (b"1 2 3 words", "no JSON object (Extra data"),
    "control characters": (b'{"text": "1\t\x002"}', "no JSON object (Invalid control character"),
    "a mark within": (b'\xef\xbb\xbf{"text": "1"}', "no JSON object (Unexpected UTF-8 BOM"),
    "deep": (b'{"text": ' + b"[" * 100_000, "no JSON object that can be read: it is nested too deeply"),
    "a long number": (b'{"text": ' + b"1" * 5000 + b"}", "no JSON object (Exceeds the limit"),
    "a word": (b'{"text": "1 abc"}', "the tokenizer does not take it: 'abc' is no token id"),
    "underscores": (b'{"text": "1_0"}', "the tokenizer does not take it: '1_0' is no token id"),
    "other digits": ('{"text": "\u0661"}'.encode(), "the tokenizer does not take it: '\u0661' is no token id"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_named(name, tmp_path, out, capsys):
    line, message = BAD_LINES[name]
    path = tmp_path / "in.jsonl"
    path.write_bytes(GOOD + b"\n" + line + b"\n" + GOOD)
    assert f"{path}, line 3: {message}" in refused(preprocess(out, path), out, capsys)


WRONG_IDS = {
    "no 16 bits": ("1 2 70000", 70000),
    "below zero": ("5 -1 99", -1),
    "padding": ("101", 101),
    "16 bits": ("300 4", 300),
    "no 32 bits": ("4294967301", 4294967301),
    "no 64 bits": ("1 1000000000000000000", 10**18),
    "the most negative": ("-9223372036854775809", -9223372036854775809),
}


@pytest.mark.parametrize("name", WRONG_IDS)
def test_an_id_outside_the_vocabulary_is_named(name, tmp_path, out, capsys):
    text, wrong = WRONG_IDS[name]
    path = tmp_path / "in.jsonl"
    path.write_bytes(GOOD + json.dumps({"text": text}).encode() + b"\n")
    said = refused(preprocess(out, path), out, capsys)
    assert f"{path}, line 2: token id {wrong} is outside the tokenizer's vocabulary, 0 to 100" in said


def test_the_last_id_of_the_vocabulary_is_its_own(tmp_path, out):
    (tmp_path / "in.jsonl").write_text('{"text": "0 99 100"}\n')
    assert preprocess(out, tmp_path / "in.jsonl", more=["--append-eod"]) == 0
    assert written(out) == [[0, 99, 100, 100]]


def test_a_tokenizer_whose_ids_go_beyond_its_size(tmp_path, out, monkeypatch, capsys):
    # As one of transformers' may, whose added tokens leave a gap.
    made = Tokenizer(NULL, 100, 99, lambda text: [5, 100], str)
    monkeypatch.setattr("noflush.launch.preprocess_data.make_tokenizer", lambda settings: made)
    (tmp_path / "in.txt").write_text("any")
    said = refused(preprocess(out, tmp_path / "in.txt"), out, capsys)
    assert f"{tmp_path}/in.txt: token id 100 is outside the tokenizer's vocabulary, 0 to 99" in said


def test_an_end_of_document_token_that_is_none(tmp_path):
    import sentencepiece

    (tmp_path / "text").write_text("the quick brown fox jumps over the lazy dog\n" * 50)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "sp"), vocab_size=30, eos_id=-1, minloglevel=2
    )
    with pytest.raises(ValueError, match="end-of-document token is -1, outside its vocabulary, 0 to 29"):
        make_tokenizer(tokens(type="Llama2Tokenizer", model=str(tmp_path / "sp.model")))


@pytest.mark.parametrize("ending", ["jsonl", "txt"])
def test_a_byte_order_mark_is_no_text(ending, tmp_path, out):
    content = GOOD if ending == "jsonl" else b"1 2"
    (tmp_path / f"in.{ending}").write_bytes(b"\xef\xbb\xbf" + content)
    assert preprocess(out, tmp_path / f"in.{ending}") == 0
    assert written(out) == [[1, 2]]


def test_a_text_file_is_strict_and_says_where(tmp_path, out, capsys):
    (tmp_path / "in.txt").write_bytes(b"\xef\xbb\xbf1 2\n3 \xe9\n")
    said = refused(preprocess(out, tmp_path / "in.txt"), out, capsys)
    assert f"{tmp_path}/in.txt, line 2: byte 0xe9 at offset 9 of the file is no UTF-8" in said


def test_text_does_not_depend_on_the_locale(tmp_path):
    (tmp_path / "in.txt").write_bytes("naïve\r\n\u2028".encode())
    (tmp_path / "in.jsonl").write_bytes('{"text": "naïve\u2028"}\r\n'.encode())
    code = (
        "import sys; from noflush.launch.data.documents import documents\n"
        "print([ascii(d.texts[0]) for d in documents(sys.argv[1:], ['text'])])"
    )
    command = [sys.executable, "-X", "utf8=0", "-c", code, str(tmp_path / "in.txt"), str(tmp_path / "in.jsonl")]
    environ = os.environ | {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == str([ascii("naïve\n\u2028"), ascii("naïve\u2028")])


def _fifo(path):
    os.mkfifo(path)


BAD_FILES = {
    "missing": (lambda path: None, "no such file"),
    "a directory": (Path.mkdir, "is a directory; give the files in it"),
    "empty": (Path.touch, r"is empty (0 bytes); leave it out"),
    "packed": (lambda path: path.write_bytes(gzip.compress(GOOD)), "is gzip, not text; unpack it first"),
    "a pipe": (_fifo, "is no regular file; write its content to one"),
    "a link to nothing": (lambda path: path.symlink_to("none"), "no such file"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_named(name, tmp_path, out, capsys):
    make, message = BAD_FILES[name]
    (tmp_path / "good.jsonl").write_bytes(GOOD)
    make(tmp_path / "in")
    assert f"--input {tmp_path}/in: {message}" in refused(
        preprocess(out, tmp_path / "good.jsonl", tmp_path / "in"), out, capsys
    )


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_a_file_that_may_not_be_read(tmp_path, out, capsys):
    path = tmp_path / "in.jsonl"
    path.write_bytes(GOOD)
    with without_rights_to(path):
        status = preprocess(out, path)
    assert f"--input {path}: cannot be read (Permission denied)" in refused(status, out, capsys)


def test_every_bad_file_is_named_at_once(tmp_path, out, capsys):
    said = refused(preprocess(out, tmp_path / "a", tmp_path / "b"), out, capsys)
    assert "a: no such file; --input" in said
    assert "b: no such file" in said


def test_blank_lines_alone_are_no_corpus(tmp_path, out, capsys):
    (tmp_path / "in.jsonl").write_bytes(b"\n \n")
    assert "no token in" in refused(preprocess(out, tmp_path / "in.jsonl"), out, capsys)


KEYS = {
    "twice": (["text", "text"], "text is given twice; give every key once"),
    "a path": (["a/b"], "'a/b' cannot be part of a file's name"),
    "two for a text": (["text", "title"], "a .txt file is one text without keys; give one"),
}


@pytest.mark.parametrize("name", KEYS)
def test_bad_keys(name, tmp_path, out, capsys):
    keys, message = KEYS[name]
    (tmp_path / "in.txt").write_text("1")
    assert message in refused(preprocess(out, tmp_path / "in.txt", more=["--json-keys", *keys]), out, capsys)


def test_every_key_has_a_pair(tmp_path, out):
    (tmp_path / "in.jsonl").write_text('{"text": "1 2", "title": "3"}\n{"title": "4", "text": ""}\n')
    assert preprocess(out, tmp_path / "in.jsonl", more=["--json-keys", "title", "text", "--append-eod"]) == 0
    assert written(out, "title") == [[3, 100], [4, 100]]
    assert written(out, "text") == [[1, 2, 100]]


@pytest.mark.parametrize("workers", ["0", "-3", "1000000"])
def test_workers_have_a_range(workers, tmp_path, out, capsys):
    (tmp_path / "in.jsonl").write_bytes(GOOD)
    status = preprocess(out, tmp_path / "in.jsonl", more=["--workers", workers])
    assert f"--workers {workers}: it must be 1 to 1024" in refused(status, out, capsys)


def test_places_that_cannot_be_written_are_said_before_the_work(tmp_path, out, capsys):
    (tmp_path / "in.jsonl").write_bytes(GOOD)
    (tmp_path / "file").touch()
    status = preprocess(tmp_path / "file" / "deeper", tmp_path / "in.jsonl")
    assert "deeper cannot be made (Not a directory)" in refused(status, out, capsys)
    (out / "c_text_document.idx").mkdir()
    assert preprocess(out, tmp_path / "in.jsonl") == 2
    assert "c_text_document.idx is a directory; remove it" in capsys.readouterr().err


@contextlib.contextmanager
def largest_file(size):
    """What a full disk is to a process: writing beyond ``size`` bytes of a file fails."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize(("documents", "tokens_each", "ending"), [(400, 90, "bin"), (4000, 1, "idx"), (2, 2000, "bin")])
def test_a_full_disk_is_one_line_and_the_pair_from_before_stays(documents, tokens_each, ending, tmp_path, out, capsys):
    path = tmp_path / "in.jsonl"
    path.write_bytes(GOOD)
    assert preprocess(out, path) == 0
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    path.write_text(json.dumps({"text": " ".join(["7"] * tokens_each)}) + "\n")
    path.write_bytes(path.read_bytes() * documents)
    capsys.readouterr()
    with largest_file(40_000 if documents > 2 else 5000):
        status = preprocess(out, path)
    said = capsys.readouterr().err
    assert status == 2
    assert f"preprocess_data: {out}/c_text_document.{ending} cannot be written (File too large)" in said
    assert said.count("\n") == 1, said
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before


def test_a_bad_document_far_into_the_file(tmp_path, out, capsys):
    path = tmp_path / "in.jsonl"
    path.write_bytes(GOOD * 30_000 + b'{"text": "1 abc"}\n' + GOOD * 30_000)
    assert f"{path}, line 30001: " in refused(preprocess(out, path), out, capsys)


def endless():
    """Documents without end."""
    for number in itertools.count(1):
        yield Document("in.jsonl", number, 20, (f"{number % 90} 3 4",))


def children():
    return set(multiprocessing.active_children())


@pytest.mark.multiproc
class TestSeveralProcesses:
    """What goes wrong with a document that others wait behind; the processes are counted afterwards."""

    def test_order_and_memory_are_kept(self):
        before, read = children(), 0

        def counted():
            nonlocal read
            for document in itertools.islice(endless(), 3000):
                read += 1
                yield document

        with contextlib.closing(encode_all(counted(), NULL, make_tokenizer(NULL), 2)) as encoded:
            for number, document in enumerate(encoded, 1):
                assert document.ids[0].tolist() == [number % 90, 3, 4]
                assert read - number < 2 * 4 * 64, "read ahead without bound"
        assert number == 3000
        assert children() == before

    def test_a_bad_document_far_into_the_file(self, tmp_path, out, capsys):
        path = tmp_path / "in.jsonl"
        path.write_bytes(GOOD * 30_000 + b'{"text": "1 -7"}\n' + GOOD * 30_000)
        before, start = children(), time.monotonic()
        assert f"{path}, line 30001: token id -7 " in refused(
            preprocess(out, path, more=["--workers", "2"]), out, capsys
        )
        assert time.monotonic() - start < 60
        assert children() == before

    def test_a_bad_line_while_others_are_at_work(self, tmp_path, out, capsys):
        path = tmp_path / "in.jsonl"
        path.write_bytes(GOOD * 3000 + b"{\n" + GOOD * 3000)
        before = children()
        assert f"{path}, line 3001: no JSON" in refused(preprocess(out, path, more=["--workers", "2"]), out, capsys)
        assert children() == before

    @pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
    def test_a_worker_that_is_killed(self, number):
        before = children()
        with contextlib.closing(encode_all(endless(), NULL, make_tokenizer(NULL), 2)) as encoded:
            next(encoded)
            worker = (children() - before).pop()
            os.kill(worker.pid, number)
            start = time.monotonic()
            with pytest.raises(ValueError, match=r"a worker process was killed.*give fewer --workers"):
                for _ in encoded:
                    pass
        assert time.monotonic() - start < 20
        assert children() == before


def still_there(group):
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture(scope="module")
def long_corpus(tmp_path_factory):
    """A command that takes half a minute."""
    folder = tmp_path_factory.mktemp("long")
    vocabulary, merges = runs.gpt2_vocabulary(folder)
    (folder / "in.jsonl").write_text((json.dumps({"text": f"{runs.TEXT} " * 40}) + "\n") * 8000)
    return [
        "--input", str(folder / "in.jsonl"), "--tokenizer-type", "GPT2BPETokenizer", "--vocab-file", str(vocabulary),
        "--merge-file", str(merges),
    ]  # fmt: skip


@pytest.mark.multiproc
@pytest.mark.parametrize(
    "number",
    [*(pytest.param(sign, marks=pytest.mark.slow) for sign in (signal.SIGINT, signal.SIGKILL)), signal.SIGTERM],
)
def test_told_to_end(number, long_corpus, out):
    command = [sys.executable, "-m", "noflush.launch.preprocess_data", *long_corpus]
    with subprocess.Popen(
        [*command, "--output-prefix", str(out / "c"), "--workers", "2"],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # As a terminal's shell leaves it: what runs the tests in the background has it ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        try:
            deadline = time.monotonic() + 120
            while not any(path.stat().st_size for path in out.glob("*/*.bin")):
                assert time.monotonic() < deadline
                assert process.poll() is None
                time.sleep(0.05)
            start = time.monotonic()
            if number == signal.SIGINT:
                os.killpg(process.pid, number)  # as a terminal does
            else:
                process.send_signal(number)
            _, said = process.communicate(timeout=60)
            assert time.monotonic() - start < 20
            while still_there(process.pid):  # the workers, if there are any
                assert time.monotonic() - start < 20
                time.sleep(0.05)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert not list(out.glob("*.bin"))
    assert not list(out.glob("*.idx"))
    if number == signal.SIGKILL:
        assert process.returncode == -number
        return
    assert process.returncode == 128 + number
    lines = [line for line in said.splitlines() if "preprocess_data" in line or "Traceback" in line]
    assert lines == [f"preprocess_data: ended by {number.name}; nothing was written"], said
    assert not list(out.iterdir())
