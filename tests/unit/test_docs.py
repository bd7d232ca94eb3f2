"""What docs state as a table is what the code decides by."""

from __future__ import annotations

from pathlib import Path

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
