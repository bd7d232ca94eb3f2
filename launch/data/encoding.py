"""Documents to token ids, by this process or by several, in order; what is ahead of the reader is bounded.

However it ends (to the end, by a bad document, a signal, a worker that was killed), it ends at once and no process is
left: chunks are submitted by the one who reads the results, so nobody waits for room that nobody makes.
"""

from __future__ import annotations

import concurrent.futures
import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from noflush.launch.arguments.settings import Tokens
from noflush.launch.data.documents import Document
from noflush.launch.data.tokenizer import Tokenizer, make_tokenizer

Ids = NDArray[np.int32]

_CHUNK_DOCUMENTS, _CHUNK_BYTES = 64, 1 << 20
_CHUNKS_AHEAD = 4
"""Chunks a worker, read and not yet written: the next one is always there, and memory does not grow with the corpus."""
_LOOK_EVERY = 1.0
"""Seconds between looks at whether the workers are alive."""


@dataclass(frozen=True)
class Encoded:
    """The token ids of a document, by key: [tokens] int32 each; and the bytes it took in its file."""

    size: int
    ids: tuple[Ids, ...]


def encode(document: Document, tokenizer: Tokenizer) -> Encoded:
    """Its token ids, all of them below the tokenizer's vocabulary size.

    Raises ValueError naming file and line of a text that the tokenizer refuses or makes other ids of.
    """
    return Encoded(document.size, tuple(_ids(text, document, tokenizer) for text in document.texts))


def _ids(text: str, document: Document, tokenizer: Tokenizer) -> Ids:
    try:
        found = tokenizer.tokenize(text)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # tokenizers' own panics are no Exceptions
        raise ValueError(f"{document.place}: the tokenizer does not take it: {error}") from None
    try:
        ids = np.array(found, dtype=np.int64)
    except OverflowError:
        ids = None
    if ids is None or (ids.size and (ids.min() < 0 or ids.max() >= tokenizer.vocab_size)):
        wrong = next(token for token in found if not 0 <= token < tokenizer.vocab_size)
        raise ValueError(
            f"{document.place}: token id {wrong} is outside the tokenizer's vocabulary, 0 to "
            f"{tokenizer.vocab_size - 1}; correct the text or the vocabulary"
        )
    return ids.astype(np.int32)


def encode_all(found: Iterable[Document], tokens: Tokens, tokenizer: Tokenizer, workers: int) -> Generator[Encoded]:
    """`encode` of every document, in order; by ``workers`` processes if they are more than one.

    Close the iterator (`contextlib.closing`) to end the processes at once. Raises ValueError as `encode` and as
    ``found`` do, and for a worker that ended by itself.
    """
    if workers == 1:
        return (encode(document, tokenizer) for document in found)
    return _by_processes(found, tokens, workers)


def chunks(found: Iterable[Document]) -> Iterator[list[Document]]:
    """``found`` in lists that are worth sending: some documents, or some bytes."""
    chunk: list[Document] = []
    size = 0
    for document in found:
        chunk.append(document)
        size += document.size
        if len(chunk) == _CHUNK_DOCUMENTS or size >= _CHUNK_BYTES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def _by_processes(found: Iterable[Document], tokens: Tokens, workers: int) -> Generator[Encoded]:
    waiting = chunks(found)
    running: deque[Future[list[Encoded]]] = deque()
    pool = _Pool(workers, tokens)
    try:
        while True:
            for chunk in itertools.islice(waiting, workers * _CHUNKS_AHEAD - len(running)):
                running.append(pool.submit(chunk))
            if not running:
                break
            yield from pool.result(running.popleft())
        pool.shut_down()
    except BrokenProcessPool:
        raise ValueError(
            "a worker process was killed, by the system for want of memory if by nobody else (dmesg says so); give "
            "fewer --workers"
        ) from None
    finally:
        pool.kill()


class _Pool:
    """Worker processes that end when they are told to, and with this one."""

    def __init__(self, workers: int, tokens: Tokens) -> None:
        context = multiprocessing.get_context("spawn")  # tokenizers keep threads, which a fork would lose
        self._executor = ProcessPoolExecutor(workers, context, _start, (tokens,))
        self._others = set(multiprocessing.active_children())
        self._processes: set[multiprocessing.process.BaseProcess] = set()

    def submit(self, chunk: list[Document]) -> Future[list[Encoded]]:
        # It may start a process, which inherits that it does not hear its terminal's Ctrl-C: this one ends it.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            future = self._executor.submit(_encode_chunk, chunk)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self._processes |= set(multiprocessing.active_children()) - self._others
        return future

    def result(self, future: Future[list[Encoded]]) -> list[Encoded]:
        """Raises BrokenProcessPool if a worker is gone, and whatever the worker raised."""
        while True:
            try:
                return future.result(_LOOK_EVERY)
            except concurrent.futures.TimeoutError:  # in Python 3.10 no kin of the builtin
                # The executor notices by itself, unless the worker was killed with half a result sent.
                if any(process.exitcode is not None for process in self._processes):
                    raise BrokenProcessPool from None

    def shut_down(self) -> None:
        self._executor.shutdown()

    def kill(self) -> None:
        """Ends the processes where they are; nothing after `shut_down`."""
        for process in self._processes:
            process.kill()
        self._executor.shutdown(cancel_futures=True)


_tokenizer: Tokenizer | None = None


def _start(tokens: Tokens) -> None:
    """Of a worker process."""
    global _tokenizer
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _tokenizer = make_tokenizer(tokens)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode_chunk(chunk: Sequence[Document]) -> list[Encoded]:
    assert _tokenizer is not None
    return [encode(document, _tokenizer) for document in chunk]
