"""What docs state as a table is what the code decides by."""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path

from noflush.compare.contestants import CONTESTANTS
from noflush.config import AsyncPipelineConfig
from noflush.methods.table import METHODS
from noflush.patches.deepspeed.optimizers import HOST_OPTIMIZERS

DOCS = Path(__file__).parents[2] / "docs"


def test_the_table_of_optimizers_is_the_one_that_refuses():
    text = (DOCS / "optimizers.md").read_text()
    section = text[text.index("## DeepSpeed's optimizers") : text.index("## Clipping")]
    rows = {}
    for line in section.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| ") and cells[0] != "`optimizer.type`":
            rows |= {name.strip(): tuple(cells[1:3]) for name in cells[0].split(",")}
    assert rows == {name: (known.plain, known.flat) for name, known in HOST_OPTIMIZERS.items()}


def cells_of(document: str, before: str) -> list[list[str]]:
    """The cells of the table behind ``before`` in ``document``, a list a row, without its head."""
    text = (DOCS / document).read_text()
    lines = text[text.index(before) :].splitlines()
    table = [line for line in lines[: lines.index("")] if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]


def test_the_table_of_keys_is_the_block():
    rows = {key.strip("`"): values for key, values, _ in cells_of("block.md", "| key of `async_pipeline`")}
    first = {key: re.match("`([^`]+)`", values)[1] for key, values in rows.items()}
    defaults = {field.name: field.default for field in fields(AsyncPipelineConfig)}
    assert first == {key: value if isinstance(value, str) else f"{value:g}" if isinstance(value, float)
                     else json.dumps(value) for key, value in defaults.items()}  # fmt: skip


def test_the_tables_of_rules_are_the_methods():
    assert [name.strip("`") for name, *_ in cells_of("methods.md", "| `optimizer.type` | rule")] == list(METHODS)
    written = {}
    for name, params in cells_of("methods.md", "| `optimizer.type` | parameters"):
        found = re.findall(r"`(\w+)` (\[[^]]*\]|[^\s,]+)", params)
        written[name.strip("`")] = {param: json.loads(value) for param, value in found}
    defaults = {name: {p: param.default for p, param in row.params.items()} for name, row in METHODS.items()}
    assert written == json.loads(json.dumps(defaults))


def test_the_table_of_contestants_is_the_one_that_is_run():
    names = [name for first, *_ in cells_of("compare.md", "| name | rule") for name in re.findall("`([^`]+)`", first)]
    assert sorted(names) == sorted([*CONTESTANTS, "adamw"])
