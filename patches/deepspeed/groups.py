"""An engine as one group of several: finds the others, joins them, and has its stage's weights averaged."""

from __future__ import annotations

import atexit
import os
import socket
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from noflush.config import ConfigError
from noflush.order.shared_order import SharedOrder
from noflush.patches.deepspeed.lost_stages import LostStages, find_group
from noflush.replicas.settings import ReplicasConfig
from noflush.replicas.torchft_log import quieten
from noflush.stage.alone import is_alone
from noflush.stage.update import FusedUpdate, TorchUpdate

if TYPE_CHECKING:
    from noflush.replicas.averager import Averager
    from noflush.replicas.rounds import Rounds
    from noflush.replicas.samples import GroupSamples

_ATTEMPTS = 10


class Group:
    """This engine's part in the averaging over groups.

    Args:
        engine: a `NoFlushEngine`, whose stage is there.
        config: the block's ``replicas``.

    Raises:
        ConfigError: torchft is missing, or the group is more than one pipeline.
        ConnectionError: there is no lighthouse.

    Attributes:
        key: of this group, which no other has.
        averager: the stage's, once joined.
        order: the data order, at the first stage.
        joined: whether it has joined the others.
    """

    def __init__(self, engine: Any, config: ReplicasConfig) -> None:
        self._engine, self._config = engine, config
        self.joined = False
        faults = _faults(engine, config)
        if faults:
            raise ConfigError(faults)
        self.key: str
        self.order: SharedOrder | None = None
        self.lost_stages: LostStages | None = None
        if is_alone():
            self.key, self._store = find_group(config.timeout_s)
            self.lost_stages = LostStages(self, engine, config, self._store)
            return
        number = os.environ.get("SLURM_ARRAY_TASK_ID", str(os.getpid()))
        name = config.name or f"group {number}"
        self.key = engine.pipeline_stage.tell_all(f"{name}/{os.urandom(6).hex()}")[0]
        if engine.is_first_stage():
            self.order = SharedOrder(self.key)
        self._check_lighthouse()
        self._store = self._make_store()
        if config.reroute:
            self.lost_stages = LostStages(self, engine, config, self._store)
            self.lost_stages.announce()
        self.begin_averaging()

    def begin_averaging(self) -> None:
        """Makes the stage's averager, and takes the stage's place in the group's rounds."""
        self.averager = self._make_averager()
        if self.lost_stages is not None:
            self.lost_stages.watch(self.averager)
        # Before Python waits for the threads that wait for a quorum; atexit comes after.
        getattr(threading, "_register_atexit", atexit.register)(self._close)

    def _close(self) -> None:
        if self.lost_stages is not None:
            self.lost_stages.close()
        self.averager.close()

    # ---- where groups meet -----------------------------------------------------------------------------------

    def _check_lighthouse(self) -> None:
        """All ranks hear of it; else one would raise, and the others wait for it."""
        stage, why = self._engine.pipeline_stage, ""
        if stage.stage == 0:
            host, _, port = self._config.meeting_place.rpartition(":")
            try:
                socket.create_connection((host, int(port)), timeout=min(10.0, self._config.timeout_s)).close()
            except OSError as error:
                why = str(error)
        why = stage.tell_all(why)[0]
        if why:
            raise ConnectionError(
                f"no lighthouse at {self._config.meeting_place} (async_pipeline.replicas.lighthouse): {why}; start "
                "torchft_lighthouse there, at an address that this host reaches"
            )

    def _make_store(self) -> Any:
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        from noflush.replicas.listening import store_at

        stage, bind = self._engine.pipeline_stage, own_address(self._config)
        own = store_at(bind) if stage.stage == 0 else None
        host, port = stage.tell_all((bind, own.port if own is not None else 0))[0]
        return own or TCPStore(host, port, is_master=False, wait_for_workers=False)

    def _make_averager(self) -> Averager:
        from noflush.replicas.averager import Averager

        engine, config, stage = self._engine, self._config, self._engine.pipeline_stage
        return Averager(
            stage,
            config,
            self.key,
            engine.train_batch_size,
            lambda: engine.lr_scheduler,
            lambda: engine.step_schedule() if engine.lr_scheduler is not None else None,
            lambda: float(engine.train_batch_size()) if hasattr(engine.lr_scheduler, "num_steps") else 1.0,
            self.order,
            lambda slice_length: self.make_rounds(
                stage.stage, [layout.numel for layout in stage.weights.layouts], slice_length
            ),
        )

    def make_rounds(self, stage: int, layout: list[int], slice_length: Callable[[int], int]) -> Rounds:
        """Rounds of stage number ``stage``, of weights laid out like ``layout``."""
        from noflush.replicas.rounds import Rounds

        engine, config = self._engine, self._config
        return Rounds(
            config,
            (self._store.host, self._store.port),
            own_address(config),
            stage,
            engine.num_stages,
            self.key.rpartition("/")[0],
            slice_length,
            {
                "stages": engine.num_stages,
                "numbers of the stage's weights": layout,
                "fraction": config.fraction,
                "mode": config.mode,
                "drift": config.drift,
                "reroute": config.reroute,
            },
            engine.pipeline_stage.device,
        )

    def join(self) -> None:
        """Joins the others, and takes a living peer's state over if there is one; on all ranks, before training.

        Raises ConnectionError where they cannot be reached, or train another model.
        """
        if self.joined:
            return
        if is_alone():
            assert self.lost_stages is not None
            self.lost_stages.come_back()
            self.joined = True
            return
        from noflush.replicas.rounds import Failed

        engine, stage = self._engine, self._engine.pipeline_stage
        if stage.runner.calls:
            engine.drain()
        for _ in range(_ATTEMPTS):
            result, found = self.averager.ask(resumed=engine.global_steps > 0)
            told = stage.tell_all((getattr(result, "why", ""), None if found is None else found[1]["updates"]))
            failed = [f"stage {number}: {why}" for number, (why, _) in enumerate(told) if why]
            updates = [count for _, count in told if count is not None]
            if not failed and len(updates) in (0, len(told)):
                break
        else:
            raise ConnectionError(
                f"no round with the lighthouse at {self._config.meeting_place} and the groups it knows ended well "
                f"({'; '.join(failed) or 'a stage was given no state'}): can this host reach it and the other groups' "
                "hosts, and do all train one model by one configuration?"
            )
        assert not isinstance(result, Failed)
        if found is not None:
            self.averager.take_over(found)
            # Later stages of the peer had made more updates: their newest weights are of so many calls.
            engine.global_steps = max(updates)
            engine.global_samples = engine.global_steps * engine.train_batch_size()
            stage.restart(engine.global_steps, 0)
            name = self.key.rpartition("/")[0]
            stage.work.say(f"groups: {name} goes on from a peer's weights, after {engine.global_steps} updates")
        self.averager.begin(result)
        self.joined = True

    def is_whole(self, what: str) -> bool:
        """Whether ``what``, which needs all ranks of the group, can be done; they are answered alike."""
        return self.lost_stages is None or self.lost_stages.whole(what)

    def restarted(self) -> None:
        """A checkpoint was loaded."""
        if self.joined:
            self.averager.restart()

    def samples(self, count: int, seed: int | None) -> GroupSamples:
        """As `NoFlushEngine.group_samples`."""
        from noflush.replicas.samples import GroupSamples

        self.join()
        engine = self._engine
        store = self._store if engine.num_stages > 1 else None
        given = 0 if self.lost_stages is None else self.lost_stages.micro_batches_given()
        return GroupSamples(count, engine.train_micro_batch_size_per_gpu(), seed, self.order, store, given)


def own_address(config: ReplicasConfig) -> str:
    """At which other groups reach this process."""
    if config.bind == "auto":
        return socket.gethostbyname(socket.gethostname())
    return os.path.expandvars(config.bind)


def _faults(engine: Any, config: ReplicasConfig) -> list[str]:
    faults = []
    quieten()
    try:
        import torchft  # noqa: F401
    except ImportError as error:
        faults.append(f"async_pipeline.replicas needs torchft ({error}): pip install 'noflush[replicas]'")
    slices = engine.grid.get_slice_parallel_world_size()
    if engine.dp_world_size * slices > 1:
        faults.append(
            f"async_pipeline.replicas with {engine.dp_world_size} data-parallel replicas and {slices} tensor-parallel "
            "slices in one group: a group is one pipeline, and its ranks as many as its stages; start more groups "
            "in place of replicas"
        )
    stage = engine.pipeline_stage
    if config.mode == "sync" and (not isinstance(stage.update, FusedUpdate) or engine.fp16_enabled()):
        faults.append(
            f"async_pipeline.replicas.mode is 'sync' with {type(stage.weights.rule).__name__} and fp16 "
            f"{'on' if engine.fp16_enabled() else 'off'}: groups' gradients are summed where noflush's own optimizers "
            "update, and unscaled; take one of those, float32 or bf16, or mode 'async'"
        )
    return faults + (_faults_of_detours(engine) if config.reroute else [])


def _faults_of_detours(engine: Any) -> list[str]:
    stage, faults = engine.pipeline_stage, []
    where = "async_pipeline.replicas.reroute is true with"
    if engine.num_stages < 2:
        faults.append(f"{where} one stage a group: there is no neighbour that could go on; use 2 or more, or false")
    if engine.fp16_enabled():
        faults.append(f"{where} fp16: every group has a loss scale of its own; use bf16 or float32")
    if not isinstance(stage.update, (FusedUpdate, TorchUpdate)):
        faults.append(
            f"{where} {type(engine.optimizer).__name__} around {type(stage.weights.rule).__name__}, which sums "
            "gradients out of sight; name one of noflush's optimizers in async_pipeline.optimizer"
        )
    if not is_alone() and dist.get_backend() != "gloo":
        faults.append(
            f"{where} the backend {dist.get_backend()}: over it a stage that dies takes its neighbours' connections "
            "with it; use deepspeed.init_distributed('gloo'), or false"
        )
    return faults
