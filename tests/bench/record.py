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
    """The commit checked out, marked -dirty if files differ."""
    out = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return out.stdout.strip()


def record(name, result, device="cpu"):
    """Appends ``result`` to results/``name``.jsonl."""
    RESULTS.mkdir(exist_ok=True)
    row = result | {
        "hardware": hardware(device),
        "python": platform.python_version(),
        "commit": commit(),
        "command": f"python tests/bench/{name}.py " + " ".join(sys.argv[1:]),
    }
    with open(RESULTS / f"{name}.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")
