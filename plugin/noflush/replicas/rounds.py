"""Rounds of averaging, run by a thread of their own while training goes on; membership is torchft's.

One torchft ``Manager`` a stage. torchft's replica is a whole group, and its ranks are the group's stages: so a quorum
is agreed by whole groups, one of whose stages has died leaves with all of them, and torchft gives every stage a process
group of its own with the same stage of the other groups. torchft's step counts nothing here: it is `FRESH`, `RESUMED`
or `LIVING`, and torchft has who is less given the state of one who is most.
"""

from __future__ import annotations

import json
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.distributed_c10d import AllgatherOptions  # type: ignore[attr-defined]
from torchft.manager import Manager

from noflush.replicas.correction import averaged
from noflush.replicas.listening import manager_at
from noflush.replicas.process_group import FreshGloo
from noflush.replicas.settings import ReplicasConfig
from noflush.replicas.total import total_in_order
from noflush.replicas.transport import State, TensorTransport

FRESH, RESUMED, LIVING = 0, 1, 2
"""A group before its first round, without weights worth keeping or with some; and one that trains."""


@dataclass(frozen=True)
class Round:
    """What a round brought one stage.

    Attributes:
        number: which one it was.
        told: what each group's same stage had to tell, in the order of ranks.
        average: of the slices, by samples; None where there was nobody to average with.
    """

    number: int
    told: tuple[dict[str, Any], ...]
    average: Tensor | None


@dataclass(frozen=True)
class Failed:
    """Why a round came to nothing."""

    why: str


class _Manager(Manager):  # type: ignore[misc]
    """torchft's, which goes on after a quorum that failed: its own raises that error at every quorum from then on."""

    def start_quorum(self, *args: Any, **kwargs: Any) -> None:
        """As torchft's."""
        future: Any = vars(self).get("_quorum_future")
        if future is not None and future.done() and future.exception() is not None:
            self._quorum_future = None
        super().start_quorum(*args, **kwargs)


class RunsRounds(Protocol):
    """What others ask of `Rounds`."""

    @property
    def received(self) -> State | None: ...

    def start(self, number: int, tell: dict[str, Any], part: Tensor | None) -> None: ...

    def poll(self, wait_s: float = 0.0) -> Round | Failed | None: ...

    def serve(self, state: Callable[[], State]) -> None: ...

    def settle(self, living: bool, resumed: bool) -> None: ...

    def close(self) -> None: ...


class Rounds:
    """One stage's rounds.

    Args:
        config: the block's.
        store: of this group's first stage, at an address that other groups reach.
        bind: address of this process.
        stage, stages: which stage of how many.
        name: of the group.
        slice_length: how many elements round number n averages.
        alike: what must be the same at all groups, by name; what JSON can say.
        device: where the stage computes.

    Attributes:
        received: a peer's state, once this newcomer has been given one.
    """

    def __init__(
        self,
        config: ReplicasConfig,
        store: tuple[str, int],
        bind: str,
        stage: int,
        stages: int,
        name: str,
        slice_length: Callable[[int], int],
        alike: dict[str, Any],
        device: torch.device,
    ) -> None:
        self._alike, self._device, self._settled = alike, device, FRESH
        patience = timedelta(seconds=config.timeout_s)
        self._timeout_s, self._min_groups, self._slice_length = config.timeout_s, config.min_groups, slice_length
        self._group = FreshGloo(bind, patience)
        self._transport = TensorTransport(bind, config.timeout_s)
        self.received: State | None = None
        self._asked, self._given = threading.Event(), threading.Event()
        self._state: State | None = None
        self._todo: queue.SimpleQueue[tuple[int, dict[str, Any], Tensor | None] | None] = queue.SimpleQueue()
        self._done: queue.SimpleQueue[Round | Failed] = queue.SimpleQueue()
        with manager_at(bind):
            self._manager = _Manager(
                self._group,
                self._receive,
                self._ask,
                min_replica_size=1,
                use_async_quorum=False,
                timeout=patience,
                quorum_timeout=patience,
                connect_timeout=patience,
                rank=stage,
                world_size=stages,
                store_addr=store[0],
                store_port=store[1],
                lighthouse_addr=f"http://{config.meeting_place}",
                replica_id=name,
                hostname=bind,
                checkpoint_transport=self._transport,
                init_sync=False,  # else groups that start together would get their stages from different ones
            )
        self._thread = threading.Thread(target=self._work, name="noflush-rounds", daemon=True)
        self._thread.start()

    # ---- what training calls -----------------------------------------------------------------------------

    def start(self, number: int, tell: dict[str, Any], part: Tensor | None) -> None:
        """Begins a round; `poll` has its end.

        Args:
            number: the round that this stage takes it for.
            tell: to the same stage of the other groups; what JSON can say. ``samples``: the weight of ``part``.
            part: float32, this group's slice; None has nothing to contribute.
        """
        self._todo.put((number, tell, part))

    def poll(self, wait_s: float = 0.0) -> Round | Failed | None:
        """What came of the round begun; None: it is not over (after ``wait_s`` seconds)."""
        try:
            return self._done.get(timeout=wait_s) if wait_s else self._done.get_nowait()
        except queue.Empty:
            return None

    def serve(self, state: Callable[[], State]) -> None:
        """Gives a peer, if one has asked for it, this stage's ``state()``, between two updates."""
        if self._asked.is_set():
            self._asked.clear()
            self._state = state()
            self._given.set()

    def settle(self, living: bool, resumed: bool) -> None:
        """Says what this group is from its next round on; no round may be under way. Forgets what it was given."""
        self._settled = LIVING if living else RESUMED if resumed else FRESH
        self.received = None
        self._manager.load_state_dict({"step": self._settled, "batches_committed": 0})

    def close(self) -> None:
        """Leaves: the others notice within torchft's heartbeat time-out, if nothing else tells them.

        Waits for a round that is under way, no longer than for any: a thread within gloo when Python ends aborts it.
        """
        self._todo.put(None)
        self._manager.shutdown(wait=False)
        self._thread.join(self._timeout_s)

    # ---- the thread --------------------------------------------------------------------------------------

    def _work(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # a thread has its own
        while True:
            todo = self._todo.get()
            if todo is None:
                return
            number, tell, part = todo
            try:
                result: Round | Failed = self._run(number, tell, part)
            except Exception as error:  # whatever it is: training goes on without this round
                result = Failed(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
            self._done.put(result)

    def _run(self, number: int, tell: dict[str, Any], part: Tensor | None) -> Round | Failed:
        manager = self._manager
        manager.start_quorum()
        manager.wait_quorum()
        rank, world = manager.participating_rank(), manager.num_participants()
        result, why = None, manager.errored()
        if rank is not None and why is None:
            try:
                result = self._exchange(number, {**tell, "number": number}, part, rank, world)
            except Exception as error:  # a peer that is gone: torchft has to hear of it before the next quorum
                manager.report_error(error)
        # All stages of a group hear whether all of them had it, and torchft of a process group that is broken.
        whole = manager.should_commit()
        manager.load_state_dict({"step": self._settled, "batches_committed": 0})
        why = why or manager.errored()
        if result is None or why is not None or not whole:
            first = str(why.original_exception).splitlines() if why is not None else []
            return Failed(first[0] if first else "another stage of a group had to give it up")
        return result

    def _exchange(self, number: int, tell: dict[str, Any], part: Tensor | None, rank: int, world: int) -> Round:
        told = self._tell({**tell, "alike": self._alike}, world)
        for name, value in self._alike.items():
            others = next((one for one in told if one["alike"].get(name) != value), None)
            if others is not None:
                raise ValueError(f"group {others['key']} has {name} {others['alike'].get(name)}, this one {value}")
        agreed = max(one["number"] for one in told)
        if world < max(2, self._min_groups):
            return Round(agreed, tuple(told), None)
        samples = [one["samples"] if one["number"] == agreed else 0.0 for one in told]
        mine = samples[rank]
        # A group that has none, as it was elsewhere, sends zeros of the slice's length.
        weighted = part * mine if part is not None and mine else torch.zeros(self._slice_length(agreed))
        total = total_in_order(self._group, weighted, world, timedelta(seconds=self._timeout_s))
        average = averaged(total, samples)
        told = [{**one, "samples": weight} for one, weight in zip(told, samples, strict=True)]
        return Round(agreed, tuple(told), average)

    def _tell(self, tell: dict[str, Any], world: int) -> list[dict[str, Any]]:
        """Everybody's words, in two gathers: their lengths, and they."""
        if world == 1:
            return [tell]
        patience, words = timedelta(seconds=self._timeout_s), json.dumps(tell).encode()
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(world)]
        self._group.allgather([lengths], [torch.tensor([len(words)])], AllgatherOptions()).wait(patience)
        most = int(max(lengths))
        mine = torch.frombuffer(bytearray(words.ljust(most)), dtype=torch.uint8)
        rows = [torch.zeros(most, dtype=torch.uint8) for _ in range(world)]
        self._group.allgather([rows], [mine], AllgatherOptions()).wait(patience)
        return [json.loads(bytes(row.tolist())) for row in rows]

    def _ask(self) -> State:
        """Called where a peer needs this stage's state: has training give it at its next update."""
        self._given.clear()
        self._state = None
        self._asked.set()
        if not self._given.wait(self._timeout_s):
            self._asked.clear()
            raise TimeoutError(f"no update was made here in {self._timeout_s:g} s, after which a peer was to be served")
        state, self._state = self._state, None
        assert state is not None
        return state

    def _receive(self, state: State) -> None:
        self.received = state
