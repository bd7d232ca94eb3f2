"""What a run is refused for before its engine is built: the block, DeepSpeed's config and the model together. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from noflush.config import BLOCK, AsyncPipelineConfig, ConfigError, read_block
from noflush.methods.table import METHODS
from noflush.order.schedule import Schedule
from noflush.order.wire_format import Wire
from noflush.patches.deepspeed import muon_section
from noflush.patches.deepspeed.config_faults import at, faults_of_host_config

OLDEST_DEEPSPEED = (0, 19, 3)


@dataclass(frozen=True)
class RunFacts:
    """What the host knows about a run before its engine is built.

    Attributes:
        stages: pipeline stages P.
        gas: gradient_accumulation_steps K as the host resolved it (it may follow from train_batch_size).
        layers: entries of the ``PipelineModule``'s layer list.
        tied_keys: keys of its tied layers.
        dynamic_shape: whether the module was built with ``dynamic_shape=True``.
        deepspeed_version: as the package states it, e.g. ``"0.19.8"``.
        client_optimizer: whether the script passes its own optimizer to ``deepspeed.initialize``.
        zero_stage: ZeRO stage as the host resolved it.
        untie: how tied layers are untied in this host.
        faults: what the host's own flags ask for and cannot have.
    """

    stages: int
    layers: int
    gas: int = 1
    tied_keys: tuple[str, ...] = ()
    dynamic_shape: bool = False
    deepspeed_version: str = "0.19.8"
    client_optimizer: bool = False
    zero_stage: int = 0
    untie: str = "untie them (LayerSpec in place of TiedLayerSpec)"
    faults: tuple[str, ...] = ()


def check_config(ds_config: Mapping[str, Any]) -> AsyncPipelineConfig | None:
    """As `config.parse_block`, and all that can be known from the config alone, before any process group exists."""
    faults: list[str] = []
    config = read_block(ds_config, faults)
    if BLOCK not in ds_config or (config is not None and not config.enabled):
        faults = faults or _faults_when_disabled(ds_config)
        config = None
    else:
        faults += faults_of_host_config(ds_config) + _faults_of_wire(config, ds_config)
    if faults:
        raise ConfigError(faults)
    return config


def check_run(ds_config: Mapping[str, Any], facts: RunFacts) -> tuple[AsyncPipelineConfig, Schedule]:
    """The checked block and schedule of an enabled run. Raises ConfigError listing every fault of the run."""
    faults: list[str] = []
    config = read_block(ds_config, faults)
    of_config = faults_of_host_config(ds_config)
    # Once the config's own ZeRO section is refused, what the host made of it is no second fault.
    faults += (
        of_config
        + _faults_of_wire(config, ds_config)
        + _faults_of_facts(replace(facts, zero_stage=0) if of_config else facts)
    )
    if not facts.client_optimizer and not at(ds_config, "optimizer", "type"):
        faults.append(
            'no optimizer: noflush updates the weights itself; add an "optimizer" section or pass optimizer= '
            "to deepspeed.initialize"
        )
    named = at(ds_config, "optimizer", "type")
    if facts.client_optimizer and named in METHODS and config is not None and config.optimizer is None:
        faults.append(
            f"optimizer.type is {named!r}, but the script passes an optimizer of its own to deepspeed.initialize, "
            "which DeepSpeed then uses: take one of the two out"
        )
    if config and config.optimizer is not None and not facts.client_optimizer:
        faults.append(
            f"{BLOCK}.optimizer takes the place of an optimizer that the script passes to deepspeed.initialize, and it "
            'passes none: name the rule in the "optimizer" section instead'
        )
    if config and config.clip == "global" and config.schedule == "1f1b_no_flush":
        faults.append(
            f"{BLOCK}.clip is 'global' with schedule '1f1b_no_flush': without a flush the stages' gradients belong to "
            "different batches, so there is no global norm to clip by; use 'stage', 'lagged_global' (the newest norm "
            "of all stages that is known), or schedule '1f1b_flush'"
        )
    if config and config.extra_in_flight == "auto" and config.schedule == "1f1b_flush":
        faults.append(
            f"{BLOCK}.extra_in_flight is 'auto' with schedule '1f1b_flush': a flushing pipeline has nothing in flight "
            "between calls, and so nothing to choose; set it to 0, or schedule to '1f1b_no_flush'"
        )
    # A client's optimizer is judged once it is there.
    ours = facts.client_optimizer or named in (None, *METHODS) or muon_section.names_it(ds_config.get("optimizer"))
    if config and config.kernel in ("triton", "compile") and not ours:
        faults.append(
            f"{BLOCK}.kernel is {config.kernel!r}, but optimizer {named!r} updates by itself: leave kernel out, or "
            f"choose one of {', '.join(METHODS)}"
        )
    wrapped = facts.zero_stage or at(ds_config, "bf16", "enabled") or at(ds_config, "fp16", "enabled")
    if facts.tied_keys and facts.stages > 1 and config and config.schedule == "1f1b_no_flush" and wrapped and not ours:
        faults.append(
            f"tied layers {', '.join(map(repr, facts.tied_keys))} with optimizer {named!r} in mixed precision or "
            "ZeRO-1: without a flush their owner adds up the gradients, which DeepSpeed's optimizers keep to "
            f"themselves there; choose one of {', '.join(METHODS)}, train in float32 without ZeRO, {facts.untie}, or "
            "set the schedule to '1f1b_flush'"
        )
    if config and config.clip == "lagged_global" and config.schedule == "1f1b_no_flush" and wrapped and not ours:
        faults.append(
            f"{BLOCK}.clip is 'lagged_global' with optimizer {named!r} in mixed precision or ZeRO-1, where DeepSpeed's "
            f"optimizers clip by themselves: choose one of {', '.join(METHODS)}, or clip 'stage'"
        )
    look_ahead = at(ds_config, "optimizer", "params", "look_ahead")
    if config and config.optimizer is not None:
        look_ahead = config.optimizer.get("params", {}).get("look_ahead", 0)
    if config and config.eval_weights == "aligned" and config.schedule == "1f1b_no_flush" and look_ahead:
        faults.append(
            f"{BLOCK}.eval_weights is 'aligned' with look_ahead {look_ahead}: stages keep what forwards compute with, "
            "which lies ahead of the true weights; use 'newest' (the true ones), or look_ahead 0"
        )
    schedule = None
    if not faults and config is not None:
        try:
            schedule = Schedule(
                stages=facts.stages,
                gas=facts.gas,
                name=config.schedule,
                weights=config.weights,
                extra_in_flight=config.extra_at_start,
                aligned=config.eval_weights == "aligned",
            )
        except ValueError as error:
            faults.append(f"{BLOCK}: {error}")
    if faults:
        raise ConfigError(faults)
    assert config is not None
    assert schedule is not None
    return config, schedule


def _faults_when_disabled(ds_config: Mapping[str, Any]) -> list[str]:
    name = at(ds_config, "optimizer", "type")
    if name in METHODS:
        return [
            f"optimizer type {name!r} is noflush's, but {BLOCK} is not enabled: set {BLOCK}.enabled to true "
            '(with "schedule": "1f1b_flush" for the synchronous twin), or choose one of DeepSpeed\'s optimizers'
        ]
    return []


def _faults_of_wire(config: AsyncPipelineConfig | None, ds_config: Mapping[str, Any]) -> list[str]:
    try:
        forms = Wire.read(config.wire) if config is not None else Wire()
    except ValueError:  # said already
        return []
    if at(ds_config, "fp16", "enabled") and "bf16" in (forms.activations, forms.gradients):
        return [
            f"{BLOCK}.wire has bf16 in it with fp16.enabled true: bf16 takes the same two bytes a number and keeps "
            "three bits less of it; use 'model', 'int8' or 'int4'"
        ]
    return []


def _faults_of_facts(facts: RunFacts) -> list[str]:
    faults = list(facts.faults)
    version = tuple(int(part) for part in facts.deepspeed_version.split("+")[0].split(".")[:3] if part.isdigit())
    if version < OLDEST_DEEPSPEED:
        faults.append(
            f"DeepSpeed {facts.deepspeed_version}: releases before 0.19.3 scale pipeline gradients wrongly "
            "(by stage, or not at all); install deepspeed>=0.19.3,<0.20"
        )
    if facts.layers < facts.stages:
        faults.append(
            f"{facts.stages} stages for {facts.layers} layers: every stage needs a layer; use {facts.layers} "
            "stages or fewer, or a model with more layers"
        )
    if facts.zero_stage > 1:
        faults.append(f"ZeRO stage {facts.zero_stage} as DeepSpeed reads zero_optimization: use stage 0 or 1")
    if facts.dynamic_shape:
        faults.append(
            "dynamic_shape=True: shapes are agreed once, so that receives can be posted early; leave it out, and pad "
            "to one shape"
        )
    return faults
