"""An engine whose pipeline goes on without one of its stages: what it tells its group, and how it comes back to it."""

from __future__ import annotations

import json
import threading
import time
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from noflush.order.averaging import slice_of
from noflush.replicas.settings import ReplicasConfig
from noflush.stage.alone import is_alone
from noflush.stage.tied import Tie

if TYPE_CHECKING:
    from noflush.patches.deepspeed.groups import Group
    from noflush.replicas.averager import Averager
    from noflush.replicas.rerouting import Rerouting

_ROUNDS = 5
"""How many rounds of averaging one that comes back waits: its place is free when one has ended, or is given up."""
_REFRESH_S = 5.0
_LOST, _STAGE, _SAMPLES_FROM = "noflush/lost", "noflush/stage/{}", "noflush/samples from"


def ties_of_group(seconds: float) -> list[Tie]:
    """The tied weights of the group that this process, which came back alone, is of. Raises ConnectionError."""
    from noflush.replicas.come_back import find_group as find

    return [
        Tie(one["name"], tuple(one["stages"]), tuple(one["shape"]), *(_dtype(one[key]) for key in ("dtype", "sums")))
        for one in find(seconds)["ties"]
    ]


def _plain(tie: Tie) -> dict[str, Any]:
    sums = None if tie.sums is None else str(tie.sums)
    return {"name": tie.name, "stages": tie.stages, "shape": tie.shape, "dtype": str(tie.dtype), "sums": sums}


def _dtype(name: str | None) -> Any:
    return None if name is None else getattr(torch, name.removeprefix("torch."))


def find_group(seconds: float) -> tuple[str, Any]:
    """Key and store of the group that this process, which came back alone, is of. Raises ConnectionError."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    from noflush.replicas.come_back import find_group as find

    found = find(seconds)
    host, port = found["store"]
    return found["key"], TCPStore(host, port, is_master=False, wait_for_workers=False)


class LostStages:
    """Of one engine.

    Args:
        group: this engine's.
        engine: a `NoFlushEngine`.
        config: the block's ``replicas``.
        store: of the group, which ends with its first stage.

    Attributes:
        rerouting: once it watches.
    """

    def __init__(self, group: Group, engine: Any, config: ReplicasConfig, store: Any) -> None:
        from noflush.patches.deepspeed.groups import own_address
        from noflush.replicas.door import Door
        from noflush.replicas.true_weights import TrueWeights

        self._group, self._engine, self._config, self._store = group, engine, config, store
        self.rerouting: Rerouting | None = None
        self._said: set[str] = set()
        self._known: list[str] = []
        stage = engine.pipeline_stage
        self._door = Door(own_address(config))
        told = {
            "door": self._door.address,
            "elements": TrueWeights(stage.weights, stage.ring).elements,
            "layout": [layout.numel for layout in stage.weights.layouts],
        }
        store.set(_STAGE.format(stage.stage), json.dumps(told))

    def announce(self) -> None:
        """Leaves word for a stage that comes back; on all ranks."""
        from noflush.replicas.come_back import announce

        stage = self._engine.pipeline_stage
        stage.tell_all(None)  # every stage has told of itself
        if stage.stage == 0:
            ties = [_plain(tie) for tie in stage.tied.ties]
            announce({"key": self._group.key, "store": [self._store.host, self._store.port], "ties": ties})

    def _follow_doors(self) -> None:
        """Keeps what others are told of doors new, by a connection of its own: training waits for no store."""
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        try:
            store = TCPStore(self._store.host, self._store.port, is_master=False, wait_for_workers=False)
            while True:
                self._known = [told["door"] for told in self._stages(store)]
                time.sleep(_REFRESH_S)
        except RuntimeError:  # it ends with the group's first stage
            return

    def _stages(self, store: Any = None) -> list[dict[str, Any]]:
        keys = [_STAGE.format(number) for number in range(self._engine.num_stages)]
        return [json.loads(told) for told in (store or self._store).multi_get(keys)]

    def _doors(self) -> list[str]:
        return [told["door"] for told in self._stages()]

    def watch(self, averager: Averager) -> None:
        """From here on this stage stands in for others, and others for its neighbours."""
        from noflush.replicas.empty_place import EmptyPlace
        from noflush.replicas.rerouting import Rerouting

        engine, fraction = self._engine, self._config.fraction
        rerouting = self.rerouting = Rerouting(
            engine.pipeline_stage, self._group.key, self._door, self._doors, averager.state_for_peer, engine.say_here,
            self._config.timeout_s,
        )  # fmt: skip

        def slice_length(number: int, elements: int) -> int:
            return slice_of(number, elements, fraction)[1]

        def open_place(lost: int) -> EmptyPlace:
            told = self._stages()[lost]
            make = partial(
                self._group.make_rounds, lost, told["layout"], partial(slice_length, elements=told["elements"])
            )
            return EmptyPlace(make, averager.words_of_lost)

        rerouting.offers, rerouting.open_place = averager.offers, open_place
        rerouting.trained = lambda: averager.trained
        rerouting.lost = lambda lost: self._store.set(_LOST, str(lost))
        self._known = self._doors()
        threading.Thread(target=self._follow_doors, daemon=True, name="noflush: doors").start()
        averager.doors, averager.round_begun = lambda: self._known, rerouting.begin_round
        gas = engine.pipeline_stage.schedule.gas
        averager.guest_samples = lambda: rerouting.guests.micro_batches * engine.train_batch_size() // gas

    def come_back(self) -> None:
        """Goes on as the stage that this group has lost; before training. Raises ConnectionError."""
        from noflush.replicas.come_back import ComeBack
        from noflush.replicas.state import put
        from noflush.replicas.true_weights import TrueWeights

        engine, stage = self._engine, self._engine.pipeline_stage
        patience = _ROUNDS * self._config.timeout_s
        coming = ComeBack(stage, self._group.key, self._doors(), patience)
        found = coming.ask()
        put(stage, TrueWeights(stage.weights, stage.ring), engine.lr_scheduler, found)
        engine.global_steps = coming.begin(found[1]["specs"])
        engine.global_samples = engine.global_steps * engine.train_batch_size()
        self._group.begin_averaging()
        self._group.averager.born(found)
        self._group.averager.come_back(coming.trained)

    def micro_batches_given(self) -> int:
        """How many of the group's micro-batches its first stage had drawn before those that this process reads."""
        now = self._engine.global_steps * self._engine.pipeline_stage.schedule.gas
        if not is_alone():
            if self._engine.is_first_stage():
                self._store.set(_SAMPLES_FROM, str(now))
            return 0
        return int(now - int(self._store.get(_SAMPLES_FROM)))

    def whole(self, what: str) -> bool:
        """Whether ``what``, which needs every stage, can be done; all ranks are answered alike.

        Not once a stage has been lost: it comes back to the pipeline, but not to the world in which ranks wait for each
        other.
        """
        if is_alone():
            return False
        now = "lost" if self._store.check([_LOST]) else "whole"
        agreed = self._store.compare_set(f"noflush/{what}/{self._engine.global_steps}", "", now)
        whole = bool(agreed.decode() == "whole")
        if not whole and what not in self._said:
            self._said.add(what)
            self._engine.say(
                f"groups: no {what} from here on, for a stage of this group's world is lost; other groups have theirs"
            )
        return whole

    def close(self) -> None:
        """Serves nobody any more."""
        if self.rerouting is not None:
            self.rerouting.close()
