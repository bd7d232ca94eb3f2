"""The ``async_pipeline`` JSON block: its fields, their defaults, and every fault of its own.

Pure: no torch, no host. What a host's config and a run may be refused for besides stands in that host's wing.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Literal

from pydantic import ConfigDict, ValidationError
from pydantic.dataclasses import dataclass as pydantic_dataclass

from noflush.block_errors import faults_of_error
from noflush.methods.table import METHODS
from noflush.order.clipping import ClipName
from noflush.order.policies import PolicyName
from noflush.order.schedule import MOST_IN_FLIGHT, ScheduleName
from noflush.order.wire_format import Wire
from noflush.replicas.settings import ReplicasConfig, faults_of_replicas

BLOCK = "async_pipeline"


class ConfigError(ValueError):
    """A configuration that cannot work; the message lists every fault found, one a line."""

    def __init__(self, faults: list[str]) -> None:
        self.faults = faults
        count = f"{len(faults)} faults" if len(faults) > 1 else "1 fault"
        super().__init__(f"noflush refuses this configuration ({count}):\n" + "\n".join(f"  - {f}" for f in faults))

    def __reduce__(self) -> tuple[type[ConfigError], tuple[list[str]]]:
        # An exception is pickled by its message, which is not what makes this one.
        return type(self), (self.faults,)


@pydantic_dataclass(frozen=True, config=ConfigDict(extra="forbid", strict=True))
class AsyncPipelineConfig:
    """The block itself. Frozen; ``parse_block`` makes one out of JSON."""

    enabled: bool = True
    """False leaves DeepSpeed exactly as it was, as does a config without the block."""

    schedule: ScheduleName = "1f1b_no_flush"
    """``1f1b_no_flush`` never drains; ``1f1b_flush`` is the synchronous twin in the same engine."""

    weights: PolicyName = "stash"
    """``stash``: backward sees exactly its forward's weights. ``latest``: one version, backward sees the live
    weights. ``2bw``: every micro-batch of a batch uses the same version, delay 1 at every stage."""

    extra_in_flight: int | Literal["auto"] = 0
    """Micro-batches in flight at stage 0 beyond one a stage, 0 to 4096; hides link latency at the price of delay.
    ``auto`` measures compute and links in the first calls, chooses the smallest depth that hides them, says it, and
    goes on with it after a drain."""

    wire: str | dict[str, Any] = "model"
    """How activations and their gradients travel between stages: ``model`` (as they are), ``bf16``, ``int8`` or
    ``int4``; or ``{"activations": ..., "gradients": ...}``. Fewer bytes, and other numbers."""

    clip: ClipName = "stage"
    """How ``gradient_clipping`` is applied. ``stage``: each stage clips by the norm of its own gradients. ``global``:
    by the norm of all stages' gradients, which exists with schedule ``1f1b_flush`` alone."""

    eval_weights: Literal["newest", "aligned"] = "newest"
    """What `eval_batch` evaluates. ``newest``: each stage's newest weights, of which later stages have made a few
    updates more. ``aligned``: at every stage the version of as many updates as the first has made, which later stages
    keep for it: the model as it was then. Not with ``latest``, nor with a look-ahead."""

    optimizer: dict[str, Any] | None = None
    """For scripts that pass an optimizer of their own to `deepspeed.initialize`: the rule of noflush's that takes its
    place, as ``{"type": "DelayAwareNAdamW", "params": {...}}``. It keeps the script's parameter groups, and the
    script's schedule sets their learning rate and weight decay. None leaves the script's optimizer."""

    kernel: Literal["auto", "triton", "compile", "torch"] = "auto"
    """What computes the update of noflush's own optimizers: ``triton`` (one fused pass; GPUs), ``compile``
    (`torch.compile` of the reference), ``torch`` (the reference itself). ``auto`` chooses and says what and why."""

    trace_dir: str | None = None
    """Folder for one trace file a rank (the newest events only); None writes none."""

    peer_timeout_s: float = 1800.0
    """Seconds (1 to 604800, a week) a stage waits for a message of a neighbour before it ends the job with an error
    that names both. A neighbour's own work between calls (evaluation, data) counts; a dead one is noticed at once."""

    max_skipped_updates: int = 100
    """Updates a stage may skip in a row, for gradients that are not finite, before the run saves a checkpoint and
    ends. A dynamic loss scale adds 20 x (stage 0's lag in batches + 4), for the scale to fall."""

    async_save: bool = False
    """Whether `save_checkpoint` returns once all has been copied into host memory, and a thread writes it while
    training goes on. Else it returns when all is on the disk."""

    replicas: dict[str, Any] | None = None
    """Groups of pipelines that average their weights while they train, and may come and go, as
    ``{"lighthouse": "host:port", ...}`` (`ReplicasConfig`); None: this pipeline is alone."""

    stop_dir: str | None = None
    """Folder of that checkpoint; None: where the run saved last, else ``noflush_stopped`` in the working directory."""

    @property
    def groups(self) -> ReplicasConfig | None:
        """``replicas``, read."""
        return None if self.replicas is None else ReplicasConfig(**self.replicas)

    @property
    def extra_at_start(self) -> int:
        """What is in flight beyond one a stage before anything was measured."""
        return 0 if self.extra_in_flight == "auto" else self.extra_in_flight


def parse_block(ds_config: Mapping[str, Any]) -> AsyncPipelineConfig | None:
    """The block of a DeepSpeed config as a dict, or None where there is none or it is not enabled.

    Raises ConfigError listing every fault of the block itself.
    """
    faults: list[str] = []
    config = read_block(ds_config, faults)
    if faults:
        raise ConfigError(faults)
    if config is None or not config.enabled:
        return None
    return config


def read_block(ds_config: Mapping[str, Any], faults: list[str]) -> AsyncPipelineConfig | None:
    """The block, enabled or not; None where there is none or it cannot be read. Appends every fault of it."""
    block = ds_config.get(BLOCK)
    if BLOCK not in ds_config:
        near = difflib.get_close_matches(BLOCK, [str(k) for k in ds_config], n=1, cutoff=0.8)
        if near:
            faults.append(f"{near[0]!r} is not a key of DeepSpeed or noflush: did you mean {BLOCK!r}?")
        return None
    if not isinstance(block, Mapping):
        faults.append(f'{BLOCK} is {block!r}: it must be a JSON object such as {{"enabled": true}}')
        return None
    try:
        config = AsyncPipelineConfig(**{str(key): value for key, value in block.items()})
    except ValidationError as error:
        faults += faults_of_error(error, block, BLOCK, [f.name for f in fields(AsyncPipelineConfig)], _LATER)
        wrong = {str(e["loc"][0]) for e in error.errors() if e["loc"]}
        # The other keys may be out of range all the same: every fault is told at once.
        rest = {str(key): value for key, value in block.items() if str(key) not in wrong}
        faults += _faults_of_values(AsyncPipelineConfig(**rest))
        return None
    faults += _faults_of_values(config)
    return config


def _faults_of_detours(config: AsyncPipelineConfig) -> list[str]:
    faults = []
    if config.schedule == "1f1b_flush":
        faults.append(
            f"{BLOCK}.replicas.reroute is true with schedule '1f1b_flush': a call that ends with a flush waits for "
            "every stage of its own group; use '1f1b_no_flush'"
        )
    if config.extra_in_flight == "auto":
        faults.append(
            f"{BLOCK}.replicas.reroute is true with extra_in_flight 'auto': all stages of a group measure their links "
            "together, which one that has come back cannot; name a number"
        )
    return faults


_LATER = {
    ("weights", "predict"): "weight prediction comes later; use 'stash', 'latest' or '2bw'",
}


_RANGES = {
    "extra_in_flight": (0, MOST_IN_FLIGHT, ""),
    "peer_timeout_s": (1, 7 * 24 * 3600, " seconds"),
    "max_skipped_updates": (1, 10**9, ""),
}


def _faults_of_values(config: AsyncPipelineConfig) -> list[str]:
    faults = [
        f"{BLOCK}.{name} is {getattr(config, name)}: it must be from {least} to {most}{unit}"
        for name, (least, most, unit) in _RANGES.items()
        if getattr(config, name) != "auto" and not least <= getattr(config, name) <= most
    ]
    try:
        Wire.read(config.wire)
    except ValueError as error:
        faults.append(f"{BLOCK}.wire is {config.wire!r}: {error}")
    if config.replicas is not None:
        faults += faults_of_replicas(config.replicas, f"{BLOCK}.replicas")
        if config.replicas.get("reroute") is True:
            faults += _faults_of_detours(config)
    rule = config.optimizer
    if rule is not None and (rule.get("type") not in METHODS or not isinstance(rule.get("params", {}), Mapping)):
        faults.append(
            f'{BLOCK}.optimizer is {rule!r}: it must be {{"type": ..., "params": {{...}}}} with one of '
            f"{', '.join(METHODS)}"
        )
    elif rule is not None and (unknown := rule.keys() - {"type", "params"}):
        faults.append(f"{BLOCK}.optimizer.{sorted(unknown)[0]} is not a key: the keys are type, params")
    elif rule is not None and (set_elsewhere := {"lr", "weight_decay"} & rule.get("params", {}).keys()):
        faults.append(
            f"{BLOCK}.optimizer.params.{sorted(set_elsewhere)[0]} is set: learning rate and weight decay are those of "
            "the script's parameter groups and schedule; take it out"
        )
    elif rule is not None:
        wrong = METHODS[rule["type"]].faults(rule.get("params", {}))
        faults += [f"{BLOCK}.optimizer.params: {fault}" for fault in wrong]
    return faults
