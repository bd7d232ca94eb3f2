"""The parser: what was given on a command line, of the options in the table (`options`).

An option without meaning is collected for one warning, one that would change the result becomes a fault. Words that
are no option at all are faults too: nothing is swallowed.
"""

from __future__ import annotations

import argparse
import difflib
import shlex
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from noflush.launch.arguments.options import by_dest, gone, options
from noflush.launch.arguments.values import Values


class ArgumentsError(ValueError):
    """Wrong arguments; the message lists every fault with the value seen, the rule and the fix."""

    def __init__(self, faults: list[str]) -> None:
        self.faults = faults
        super().__init__("\n".join(["these arguments cannot be trained with:", *(f"  - {fault}" for fault in faults)]))

    def __reduce__(self) -> tuple[type[ArgumentsError], tuple[list[str]]]:
        # An exception is pickled by its message, which is not what makes this one.
        return type(self), (self.faults,)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise ArgumentsError([message])


_BESIDE = "--deepspeed_config"

_TYPES: dict[str, Callable[[str], Any]] = {
    "int": int,
    "float": float,
    "str": str,
    "bool": lambda word: word.lower() in ("1", "true", "yes"),
}


@cache
def make_parser() -> argparse.ArgumentParser:
    """Both parsers' options and noflush's own; values that are not given are absent."""
    parser = _Parser(
        prog="pretrain_gpt.py",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        description="Trains a GPT with Megatron's arguments; @FILE reads arguments from a file.",
    )
    for option in options():
        strings, dest, said = option.options, option.dest, option.help or argparse.SUPPRESS
        # Attributes that two options share (--wgrad and --no-wgrad) are written by both.
        if option.kind == "value":
            convert, choices = _TYPES[option.type], option.choices
            parser.add_argument(
                *strings,
                dest=dest,
                type=convert,
                nargs=option.nargs,
                choices=None if choices is None else [convert(str(choice)) for choice in choices],
                help=said,
            )
        elif option.kind == "boolean":
            parser.add_argument(*strings[:1], dest=dest, action=argparse.BooleanOptionalAction, help=said)
        else:
            parser.add_argument(*strings, dest=dest, action="store_const", const=option.kind == "true", help=said)
    return parser


# Files of arguments lie in checkpoints that others made: what lets code run does not count there.
_COMMAND_LINE_ALONE = frozenset({"--trust-remote-code"})


def expand(argv: list[str]) -> list[str]:
    """``argv`` with every ``@FILE`` replaced by the words in it; ``#`` starts a comment there.

    A relative ``--deepspeed_config`` in a file is looked for beside that file, wherever the run is started; all other
    paths are those of a command line.

    Raises ArgumentsError if a file cannot be read, or says what is the command line's alone to say.
    """
    words: list[str] = []
    for word in argv:
        if word.startswith("@"):
            try:
                path = Path(word[1:])
                found = _with_config_beside(shlex.split(path.read_text(), comments=True), path.parent)
            except (OSError, ValueError) as error:
                raise ArgumentsError([f"{word} cannot be read as a file of arguments: {error}"]) from None
            if given := [option for option in found if option in _COMMAND_LINE_ALONE]:
                raise ArgumentsError(
                    [f"{given[0]} in {word}: no file can allow code to run; give it on the command line"]
                )
            words += found
        else:
            words.append(word)
    return words


def _with_config_beside(words: list[str], folder: Path) -> list[str]:
    found: list[str] = []
    for word in words:
        if found and found[-1] == _BESIDE:
            word = str(folder / word)
        elif word.startswith(f"{_BESIDE}="):
            word = f"{_BESIDE}={folder / word.removeprefix(f'{_BESIDE}=')}"
        found.append(word)
    return found


def read(argv: list[str]) -> Values:
    """Reads a command line.

    Raises ArgumentsError for what cannot be read at all; other faults are collected.
    """
    faults: list[str] = []
    argv = expand(argv)
    namespace, unknown = make_parser().parse_known_args(argv)
    known = [string for option in options() for string in option.options]
    its_value = False
    for word in unknown:
        name = word.split("=")[0]
        if not name.startswith("--"):
            if not its_value:
                faults.append(f"{word!r} belongs to no option")
            continue
        # What follows an option that does not exist is its value, and no fault of its own.
        its_value = "=" not in word
        if name in gone():
            faults.append(f"{name}: {gone()[name]}")
            continue
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else "Megatron-LM and Megatron-DeepSpeed have no such option"
        faults.append(f"{name} is not an option: {hint}")
    given: dict[str, Any] = vars(namespace)
    named: dict[str, str] = {}
    without_meaning: dict[str, list[str]] = {}
    for option in options():
        dest = option.dest
        if dest not in given:
            continue
        written = _as_written(option.options, argv)
        if written is None:
            continue
        named[dest] = written
        if option.meaning == "refused" and not option.harmless(given[dest]):
            shown = "" if option.kind != "value" else f" {given[dest]}"
            faults.append(f"{written}{shown}: {option.why}")
        elif option.meaning == "ignored" and written not in without_meaning.setdefault(option.why, []):
            without_meaning[option.why].append(written)
    values = {dest: option.absent for dest, option in by_dest().items()} | given
    return Values(values, named, without_meaning, faults)


def _as_written(strings: tuple[str, ...], argv: list[str]) -> str | None:
    words = {word.split("=")[0] for word in argv}
    return next((string for string in strings if string in words), None)
