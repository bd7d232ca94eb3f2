"""On what it runs: device, driver, power and clocks, versions, and how ranks could share the GPU."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import re
import stat
import subprocess
from pathlib import Path

import torch

_QUERIES = (
    "driver_version",
    "power.limit",
    "clocks.sm",
    "clocks.max.sm",
    "clocks.mem",
    "compute_mode",
    "mig.mode.current",
)
_PACKAGES = (
    "torch",
    "triton",
    "deepspeed",
    "megatron-core",
    "transformers",
    "apex",
    "transformer-engine",
    "flashoptim",
)


def version(package):
    """The installed version; None without it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def nvidia_smi(*arguments):
    """What it prints; nothing where there is none."""
    try:
        return subprocess.run(["nvidia-smi", *arguments], capture_output=True, text=True, timeout=20).stdout
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return ""


def queried():
    """The first GPU's answers to `_QUERIES`, by name."""
    lines = nvidia_smi(f"--query-gpu={','.join(_QUERIES)}", "--format=csv,noheader").splitlines()
    return dict(zip(_QUERIES, [word.strip() for word in lines[0].split(",")], strict=False)) if lines else {}


def partitions():
    """UUIDs of the MIG instances."""
    return re.findall(r"UUID: (MIG-[\w/-]+)", nvidia_smi("-L"))


def mps_runs():
    """Whether an MPS daemon listens here."""
    control = Path(os.environ.get("CUDA_MPS_PIPE_DIRECTORY", "/tmp/nvidia-mps")) / "control"
    return control.exists() and stat.S_ISFIFO(control.stat().st_mode)


def nccl_version():
    """Of the NCCL that torch has: (major, minor, patch); None without it."""
    return torch.cuda.nccl.version() if torch.distributed.is_nccl_available() else None


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--dry", action="store_true")
    args = p.parse_args()
    row = {"devices": 0 if args.dry else torch.cuda.device_count()}
    if row["devices"]:
        properties = torch.cuda.get_device_properties(0)
        row |= {
            "device": f"{row['devices']} x {properties.name}, {properties.total_memory / 2**30:.0f} GiB",
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "free_GiB": round(torch.cuda.mem_get_info(0)[0] / 2**30, 1),
        }
    print(
        json.dumps(
            row
            | queried()
            | {"mps": mps_runs(), "partitions": len(partitions()), "cores": os.cpu_count()}
            | {"python": platform.python_version(), "cuda": torch.version.cuda, "nccl": nccl_version()}
            | {"versions": {package: version(package) for package in _PACKAGES}}
        )
    )


if __name__ == "__main__":
    main()
