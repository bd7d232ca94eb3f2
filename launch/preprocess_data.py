"""Text or JSON lines to tokens: the ``.bin``/``.idx`` pair that ``--data-path`` takes, Megatron's options.

    python launch/preprocess_data.py --input corpus.jsonl --output-prefix data/corpus \
        --tokenizer-type GPT2BPETokenizer --vocab-file vocab.json --merge-file merges.txt --append-eod --workers 8

writes ``data/corpus_text_document.bin`` and ``.idx``, complete or not at all.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from runpy import run_path
from types import FrameType

if __name__ == "__main__" and not __package__:  # run by its path
    run_path(str(Path(__file__).with_name("own_code.py")))["or_exit"](__file__)

from noflush.launch.arguments.settings import Tokens
from noflush.launch.data.tokenizer import TYPES, make_tokenizer

_MOST_WORKERS = 1024


def make_parser() -> argparse.ArgumentParser:
    """Megatron's options of the same script, those that matter to a GPT."""
    parser = argparse.ArgumentParser(prog="preprocess_data.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="FILE",
        help="JSON lines, a document a line; or files ending in .txt, a document a file; UTF-8 both",
    )
    parser.add_argument("--json-keys", nargs="+", default=["text"], help="keys to take (default: text)")
    parser.add_argument("--output-prefix", required=True, help="where the pairs go, without _KEY_document.bin")
    parser.add_argument("--tokenizer-type", required=True, choices=TYPES)
    parser.add_argument("--tokenizer-model")
    parser.add_argument("--vocab-file")
    parser.add_argument("--merge-file")
    parser.add_argument("--vocab-size", type=int, help="of the NullTokenizer")
    parser.add_argument("--append-eod", action="store_true", help="end every document with the end-of-document token")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count(), help="processes (default: all cores); with 1, this one alone"
    )
    return parser


def preprocess(
    paths: Sequence[str], keys: Sequence[str], prefix: str, tokens: Tokens, append_eod: bool, workers: int
) -> dict[str, int]:
    """Writes a pair for every key; tokens by key.

    The pairs appear under their names only when they are complete. Raises ValueError for input that is no text, or
    has other token ids than the tokenizer, naming file and line, and for a worker that was killed; OSError naming the
    file that cannot be read or written.
    """
    from noflush.launch.data.documents import documents, input_faults

    if not 1 <= workers <= _MOST_WORKERS:
        raise ValueError(f"--workers {workers}: it must be 1 to {_MOST_WORKERS}")
    faults = input_faults(paths, keys)
    if faults:
        raise ValueError("; ".join(faults))
    tokenizer = make_tokenizer(tokens)

    import numpy as np
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    from noflush.launch.data.encoding import encode_all
    from noflush.launch.data.pair_writer import PairWriter, output_faults

    faults = output_faults(prefix, keys)
    if faults:
        raise ValueError("; ".join(faults))
    eod = np.array([tokenizer.eod] if append_eod else [], dtype=np.int32)
    counts = [0] * len(keys)
    columns = TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn()
    with (
        PairWriter(prefix, keys, tokenizer.vocab_size) as pairs,
        contextlib.closing(encode_all(documents(paths, keys), tokens, tokenizer, workers)) as encoded,
        Progress(*columns, disable=not sys.stderr.isatty()) as progress,
    ):
        task = progress.add_task("tokenizing", total=sum(os.path.getsize(path) for path in paths))
        for document in encoded:
            progress.advance(task, document.size)
            for number, ids in enumerate(document.ids):
                if len(ids):
                    pairs.add(number, np.concatenate([ids, eod]))
                    counts[number] += len(ids) + len(eod)
        if not all(counts):
            empty = ", ".join(key for key, count in zip(keys, counts, strict=True) if not count)
            raise ValueError(f"no token in {', '.join(paths)} under {empty}")
        pairs.finish()
    return dict(zip(keys, counts, strict=True))


class Interrupted(BaseException):
    """A signal asks for the end."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.status = 128 + number


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """The first SIGINT, SIGTERM or SIGHUP raises `Interrupted`; while that cleans up, no other is heard."""
    heard = [n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]

    def hear(number: int, frame: FrameType | None) -> None:
        for other in heard:
            signal.signal(other, signal.SIG_IGN)
        raise Interrupted(number)

    before = {number: signal.signal(number, hear) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def main(argv: list[str] | None = None) -> int:
    """Runs; the exit status: 2 for what is wrong with the input or the disk, 128 and a signal's number for a signal."""
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
        with interruptible():
            counts = preprocess(args.input, args.json_keys, args.output_prefix, tokens, args.append_eod, args.workers)
    except Interrupted as error:
        print(f"preprocess_data: ended by {error}; nothing was written", file=sys.stderr)  # noqa: T201
        return error.status
    except OSError as error:
        file = f"{error.filename}: " if error.filename else ""
        print(f"preprocess_data: {file}{error.strerror or error}; nothing was written", file=sys.stderr)  # noqa: T201
        return 2
    except ValueError as error:
        print(f"preprocess_data: {error}", file=sys.stderr)  # noqa: T201
        return 2
    for key, count in counts.items():
        print(f"{args.output_prefix}_{key}_document: {count:,} tokens")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
