"""``noflush doctor``: versions, the seams found in the hosts, what is registered; checks a config if given one."""

from __future__ import annotations

import argparse
import importlib
import platform
import warnings
from importlib import metadata
from typing import Any

from rich.console import Console

import noflush
from noflush.commands.tested import NAMED, requirements, rows, together, verdict
from noflush.config import ConfigError
from noflush.patches.deepspeed.config_file import gas_of, read_host_config
from noflush.patches.deepspeed.faults import RunFacts, check_config, check_run

_PACKAGES = (
    *("torch", "deepspeed", "megatron-core", "transformers", "triton"),
    *("numpy", "pydantic", "matplotlib", "tensorboard"),
)


def add(commands: Any) -> None:
    """Declares the subcommand."""
    p = commands.add_parser("doctor", help="versions, seams found, what is registered; check a DeepSpeed config")
    p.add_argument("--config", help="a DeepSpeed JSON config to check (a file, or base64 as GPT-NeoX passes it)")
    p.add_argument("--stages", type=int, help="with --config: pipeline stages, for a full check")
    p.add_argument("--replicas", type=int, default=1, help="with --config: data-parallel replicas (default: 1)")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints the findings; exit status 1 if something is in the way."""
    console = Console(highlight=False, soft_wrap=True)
    for name, value in (("--stages", args.stages), ("--replicas", args.replicas)):
        if value is not None and value < 1:
            raise ValueError(f"{name} is {value}: it must be 1 or more")
    versions = {name: _version(name) for name in _PACKAGES}
    console.print(f"noflush {noflush.__version__}")
    taken = _say_versions(console, {"Python": platform.python_version(), **versions})
    if versions["torch"] and versions["deepspeed"]:
        healthy = _check_host(console) and taken
    else:
        console.print("torch and deepspeed are needed to train: pip install 'noflush[deepspeed]'")
        healthy = False
    if versions["megatron-core"]:
        healthy = _check_megatron_core(console) and healthy
    if versions["torch"]:
        _say_kernel(console)
    if args.config:
        healthy = _check_config(console, args.config, args.stages, args.replicas) and healthy
    return 0 if healthy else 1


def _say_versions(console: Console, versions: dict[str, str | None]) -> bool:
    """Prints each version and what is known of it; False if one is refused."""
    seen, takes = rows(), requirements()
    taken = True
    for name, version in versions.items():
        said = "not installed"
        if version is not None:
            found, words = verdict(name, version, seen, takes)
            taken = taken and found != "refused"
            said = f"{version} ({words})" if name in NAMED or found == "refused" else version
        console.print(f"  {name}: {said}")
    row = together(versions, seen)
    console.print(
        "these together: not tested"
        if row is None
        else f"these together: {row.passed} tests ({', '.join(row.parts)}) passed on {row.date}, at commit {row.commit}"
    )
    return taken


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _check_host(console: Console) -> bool:
    # DeepSpeed as it is: with a release that does not fit, registering would be the error that is to be explained.
    noflush.unregister()
    try:
        host = importlib.import_module("deepspeed")
    except Exception as error:
        console.print(f"deepspeed cannot be imported: {type(error).__name__}: {error}")
        return False
    from noflush.patches.deepspeed import seam

    console.print(f"  device: {_device()}")
    missing = seam.missing_seams()
    console.print(f"seams in DeepSpeed {host.__version__}: " + ("all found" if not missing else "missing"))
    for name in missing:
        console.print(f"  - {name}")
    if missing:
        console.print(f"  noflush will not register; pip install deepspeed=={seam.TESTED[-1]}")
        return False
    noflush.register()
    console.print(f"registered: {'yes' if seam.is_patched() else 'no'} (deepspeed.PipelineEngine)")
    return seam.is_patched()


def _device() -> str:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no CUDA device; gloo on CPU"


def _check_megatron_core(console: Console) -> bool:
    from noflush.patches.megatron_core import dropout as seam

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # megatron-core's, of optional packages that it does without
        missing = seam.missing_seams()
    console.print("seams in megatron-core: " + ("all found" if not missing else "missing"))
    for name in missing:
        console.print(f"  - {name}")
    return not missing


def _say_kernel(console: Console) -> None:
    import torch

    from noflush.kernels.choice import WORTH_COMPILING, choose

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kernel, reason = choose("auto", device, WORTH_COMPILING)
    console.print(f"update kernel of a stage of {WORTH_COMPILING:,} weights or more: {kernel.name} ({reason})")


def _check_config(console: Console, path: str, stages: int | None, replicas: int) -> bool:
    try:
        ds_config = read_host_config(path)
    except ValueError as error:
        raise ValueError(f"--config {error}") from error
    notes = []
    try:
        config = check_config(ds_config)
        if config is None:
            console.print(f"{path}: no async_pipeline block is enabled; DeepSpeed will run as it is")
            return True
        optimizer = ds_config.get("optimizer") or {}
        if not optimizer.get("type"):
            notes.append('no "optimizer" section: the script must pass an optimizer to deepspeed.initialize')
        if stages is None:
            notes.append("give --stages for what depends on the number of stages")
        else:
            gas = gas_of(ds_config, replicas)
            client = config.optimizer is not None or not optimizer.get("type")
            check_run(ds_config, RunFacts(stages=stages, layers=stages, gas=gas, client_optimizer=client))
            notes.append(f"K = {gas} with {replicas} data-parallel replicas")
    except (ConfigError, ValueError) as error:
        console.print(f"{path}: {error}", markup=False)
        return False
    console.print(f"{path}: good{''.join(f'; {note}' for note in notes)}", markup=False)
    return True
