"""The parser: Megatron's options as ``options.json`` lists them, and what was given on a command line.

An option without meaning is collected for one warning, one that would change the result becomes a fault. Words that
are no option at all are faults too: nothing is swallowed.
"""

from __future__ import annotations

import argparse
import difflib
import json
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from noflush.launch.arguments.meaning import OLDER, ONE_IS_NONE, alternative, no_meaning


class ArgumentsError(ValueError):
    """Wrong arguments; the message lists every fault with the value seen, the rule and the fix."""

    def __init__(self, faults: list[str]) -> None:
        self.faults = faults
        super().__init__("\n".join(["these arguments cannot be trained with:", *(f"  - {fault}" for fault in faults)]))


@dataclass(frozen=True)
class Given:
    """A command line, read.

    Attributes:
        values: every option's value by its attribute name, Megatron's defaults where it was not given.
        named: attribute names of the options that were given, with the option as it was written.
        without_meaning: options given that have no meaning here, by what kind of thing they are about.
        faults: what is wrong so far.
    """

    values: dict[str, Any]
    named: dict[str, str]
    without_meaning: dict[str, list[str]]
    faults: list[str]


@cache
def options() -> list[dict[str, Any]]:
    """Megatron's options, from both parsers: option strings, attribute name, kind, type, arity, default, choices."""
    found: list[dict[str, Any]] = json.loads(Path(__file__).with_name("options.json").read_text())
    return found


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> Any:
        raise ArgumentsError([message])


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
        kind, strings, dest = option["kind"], option["options"], option["dest"]
        # Attributes that two options share (--wgrad and --no-wgrad) are written by both.
        if kind == "value":
            convert = _TYPES[option["type"]]
            choices = option.get("choices")
            parser.add_argument(
                *strings,
                dest=dest,
                type=convert,
                nargs=option.get("nargs"),
                choices=None if choices is None else [convert(str(choice)) for choice in choices],
                help=argparse.SUPPRESS,
            )
        elif kind == "boolean":
            parser.add_argument(*strings[:1], dest=dest, action=argparse.BooleanOptionalAction, help=argparse.SUPPRESS)
        else:
            parser.add_argument(*strings, dest=dest, action="store_const", const=kind == "true", help=argparse.SUPPRESS)
    parser.add_argument("--dry-run", action="store_true", help="print plan, ranks and memory, and start nothing")
    parser.add_argument("--world-size", type=int, help="how many ranks --dry-run plans for")
    parser.add_argument(
        "--trust-checkpoint", action="store_true", help="--load runs whatever code the checkpoint's pickles hold"
    )
    return parser


def expand(argv: list[str]) -> list[str]:
    """``argv`` with every ``@FILE`` replaced by the words in it; ``#`` starts a comment there.

    Raises ArgumentsError if a file cannot be read.
    """
    words = []
    for word in argv:
        if word.startswith("@"):
            try:
                words += shlex.split(Path(word[1:]).read_text(), comments=True)
            except (OSError, ValueError) as error:
                raise ArgumentsError([f"{word} cannot be read as a file of arguments: {error}"]) from None
        else:
            words.append(word)
    return words


def default_of(option: dict[str, Any]) -> Any:
    """The value an option's attribute has when it is not given."""
    kind = option["kind"]
    return option.get("default") if kind in ("value", "boolean") else kind == "false"


def read(argv: list[str]) -> Given:
    """Reads a command line.

    Raises ArgumentsError for what cannot be read at all; other faults are collected.
    """
    faults: list[str] = []
    argv = expand(argv)
    namespace, unknown = make_parser().parse_known_args(argv)
    known = [string for option in options() for string in option["options"]]
    its_value = False
    for word in unknown:
        name = word.split("=")[0]
        if not name.startswith("--"):
            if not its_value:
                faults.append(f"{word!r} belongs to no option")
            continue
        # What follows an option that does not exist is its value, and no fault of its own.
        its_value = "=" not in word
        if name in OLDER:
            faults.append(f"{name}: {OLDER[name]}")
            continue
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}?" if near else "Megatron-LM and Megatron-DeepSpeed have no such option"
        faults.append(f"{name} is not an option: {hint}")
    given: dict[str, Any] = vars(namespace)
    values: dict[str, Any] = {"dry_run": False, "world_size": None, "trust_checkpoint": False}
    named: dict[str, str] = {}
    without_meaning: dict[str, list[str]] = {}
    values |= defaults()
    for option in options():
        dest = option["dest"]
        default = default_of(option)
        if dest not in given:
            continue
        written = _as_written(option["options"], argv)
        if written is None:
            continue
        named[dest] = written
        why = alternative(dest)
        kind = no_meaning(dest)
        if why and not _harmless(dest, given[dest], default):
            shown = "" if option["kind"] != "value" else f" {given[dest]}"
            faults.append(f"{written}{shown}: {why}")
        elif kind and written not in without_meaning.setdefault(kind, []):
            without_meaning[kind].append(written)
    values.update(given)
    return Given(values, named, {kind: names for kind, names in without_meaning.items() if names}, faults)


def _as_written(strings: list[str], argv: list[str]) -> str | None:
    words = {word.split("=")[0] for word in argv}
    return next((string for string in strings if string in words), None)


@cache
def defaults() -> dict[str, Any]:
    """Every option's value by its attribute name, when it is not given."""
    found: dict[str, Any] = {}
    for option in options():
        found.setdefault(option["dest"], default_of(option))
    return found


def _harmless(dest: str, value: Any, default: Any) -> bool:
    """Whether a refused option was given at a value that changes nothing."""
    return value == default or (dest in ONE_IS_NONE and value in (1, [1]))
