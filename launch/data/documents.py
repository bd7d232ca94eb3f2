"""Documents out of files: JSON lines, a document a line, or ``.txt``, a document a file.

UTF-8 both, with or without a byte order mark, whatever the locale. What is no document is refused by file and line:
what a reader guesses, a model learns.
"""

from __future__ import annotations

import codecs
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_TEXT = ".txt"
_PACKED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"PK\x03\x04": "zip",
    b"PAR1": "parquet",
}
_KINDS = {
    type(None): "null",
    bool: "true or false",
    int: "a number",
    float: "a number",
    list: "a list",
    dict: "an object",
    str: "a string",
}


@dataclass(frozen=True, slots=True)
class Document:
    """One document.

    Attributes:
        file: it is from.
        line: it is on, from 1; None if it is the whole file.
        size: bytes it takes there.
        texts: one a key; one alone from a ``.txt`` file. They can be encoded as UTF-8.
    """

    file: str
    line: int | None
    size: int
    texts: tuple[str, ...]

    @property
    def place(self) -> str:
        """``FILE, line N``, or ``FILE``."""
        return _place(self.file, self.line)


def input_faults(paths: Sequence[str], keys: Sequence[str]) -> list[str]:
    """What is wrong with the files and keys, as far as it shows before they are read; one sentence each."""
    faults = []
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        faults.append(f"--json-keys {' '.join(keys)}: {', '.join(twice)} is given twice; give every key once")
    unnamable = [key for key in keys if not key or "/" in key or "\0" in key]
    if unnamable:
        faults.append(f"--json-keys {' '.join(keys)}: {unnamable[0]!r} cannot be part of a file's name; rename the key")
    for path in paths:
        fault = _file_fault(path)
        if fault is not None:
            faults.append(f"--input {path}: {fault}")
        elif path.endswith(_TEXT) and len(keys) > 1:
            faults.append(f"--input {path}: a {_TEXT} file is one text without keys; give one of --json-keys alone")
    return faults


def _file_fault(path: str) -> str | None:
    if os.path.isdir(path):
        return "is a directory; give the files in it"
    if not os.path.exists(path):
        return "no such file"
    if not os.path.isfile(path):
        return "is no regular file; write its content to one"
    try:
        with open(path, "rb") as stream:
            start = stream.read(8)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if not start:
        return "is empty (0 bytes); leave it out"
    for magic, name in _PACKED.items():
        if start.startswith(magic):
            return f"is {name}, not text; unpack it first"
    return None


def documents(paths: Sequence[str], keys: Sequence[str]) -> Iterator[Document]:
    """Every document of ``paths`` in order, with the texts under ``keys``.

    Raises ValueError naming file and line of what is no document, OSError for a file that cannot be read.
    """
    for path in paths:
        yield from (_text_file(path) if path.endswith(_TEXT) else _json_lines(path, keys))


def _text_file(path: str) -> Iterator[Document]:
    content = Path(path).read_bytes()
    begin = len(codecs.BOM_UTF8) if content.startswith(codecs.BOM_UTF8) else 0
    try:
        text = content[begin:].decode()
    except UnicodeDecodeError as error:
        at = begin + error.start
        line = content.count(b"\n", 0, at) + 1
        raise ValueError(f"{_place(path, line)}: {_no_utf8(content[at], f'offset {at} of the file')}") from None
    # Line ends as Python reads them from a text file, on every system.
    yield Document(path, None, len(content), (text.replace("\r\n", "\n").replace("\r", "\n"),))


def _json_lines(path: str, keys: Sequence[str]) -> Iterator[Document]:
    with open(path, "rb") as lines:
        for number, raw in enumerate(lines, 1):
            line = (raw.removeprefix(codecs.BOM_UTF8) if number == 1 else raw).rstrip(b"\r\n")
            if not line.strip():
                continue
            try:
                texts = _texts(line, keys)
            except ValueError as error:
                raise ValueError(f"{_place(path, number)}: {error}") from None
            yield Document(path, number, len(raw), texts)


def _texts(line: bytes, keys: Sequence[str]) -> tuple[str, ...]:
    try:
        found = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise ValueError(_no_utf8(line[error.start], f"offset {error.start} of the line")) from None
    except RecursionError:
        raise ValueError("no JSON object that can be read: it is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"no JSON object ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{_KINDS[type(found)]}, no JSON object with {', '.join(keys)}")
    return tuple(_text(found, key) for key in keys)


def _text(found: dict[str, Any], key: str) -> str:
    if key not in found:
        has = ", ".join(map(repr, list(found)[:8])) or "none"
        raise ValueError(f"no JSON object with {key} (its keys: {has}); --json-keys names the keys to take")
    text = found[key]
    if not isinstance(text, str):
        raise ValueError(
            f"{key} is {_KINDS[type(text)]}, not a string; take the line out, or write the value in quotes"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{key} holds half a surrogate pair, \\u{ord(text[error.start]):04x}, at character {error.start}: that is "
            "no text; take it out"
        ) from None
    return text


def _no_utf8(byte: int, where: str) -> str:
    return f"byte 0x{byte:02x} at {where} is no UTF-8; convert the file first (iconv -f latin1 -t utf-8)"


def _place(path: str, line: int | None) -> str:
    return path if line is None else f"{path}, line {line}"
