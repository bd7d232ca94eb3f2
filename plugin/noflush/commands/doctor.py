"""``noflush doctor``: versions, the seams found in the host, what is registered; checks a config if given one."""

from __future__ import annotations

import argparse
import json
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.console import Console

import noflush
from noflush.config import ConfigError, RunFacts, check_config, check_run


def add(commands: Any) -> None:
    """Declares the subcommand."""
    p = commands.add_parser("doctor", help="versions, seams found, what is registered; check a DeepSpeed config")
    p.add_argument("--config", help="a DeepSpeed JSON config to check")
    p.add_argument("--stages", type=int, help="with --config: pipeline stages, for a full check")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints the findings; exit status 1 if something is in the way."""
    console = Console(highlight=False)
    versions = {name: _version(name) for name in ("torch", "deepspeed", "numpy", "matplotlib", "tensorboard")}
    console.print(f"noflush {noflush.__version__}, Python {platform.python_version()}")
    for name, version in versions.items():
        console.print(f"  {name}: {version or 'not installed'}")
    healthy = True
    if versions["torch"] and versions["deepspeed"]:
        healthy = _check_host(console)
    else:
        console.print("torch and deepspeed are needed to train: pip install noflush")
        healthy = False
    if args.config:
        healthy = _check_config(console, args.config, args.stages) and healthy
    return 0 if healthy else 1


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _check_host(console: Console) -> bool:
    import torch

    from noflush.patches import deepspeed as seam

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device; gloo on CPU"
    console.print(f"  device: {device}")
    missing = seam.missing_seams()
    console.print(
        f"seams in DeepSpeed (tested: {', '.join(seam.TESTED)}): " + ("all found" if not missing else "missing")
    )
    for name in missing:
        console.print(f"  - {name}")
    console.print(f"registered: {'yes' if seam.is_patched() else 'no'} (deepspeed.PipelineEngine)")
    return not missing


def _check_config(console: Console, path: str, stages: int | None) -> bool:
    try:
        ds_config = json.loads(Path(path).read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"--config {path}: {error}") from error
    try:
        config = check_config(ds_config)
        if config is None:
            console.print(f"{path}: no async_pipeline block is enabled; DeepSpeed will run as it is")
            return True
        if stages is not None:
            gas = ds_config.get("gradient_accumulation_steps", 1)
            check_run(ds_config, RunFacts(stages=stages, layers=stages, gas=gas))
    except ConfigError as error:
        console.print(str(error))
        return False
    console.print(f"{path}: good")
    return True
