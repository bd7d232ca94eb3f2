"""What pydantic finds wrong with a JSON object, a line a key: the value seen, the rule, and the fix. Pure."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import ValidationError


def faults_of_error(
    error: ValidationError,
    values: Mapping[str, Any],
    where: str,
    known: Sequence[str],
    later: Mapping[tuple[str, str], str] | None = None,
) -> list[str]:
    """The faults of the object ``values``.

    Args:
        where: its name in the config.
        known: its keys.
        later: of a key and a value that are to come, what to do until then.
    """
    # A key that may be of several types has a rule for each.
    rules: dict[str, list[str]] = {}
    for found in error.errors():
        key = str(found["loc"][0]) if found["loc"] else "?"
        if found["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"the keys are {', '.join(known)}"
            rules.setdefault(f"{where}.{key} is not a key", []).append(hint)
        elif found["type"] == "missing":
            rules.setdefault(f"{where}.{key} is missing", []).append("it has no default")
        else:
            value = values.get(key)
            instead = (later or {}).get((key, value)) if isinstance(value, str) else None
            message = found["msg"]
            rules.setdefault(f"{where}.{key} is {value!r}", []).append(instead or message[0].lower() + message[1:])
    return [f"{key}: {', or '.join(rule)}" for key, rule in rules.items()]
