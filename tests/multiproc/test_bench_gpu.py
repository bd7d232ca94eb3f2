"""The GPU bench is rehearsed: every row is there, with the answers that a CPU can give."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bench.gpu_parts.table import PARTS, skipped

GPU = Path(__file__).parents[1] / "bench" / "gpu.py"
NOT_HERE = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"deepspeed", "megatron", "transformers", "pydantic", "rich", "psutil", "hjson"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Missing())
"""


def rehearsal(folder, *arguments, path):
    """The rows, by part, and the exit status, of a rehearsal started from ``folder`` with PYTHONPATH ``path``."""
    command = [sys.executable, str(GPU), "--dry", "--record", "--results", str(folder), *arguments]
    ended = subprocess.run(
        command, cwd=folder, env=os.environ | {"PYTHONPATH": str(path)}, capture_output=True, text=True, timeout=290
    )
    rows = [json.loads(line) for line in (folder / "gpu.jsonl").read_text().splitlines()]
    return {row["part"]: row for row in rows}, ended.returncode


@pytest.mark.slow
@pytest.mark.multiproc
def test_every_row_is_there_and_none_has_failed(tmp_path):
    rows, status = rehearsal(tmp_path, path="")
    assert list(rows) == [part.name for part in PARTS]
    bad = {name: row for name, row in rows.items() if row["status"] != "ok" and not skipped(row["status"])}
    assert not bad
    assert status == 0
    for name, row in rows.items():
        assert {"hardware", "python", "commit", "command", "asks"} <= row.keys()
        if name.startswith(("stages", "engine")) and row["status"] == "ok":
            assert row["max_loss_difference_from_simulator"] == 0.0
            assert set(row["updates"]) == {row["calls"]}


@pytest.mark.slow
@pytest.mark.multiproc
def test_a_bare_machine_has_the_rows_that_torch_and_triton_suffice_for(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(NOT_HERE)
    asked = ("update-steady", "stages-2", "engine-1", "megatron-bf16")
    rows, status = rehearsal(tmp_path, "--only", *asked, path=tmp_path)
    assert {name: row["status"] for name, row in rows.items()} == {
        "machine": "ok",
        "update-steady": "ok",
        "stages-2": "ok",
        "engine-1": "not installed: deepspeed",
        "megatron-bf16": "not installed: deepspeed, megatron.core",
    }
    assert rows["stages-2"]["max_loss_difference_from_simulator"] == 0.0
    assert status == 0
