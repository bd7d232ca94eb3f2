"""The values of a command line while they are being understood, and the faults found in them."""

from __future__ import annotations

import math
from typing import Any

from noflush.launch.arguments.options import RULES, by_dest


class Values:
    """A command line, read.

    Attributes:
        values: every option's value by its attribute name, Megatron's defaults where it was not given.
        named: attribute names of the options that were given, with the option as it was written.
        without_meaning: options given that have no meaning here, by what kind of thing they are about.
        faults, notes: what is wrong, and what is to be said at the start, so far.
    """

    def __init__(
        self, values: dict[str, Any], named: dict[str, str], without_meaning: dict[str, list[str]], faults: list[str]
    ) -> None:
        self.values = values
        self.named = named
        self.without_meaning = without_meaning
        self.faults = faults
        self.notes: list[str] = []
        self._unknown: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        return self.values[name]

    def taken(self, section: str) -> dict[str, Any]:
        """The fields of a section of the settings that are options' values as they stand."""
        found = {}
        for dest, option in by_dest().items():
            of, _, field = (option.sets or "").partition(".")
            if of == section:
                found[field] = self.values[dest]
        return found

    def needed(self, name: str) -> int:
        """A whole number that must be given, by its option's rule; 1 where it is not, with a fault."""
        value, row = self.values[name], by_dest()[name]
        option = "--" + name.replace("_", "-")
        if value is None:
            self.faults.append(f"{option} is missing: every Megatron GPT run needs it")
        elif (rule := _broken(value, row.rule, row.most)) is not None:
            self.faults.append(f"{option} is {value}: it must be {rule}")
        else:
            return int(value)
        self._unknown.add(name)
        return 1

    def known(self, *names: str) -> bool:
        """Whether no fault was found in any of the values: else what follows from them is no second fault."""
        return not self._unknown & {*names}

    def one_of(self, *names: str) -> Any:
        """The value of the options that mean the same, of which at most one may be given."""
        given = [name for name in names if name in self.named]
        if len(given) > 1:
            both = " and ".join(self.named[name] for name in given)
            self.faults.append(f"{both} mean the same: give one")
        return self.values[given[0] if given else names[0]]

    def check(self) -> None:
        """Faults of values by themselves; the default stands in for them, so that each is one fault."""
        for name, option in by_dest().items():
            value = self.values[name]
            if name not in self.named or value is None or option.needed:
                continue
            if option.values is not None and value not in option.values:
                self._wrong(name, f"{self.named[name]} {value}: {option.otherwise}")
            elif option.rule is not None and (rule := _broken(value, option.rule, option.most)) is not None:
                self._wrong(name, f"{self.named[name]} is {value}: it must be {rule}")

    def _wrong(self, name: str, fault: str) -> None:
        self.faults.append(fault)
        self._unknown.add(name)
        self.values[name] = by_dest()[name].absent
        del self.named[name]

    def at_most_one(self, *names: str) -> None:
        """A fault where several were given of which one says it all."""
        given = [name for name in names if name in self.named and self.values[name]]
        if len(given) > 1:
            shown = " and ".join(f"{self.named[name]} {self.values[name]}" for name in given)
            self.faults.append(f"{shown}: they say the same in different units; give one")

    def note_without(self, condition: bool, missing: str, *names: str) -> None:
        """A note of the options that were given and take effect only with ``missing``, which ``condition`` is."""
        given = [self.named[name] for name in names if name in self.named]
        if given and not condition:
            self.notes.append(f"{' '.join(given)}: without effect, for there is no {missing}")


def _broken(value: float, rule: str | None, most: int) -> str | None:
    """What ``value`` must be and is not; None if it is."""
    if rule is None or (math.isfinite(value) and RULES[rule](value) and value <= most):
        return None
    return f"at most {most}" if math.isfinite(value) and RULES[rule](value) else rule
