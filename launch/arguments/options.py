"""The table of options (``options.json``): a row says all that is known of an option before any other is looked at.

Its name, type and default, as Megatron-LM's and Megatron-DeepSpeed's parsers have them, and noflush's own; what it
means here, with the reason where it does nothing or is refused; what its value must be; and, where the value is taken
as it stands, which setting it becomes. What depends on several options is decided by ``of_*.py``.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

RULES: dict[str, Callable[[float], bool]] = {
    "1 or more": lambda value: value >= 1,
    "0 or more": lambda value: value >= 0,
    "more than 0": lambda value: value > 0,
    "at least 0 and below 1": lambda value: 0 <= value < 1,
    "more than 0 and at most 1": lambda value: 0 < value <= 1,
    "between 0 and 2^32 - 1": lambda value: 0 <= value < 2**32,
}
"""What numbers must be, in words and as a test."""


@dataclass(frozen=True)
class Option:
    """A row.

    Attributes:
        options: what is written on a command line; ``dest`` the attribute, which several rows may share.
        kind: ``value``, ``true`` or ``false`` (a flag that sets it so), ``boolean`` (--x and --no-x); ``gone``: no
            parser's any more, but in example scripts that were not kept up.
        type, nargs, default, choices: of a ``value``, as argparse has them.
        parsers: whose it is: ``lm``, ``deepspeed``, ``noflush``.
        releases: of Megatron-LM's supported ones, those whose parser has it; none named: all of them.
        meaning: ``used``; ``anyway``: so whether it is said or not, launchers and scripts give it and nothing has to
            read it; ``ignored``: no meaning here, or none for the result, and named once in a warning; ``refused``: it
            would change the result.
        why: what an ``ignored`` one is about; why another is ``refused``, and what to do instead.
        one_is_none: refused, but not at 1, which is as good as none.
        rule: what a number must be, one of `RULES`, and no more than ``most``. One that is ``needed`` is checked where
            it is read, for it may come from elsewhere.
        values: those of the choices that can be had; for any other, ``otherwise`` says what to do.
        sets: the setting (``section.field`` of `settings`) that takes the value as it stands.
        help: of noflush's own.
    """

    options: tuple[str, ...]
    dest: str
    kind: Literal["value", "true", "false", "boolean", "gone"]
    parsers: tuple[str, ...]
    meaning: Literal["used", "anyway", "ignored", "refused"]
    releases: tuple[str, ...] = ()
    type: Literal["int", "float", "str", "bool"] = "str"
    nargs: Any = None
    default: Any = None
    choices: tuple[Any, ...] | None = None
    why: str = ""
    one_is_none: bool = False
    rule: str | None = None
    most: int = 2**40
    needed: bool = False
    values: tuple[str, ...] | None = None
    otherwise: str = ""
    sets: str | None = None
    help: str | None = None

    @property
    def absent(self) -> Any:
        """Its attribute's value when it is not given."""
        return self.default if self.kind in ("value", "boolean") else self.kind == "false"

    def harmless(self, value: Any) -> bool:
        """Whether ``value`` changes nothing, although the option is refused."""
        return value == self.absent or (self.one_is_none and value in (1, [1]))


_TUPLES = ("options", "parsers", "releases", "choices", "values")


@cache
def rows() -> tuple[Option, ...]:
    """All rows of the table, those of options that are gone among them."""
    read: list[dict[str, Any]] = json.loads(Path(__file__).with_name("options.json").read_text())
    return tuple(Option(**{**row, **{key: tuple(row[key]) for key in _TUPLES if key in row}}) for row in read)


@cache
def options() -> tuple[Option, ...]:
    """All options that can be given: both of Megatron's parsers', then noflush's own."""
    return tuple(option for option in rows() if option.kind != "gone")


@cache
def gone() -> dict[str, str]:
    """What took the place of options that no parser has any more."""
    return {string: option.why for option in rows() if option.kind == "gone" for string in option.options}


@cache
def by_dest() -> dict[str, Option]:
    """The first row of every attribute; others of it differ in how they are written, and in their default."""
    found: dict[str, Option] = {}
    for option in options():
        found.setdefault(option.dest, option)
    return found
