"""What a hyper-parameter may be, said once: its default, the rule in words, and the test of it. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Param:
    """One hyper-parameter of a method.

    Attributes:
        default: its value where none is given.
        rule: what it must be, to follow "it must be".
        holds: whether a value, of any type, is that.
    """

    default: Any
    rule: str
    holds: Callable[[Any], bool]


def is_within(value: Any, least: float = 0.0, below: float = math.inf) -> bool:
    """Whether ``value`` is a number in [least, below); nan, infinities and text that looks like one are not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and least <= value < below


def not_negative(default: float) -> Param:
    """A finite number, 0 or more."""
    return Param(default, "a finite number, 0 or more", is_within)


def fraction(default: float) -> Param:
    """A number in [0, 1)."""
    return Param(default, "in [0, 1)", lambda value: is_within(value, below=1))


def share(default: float) -> Param:
    """A number in [0, 1]."""
    return Param(default, "in [0, 1]", lambda value: is_within(value) and value <= 1)


def fractions(*default: float) -> Param:
    """As many numbers in [0, 1) as ``default`` has."""
    count = {2: "two"}.get(len(default), str(len(default)))

    def holds(value: Any) -> bool:
        whole = isinstance(value, (list, tuple)) and len(value) == len(default)
        return whole and all(is_within(part, below=1) for part in value)

    return Param(default, f"{count} numbers in [0, 1)", holds)


def whole(default: int, least: int = 0) -> Param:
    """A whole number, ``least`` or more."""
    return Param(
        default, f"a whole number, {least} or more", lambda value: isinstance(value, int) and is_within(value, least)
    )


def flag(default: bool) -> Param:
    """True or false."""
    return Param(default, "true or false", lambda value: isinstance(value, bool))


def one_of(*choices: str) -> Param:
    """One of some words, of which the first is the default."""
    return Param(choices[0], " or ".join(choices), lambda value: value in choices)
