"""A benchmark's row in tests/bench/results: what was measured, on what, at which commit, by which command."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "tests" / "bench" / "results"


def hardware(device="cpu"):
    """The GPU's name and memory, or the CPU's model and cores."""
    if device == "cuda":
        import torch

        properties = torch.cuda.get_device_properties(0)
        return f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((li.split(":")[1].strip() for li in lines if li.startswith("model name")), "?")
    return f"{model}, {os.cpu_count()} cores"


def commit():
    """The commit checked out, marked -dirty if files differ; unknown where git cannot tell."""
    try:
        out = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    except FileNotFoundError:
        return "unknown"
    return out.stdout.strip() or "unknown"


def record(name, result, device="cpu"):
    """Appends ``result`` to results/``name``.jsonl."""
    append(RESULTS / f"{name}.jsonl", name, result, hardware(device), commit())


def append(file, name, result, measured_on, at_commit):
    """Appends ``result`` to ``file``, with the hardware and the commit as they are given."""
    file.parent.mkdir(parents=True, exist_ok=True)
    row = result | {
        "hardware": measured_on,
        "python": platform.python_version(),
        "commit": at_commit,
        "command": f"python tests/bench/{name}.py " + " ".join(sys.argv[1:]),
    }
    with open(file, "a") as rows:
        rows.write(json.dumps(row) + "\n")
