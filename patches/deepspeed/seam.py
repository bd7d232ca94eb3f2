"""DeepSpeed's seam: `deepspeed.initialize` looks up its engine classes in its module when it is called.

A stand-in takes the name `PipelineEngine`. It builds DeepSpeed's own engine unless the config asks for noflush,
and answers isinstance and issubclass as the class it stands for, because scripts (Megatron-DeepSpeed's too) ask.
Stand-ins for the other engines only refuse an enabled block, which they would silently ignore.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from noflush.config import ConfigError
from noflush.failure.keeper import keeper_watched
from noflush.methods.table import METHODS, load
from noflush.patches.deepspeed import probe
from noflush.patches.deepspeed.faults import OLDEST_DEEPSPEED, RunFacts, check_config, check_run

logger = logging.getLogger("noflush")
TESTED = ("0.19.8",)
_ENGINES = ("PipelineEngine", "DeepSpeedEngine", "DeepSpeedHybridEngine", "DualPipeVEngine")
_SHARED_MEMORY_OP = "deepspeed_shm_comm"
_SHARED_MEMORY: dict[str, Any] = {}


class HostChangedError(RuntimeError):
    """DeepSpeed is not of the shape that noflush patches."""


class _StandIn:
    """Passes for the class it stands for: called, asked, looked into and derived from."""

    def __init__(self, original: type, build: Callable[..., Any]) -> None:
        self.__wrapped__ = original
        self._build = build
        self.__doc__ = original.__doc__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._build(self.__wrapped__, *args, **kwargs)

    def __instancecheck__(self, instance: Any) -> bool:
        return isinstance(instance, self.__wrapped__)

    def __subclasscheck__(self, subclass: type) -> bool:
        return issubclass(subclass, self.__wrapped__)

    def __mro_entries__(self, bases: tuple[Any, ...]) -> tuple[type, ...]:
        return (self.__wrapped__,)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__wrapped__, name)


def patch() -> None:
    """Puts the stand-ins in place. Idempotent. Raises HostChangedError naming what is missing."""
    if is_patched():
        return
    check_host()
    import deepspeed

    for name in _ENGINES:
        original = getattr(deepspeed, name, None)
        if original is not None:
            build = _build if name == "PipelineEngine" else _refuse_block
            setattr(deepspeed, name, _StandIn(original, build))
            logger.info("noflush: deepspeed.%s stands for %s.%s", name, original.__module__, original.__qualname__)
    # Not to be warned of as untested under ZeRO-1: noflush's tests hold them there.
    _zero_optimizers().extend(map(load, METHODS))
    # On a CPU `init_distributed` would compile a collective for `inference_all_reduce`, which takes minutes, fails
    # without a C++ compiler, and waits for ever on the lock of a build that was killed. Without it the same sum is
    # formed by gloo.
    _SHARED_MEMORY["was"] = deepspeed.ops.__compatible_ops__.get(_SHARED_MEMORY_OP)
    deepspeed.ops.__compatible_ops__[_SHARED_MEMORY_OP] = False


def unpatch() -> None:
    """Puts DeepSpeed's own classes back."""
    if is_patched():
        import deepspeed

        for name in _ENGINES:
            stand_in = getattr(deepspeed, name, None)
            if type(stand_in) is _StandIn:
                setattr(deepspeed, name, stand_in.__wrapped__)
        known = _zero_optimizers()
        known[:] = [optimizer for optimizer in known if optimizer not in set(map(load, METHODS))]
        deepspeed.ops.__compatible_ops__[_SHARED_MEMORY_OP] = _SHARED_MEMORY["was"]


def _zero_optimizers() -> list[type]:
    from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS

    found: list[type] = ZERO_SUPPORTED_OPTIMIZERS
    return found


def is_patched() -> bool:
    """True while the stand-ins are in place."""
    host = sys.modules.get("deepspeed")
    return type(getattr(host, "PipelineEngine", None)) is _StandIn


def missing_seams() -> list[str]:
    """Symbols that noflush builds on and this DeepSpeed lacks; empty when all is well."""
    import deepspeed

    version = tuple(int(p) for p in deepspeed.__version__.split("+")[0].split(".")[:3] if p.isdigit())
    missing = []
    if version < OLDEST_DEEPSPEED:
        missing.append(f"version {'.'.join(map(str, OLDEST_DEEPSPEED))} or newer")
    code = getattr(getattr(deepspeed, "initialize", None), "__code__", None)
    if code is None or "PipelineEngine" not in code.co_names:
        missing.append("deepspeed.initialize looking up PipelineEngine when called")
    missing += probe.missing()
    return missing


def check_host() -> None:
    """Raises HostChangedError with the version found, the versions tested and what is missing."""
    missing = missing_seams()
    if missing:
        import deepspeed

        raise HostChangedError(
            f"noflush cannot register with DeepSpeed {deepspeed.__version__} (tested: {', '.join(TESTED)}): "
            f"missing {'; '.join(missing)}. Install a tested version: pip install deepspeed=={TESTED[-1]}"
        )


def _bounded(build: Callable[..., Any]) -> Callable[..., Any]:
    """``build``, whose waits for others end after ``peer_timeout_s``: for the store's keeper, and in collectives."""

    def bounded(original: type, *args: Any, **kwargs: Any) -> Any:
        import torch.distributed as dist

        from noflush.stage.alone import is_alone

        block = check_config(kwargs["config_class"]._param_dict)
        if block is None or not dist.is_initialized() or dist.get_world_size() == 1 or is_alone():
            return build(original, *args, **kwargs)
        _limit_groups(block.peer_timeout_s)
        store = dist.distributed_c10d._get_default_store()
        connect = store.clone if hasattr(store, "clone") else lambda: store  # torch 2.6 has no clone
        with keeper_watched(connect, block.peer_timeout_s, "rank 0"):
            engine = build(original, *args, **kwargs)
        _limit_groups(block.peer_timeout_s)
        return engine

    return bounded


def _limit_groups(seconds: float) -> None:
    """No collective over gloo waits longer, in groups but the user's own world: DeepSpeed's have torch's 30 minutes."""
    import torch
    import torch.distributed as dist

    for group in list(dist.distributed_c10d._world.pg_map):
        if group is dist.group.WORLD or torch.device("cpu") not in group._device_types:
            continue
        backend: Any = group._get_backend(torch.device("cpu"))
        if hasattr(backend, "options") and backend.options._timeout.total_seconds() > seconds:
            backend._set_default_timeout(timedelta(seconds=seconds))


@_bounded
def _build(original: type, *args: Any, **kwargs: Any) -> Any:
    host_config = kwargs["config_class"]
    ds_config = host_config._param_dict
    if check_config(ds_config) is None:
        return original(*args, **kwargs)
    from noflush.methods.matrices import mark_embeddings_and_heads
    from noflush.patches.deepspeed import megatron_deepspeed as megatron
    from noflush.patches.deepspeed import muon_section
    from noflush.patches.deepspeed.client_optimizer import check_whole, with_rule
    from noflush.patches.deepspeed.engine import NoFlushEngine
    from noflush.patches.deepspeed.megatron_matrices import mark_matrices
    from noflush.patches.deepspeed.shared_modules import shared_untied

    model = kwargs["model"]
    flags = megatron.arguments_of(model)
    mark_embeddings_and_heads(model.named_modules())
    muon_section.take_tags(model.parameters())
    if flags is not None:
        mark_matrices(model, flags)
    if muon_section.names_it(ds_config.get("optimizer")) and (flags is not None or kwargs.get("optimizer") is None):
        kwargs = muon_section.in_place(kwargs)
        ds_config = host_config._param_dict
    facts = facts_of(model, host_config, kwargs.get("optimizer"))
    block, schedule = check_run(ds_config, facts if flags is None else megatron.facts(facts, flags, ds_config))
    if block.optimizer is not None:
        kwargs = with_rule(kwargs, block.optimizer)
    elif flags is not None:
        kwargs = megatron.with_our_optimizer(kwargs, flags, ds_config)
    check_whole(kwargs.get("optimizer"), ds_config)
    for line in shared_untied(model):
        logger.warning("noflush: %s", line)
    if not schedule.flushes:
        kwargs = _without_borrowed(kwargs)
    engine = NoFlushEngine(block, schedule, *args, **_with_something_to_hold(kwargs))
    if flags is not None:
        megatron.follow_updates(engine, flags)
    return engine


def _without_borrowed(kwargs: dict[str, Any]) -> dict[str, Any]:
    """``kwargs`` of an engine whose optimizer has no tied weight that another stage owns."""
    from torch.optim import Optimizer

    from noflush.patches.deepspeed import ties

    model, theirs = kwargs["model"], kwargs.get("optimizer")
    taken = ties.borrowed(model)
    if not taken:
        return kwargs
    if isinstance(theirs, Optimizer):
        ties.disown(theirs, taken)
    params = kwargs.get("model_parameters")
    params = [p for p in model.parameters() if p.requires_grad] if params is None else params
    return {**kwargs, "model_parameters": ties.without(params, taken)}


def _with_something_to_hold(kwargs: dict[str, Any]) -> dict[str, Any]:
    """``kwargs`` of an engine whose optimizer has a parameter even where nothing of the stage trains.

    torch's optimizers refuse an empty list. A frozen stage's own parameters will do, or one that nothing reads.
    Raises ConfigError where DeepSpeed keeps master weights, of which it cannot have none.
    """
    learnt = kwargs.get("model_parameters")
    learnt = None if learnt is None else list(learnt)
    empty = learnt is not None and not any(g["params"] if isinstance(g, dict) else True for g in learnt)
    own = list(kwargs["model"].parameters())
    frozen = [p for p in own if not p.requires_grad]
    host_config = kwargs["config_class"]
    keeps_masters = host_config.zero_optimization_stage or host_config.bfloat16_config.enabled
    if (keeps_masters or host_config.float16_config.enabled) and (empty or len(frozen) == len(own)):
        raise ConfigError(
            [
                f"stage {kwargs['model'].stage_id} has no parameter of its own to train, and DeepSpeed's bf16, "
                "fp16 and ZeRO-1 optimizers need one: train in float32 without ZeRO, or move a layer that trains onto "
                "that stage (partition_method, or fewer stages)"
            ]
        )
    if kwargs.get("optimizer") is None and (empty or not own):
        from torch import nn, zeros

        return {**kwargs, "model_parameters": frozen or [nn.Parameter(zeros(1), requires_grad=False)]}
    return {**kwargs, "model_parameters": learnt}


def _refuse_block(original: type, *args: Any, **kwargs: Any) -> Any:
    host_config = kwargs.get("config_class")
    if host_config is not None and check_config(host_config._param_dict) is not None:
        raise ConfigError(
            [
                f"async_pipeline is enabled, but the model is a {type(kwargs.get('model')).__name__}, which "
                f"{original.__name__} trains: it needs a deepspeed.pipe.PipelineModule; make the model one, or take "
                "the block out"
            ]
        )
    return original(*args, **kwargs)


def facts_of(model: Any, host_config: Any, client_optimizer: Any = None) -> RunFacts:
    """What a DeepSpeed ``PipelineModule`` and the resolved ``DeepSpeedConfig`` say about a run."""
    import deepspeed

    return RunFacts(
        stages=model.num_stages,
        layers=len(model._layer_specs),
        gas=host_config.gradient_accumulation_steps,
        zero_stage=int(host_config.zero_optimization_stage),
        tied_keys=tuple(_tied_keys(model)),
        dynamic_shape=bool(model.dynamic_shape),
        deepspeed_version=deepspeed.__version__,
        client_optimizer=client_optimizer is not None,
    )


def _tied_keys(model: Any) -> list[str]:
    from deepspeed.pipe import TiedLayerSpec

    keys = {spec.key for spec in model._layer_specs if isinstance(spec, TiedLayerSpec)}
    return sorted(keys)
