"""Text or JSON lines to tokens: the ``.bin``/``.idx`` pair that ``--data-path`` takes, Megatron's options.

    python launch/preprocess_data.py --input corpus.jsonl --output-prefix data/corpus \
        --tokenizer-type GPT2BPETokenizer --vocab-file vocab.json --merge-file merges.txt --append-eod --workers 8

writes ``data/corpus_text_document.bin`` and ``.idx``.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from noflush.launch.arguments.settings import Tokens
from noflush.launch.data.tokenizer import TYPES, Tokenizer, make_tokenizer

_tokenizer: Tokenizer | None = None
_keys: tuple[str, ...] = ()
_TEXT = ".txt"
_AHEAD = 4096
"""Documents read before those ahead of them are written: a pool alone would read a whole corpus into memory."""


def make_parser() -> argparse.ArgumentParser:
    """Megatron's options of the same script, those that matter to a GPT."""
    parser = argparse.ArgumentParser(prog="preprocess_data.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="FILE",
        help="JSON lines, a document a line; or files ending in .txt, a document a file",
    )
    parser.add_argument("--json-keys", nargs="+", default=["text"], help="keys to take (default: text)")
    parser.add_argument("--output-prefix", required=True, help="where the pairs go, without _KEY_document.bin")
    parser.add_argument("--tokenizer-type", required=True, choices=TYPES)
    parser.add_argument("--tokenizer-model")
    parser.add_argument("--vocab-file")
    parser.add_argument("--merge-file")
    parser.add_argument("--vocab-size", type=int, help="of the NullTokenizer")
    parser.add_argument("--append-eod", action="store_true", help="end every document with the end-of-document token")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: all cores)")
    return parser


def documents(paths: Sequence[str], keys: Sequence[str]) -> Iterator[tuple[int, str | dict[str, str]]]:
    """(bytes read, document) of every document: a text, or a JSON line's keys.

    Raises ValueError naming file and line of what is no document.
    """
    for path in paths:
        if path.endswith(_TEXT):
            text = Path(path).read_text(errors="replace")
            yield os.path.getsize(path), text
            continue
        with open(path, encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    found = json.loads(line)
                    document = {key: found[key] for key in keys}
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(
                        f"{path}, line {number}: no JSON object with {', '.join(keys)} ({error})"
                    ) from None
                yield len(line), document


def _bounded(
    items: Iterator[tuple[int, str | dict[str, str]]], ahead: threading.Semaphore
) -> Iterator[tuple[int, str | dict[str, str]]]:
    for item in items:
        ahead.acquire()
        yield item


def _start(tokens: Tokens, keys: tuple[str, ...]) -> None:
    global _tokenizer, _keys
    _tokenizer, _keys = make_tokenizer(tokens), keys


def _encode(item: tuple[int, str | dict[str, str]]) -> tuple[int, list[list[int]]]:
    """(bytes read, token ids by key) of a document."""
    size, document = item
    assert _tokenizer is not None
    texts = [document] if isinstance(document, str) else [document[key] for key in _keys]
    return size, [_tokenizer.tokenize(text) for text in texts]


def preprocess(
    paths: Sequence[str], keys: Sequence[str], prefix: str, tokens: Tokens, append_eod: bool, workers: int
) -> dict[str, int]:
    """Writes a pair for every key; tokens by key.

    The pairs appear under their names only when they are complete. Raises ValueError for input that is no text.
    """
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
    from torch import tensor

    tokenizer = make_tokenizer(tokens)
    missing = [path for path in paths if not Path(path).is_file()]
    if missing:
        raise ValueError(f"--input {' '.join(missing)}: no such file")
    Path(prefix).parent.mkdir(parents=True, exist_ok=True)
    names = [f"{prefix}_{key}_document" for key in keys]
    builders = [
        IndexedDatasetBuilder(f"{name}.bin.partial", dtype=DType.optimal_dtype(tokenizer.vocab_size)) for name in names
    ]
    counts = dict.fromkeys(keys, 0)
    columns = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()
    context = multiprocessing.get_context("spawn")  # tokenizers keep threads, which a fork would lose
    with (
        Progress(*columns, disable=not sys.stderr.isatty()) as progress,
        context.Pool(workers, _start, (tokens, tuple(keys))) as pool,
    ):
        task = progress.add_task("tokenizing", total=sum(os.path.getsize(path) for path in paths))
        ahead = threading.Semaphore(_AHEAD)
        for size, encoded in pool.imap(_encode, _bounded(documents(paths, keys), ahead), chunksize=16):
            ahead.release()
            progress.advance(task, size)
            for key, builder, ids in zip(keys, builders, encoded, strict=True):
                if append_eod and ids:
                    ids.append(tokenizer.eod)
                if ids:
                    builder.add_document(tensor(ids), [len(ids)])
                    counts[key] += len(ids)
    if not all(counts.values()):
        raise ValueError(f"no token in {', '.join(paths)} under {', '.join(k for k, n in counts.items() if not n)}")
    for name, builder in zip(names, builders, strict=True):
        builder.finalize(f"{name}.idx.partial")
        for ending in (".bin", ".idx"):
            os.replace(f"{name}{ending}.partial", f"{name}{ending}")
    return counts


def main(argv: list[str] | None = None) -> int:
    """Runs; the exit status."""
    args = make_parser().parse_args(argv)
    tokens = Tokens(
        type=args.tokenizer_type,
        model=args.tokenizer_model,
        vocab_file=args.vocab_file,
        merge_file=args.merge_file,
        vocab_size=args.vocab_size,
        extra_ids=0,
        trust_remote_code=False,
    )
    try:
        counts = preprocess(
            args.input, args.json_keys, args.output_prefix, tokens, args.append_eod, max(1, args.workers)
        )
    except ValueError as error:
        print(f"preprocess_data: {error}", file=sys.stderr)  # noqa: T201
        return 2
    for key, count in counts.items():
        print(f"{args.output_prefix}_{key}_document: {count:,} tokens")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
