"""--lr and --tune as they are given. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence


def read_rates(
    given: Sequence[str], tuned: Sequence[str], names: Sequence[str]
) -> tuple[dict[str, float], dict[str, tuple[float, ...]]]:
    """(rate by contestant, rates to try by contestant). Raises ValueError."""
    rates, tune = {}, {}
    for option, words in (("--lr", given), ("--tune", tuned)):
        for word in words:
            name, _, values = word.partition("=")
            if name not in names:
                raise ValueError(
                    f"{option} {word}: no contestant of this call; write NAME=VALUE, of {', '.join(names)}"
                )
            found = tuple(_rate(option, word, value) for value in values.split(","))
            if option == "--lr" and len(found) != 1:
                raise ValueError(f"{option} {word}: give one rate, or several to --tune")
            if option == "--tune" and len(set(found)) < 2:
                raise ValueError(f"{option} {word}: give two rates or more, separated by commas")
            if name in rates or name in tune:
                raise ValueError(f"{option} {word}: {name} has its rates already; name it once, by --lr or by --tune")
            if option == "--lr":
                rates[name] = found[0]
            else:
                tune[name] = tuple(sorted(set(found)))
    return rates, tune


def _rate(option: str, word: str, value: str) -> float:
    try:
        rate = float(value)
    except ValueError:
        rate = math.nan
    if not 0 < rate < math.inf:
        raise ValueError(f"{option} {word}: {value!r} is no learning rate; give a number above 0")
    return rate
