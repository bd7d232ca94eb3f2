"""What a process printed last: how parts and ranks hand their results over."""

from __future__ import annotations

import contextlib
import json


def last_object(text):
    """The last line that is a JSON object; {} if there is none."""
    for line in reversed(text.splitlines()):
        with contextlib.suppress(ValueError):
            found = json.loads(line)
            if isinstance(found, dict):
                return found
    return {}
