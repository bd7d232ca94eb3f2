"""Weight versions: the only file that touches parameter storage.

Every live version of a stage's weights has a flat storage of its own, a *slot*. A forward points ``param.data``
at the version its schedule names and tags the micro-batch with it; the backward points it there again; the
update writes the next version straight into a free slot. Nothing is copied in the steady state (an optimizer
that only updates in place costs one copy an update), nothing is recomputed, and gradients are exactly those of
the tagged weights.

The trap: neither ``param.data = ...`` nor a write through another alias moves autograd's version counter, so a
missed swap would be a silent wrong gradient. Hence `check`: at every backward it compares where each parameter
really points with where its micro-batch's version lies.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.nn import Parameter
from torch.optim import Optimizer

from noflush.stage.layout import FlatLayout, WeightVersionError


@dataclass
class _Slot:
    """One version's storage: a flat tensor a layout, and each parameter's view into it."""

    flats: list[Tensor]
    views: list[Tensor]
    version: int | None = None


def point(param: Parameter, at: Tensor) -> None:
    """Points ``param`` at the storage ``at``, of its shape and dtype."""
    param.data = at


class WeightRing:
    """The live weight versions of one stage.

    Args:
        layouts: the trainable parameters, laid out; their values become version ``first``. From here on
            ``param.data`` is a view into a slot.
        slots: how many versions may live at once, the newest included (`Schedule.versions_alive`).
        stash: False for the policy ``latest``: one slot, written in place, and a backward sees what is there.
        first: number of the version the parameters hold now.
        home: flat tensors that the parameters lie in already (a flat a layout), to be the first slot.
        device: where the stage computes; of a stage without weights nothing else says so.
    """

    def __init__(
        self,
        layouts: Sequence[FlatLayout],
        slots: int,
        stash: bool = True,
        first: int = 0,
        home: Sequence[Tensor] | None = None,
        device: torch.device | None = None,
    ) -> None:
        self._device = device or torch.device("cpu")
        self.layouts = list(layouts)
        self.params = [param for layout in self.layouts for param in layout.params]
        self.stash = stash
        self.newest = first
        self._bound = first
        self._tags: dict[int, int] = {}
        self._slots = [self._make_slot(home if i == 0 else None) for i in range(slots)]
        self._where = {first: self._slots[0]}
        self._slots[0].version = first
        self._next: _Slot | None = None
        with torch.no_grad():
            for param, view in zip(self.params, self._slots[0].views, strict=True):
                if home is None:
                    view.copy_(param.data)
                point(param, view)

    def _make_slot(self, flats: Sequence[Tensor] | None) -> _Slot:
        flats = list(flats) if flats is not None else [layout.new_flat() for layout in self.layouts]
        return _Slot(flats, [v for layout, flat in zip(self.layouts, flats, strict=True) for v in layout.views(flat)])

    @property
    def newest_flats(self) -> list[Tensor]:
        """The newest version's flat tensors, one a layout."""
        return self._where[self.newest].flats

    @property
    def slots(self) -> int:
        """How many versions can live at once."""
        return len(self._slots)

    def grow(self, slots: int) -> None:
        """Makes room for ``slots`` versions at once; never less than there was."""
        while len(self._slots) < slots:
            self._slots.append(self._make_slot(None))

    @property
    def device(self) -> torch.device:
        """Where the stage's weights live, or would."""
        return self.params[0].device if self.params else self._device

    @property
    def in_flight(self) -> Mapping[int, int]:
        """Version of every micro-batch whose backward is still to come."""
        return self._tags

    @property
    def nbytes(self) -> int:
        """Bytes of all slots together."""
        return sum(flat.numel() * flat.element_size() for slot in self._slots for flat in slot.flats)

    def bind(self, version: int) -> None:
        """Points every parameter at ``version``. Raises WeightVersionError if that version is gone."""
        if version == self._bound:
            return
        slot = self._slot_of(version)
        for param, view in zip(self.params, slot.views, strict=True):
            point(param, view)
        self._bound = version

    def flats_of(self, version: int) -> list[Tensor]:
        """The flat tensors of ``version``, one a layout. Raises WeightVersionError if that version is gone."""
        return self._slot_of(version).flats

    def bind_newest(self) -> None:
        """Points every parameter at the newest version: what user code sees between calls."""
        self.bind(self.newest)

    @contextmanager
    def showing(self, flats: Sequence[Tensor]) -> Iterator[None]:
        """Within, every parameter points into ``flats``, laid out as the versions are; then at the newest again."""
        views = (v for layout, flat in zip(self.layouts, flats, strict=True) for v in layout.views(flat))
        for param, view in zip(self.params, views, strict=True):
            point(param, view)
        self._bound = -1
        try:
            yield
        finally:
            self.bind_newest()

    def tag(self, micro_batch: int, version: int) -> None:
        """Binds ``version`` for a forward and keeps it until `release` of that micro-batch."""
        self.bind(version if self.stash else self.newest)
        self._tags[micro_batch] = version

    def bind_for_backward(self, micro_batch: int) -> None:
        """Binds the version the micro-batch's forward used (with ``latest``: the live one)."""
        self.bind(self._tags[micro_batch] if self.stash else self.newest)

    def check(self, micro_batch: int) -> None:
        """Raises WeightVersionError unless every parameter lies where the micro-batch's version lies."""
        version = self._tags[micro_batch] if self.stash else self.newest
        slot = self._slot_of(version)
        for i, (param, view) in enumerate(zip(self.params, slot.views, strict=True)):
            if param.data_ptr() != view.data_ptr():
                raise WeightVersionError(
                    f"backward of micro-batch {micro_batch} needs weight version {version}, but parameter {i} of shape "
                    f"{tuple(param.shape)} points elsewhere (bound: version {self._bound}, newest: {self.newest}): "
                    "its gradient would be silently wrong. Something moved param.data between forward and backward."
                )

    def release(self, micro_batch: int) -> None:
        """The micro-batch's backward is done: its version may be overwritten once no other needs it."""
        del self._tags[micro_batch]

    def begin_update(self) -> list[Tensor]:
        """Binds the newest version and returns the flat tensors where the next one goes; `commit_update` follows.

        With the policy ``latest`` they are the newest version's own. Raises WeightVersionError if every slot is
        still needed.
        """
        self.bind_newest()
        self._next = self._free_slot()
        return self._next.flats

    def commit_update(self) -> None:
        """What was written since `begin_update` is the newest version; binds it."""
        target, self._next = self._next, None
        assert target is not None
        if target.version is not None:
            del self._where[target.version]
        self.newest += 1
        target.version = self.newest
        self._where[self.newest] = target
        self.bind_newest()

    def update_in_place(self, optimizer: Optimizer, skip: bool) -> None:
        """The next version through an optimizer that knows nothing of versions: a copy, and a step there.

        ``skip`` leaves out the step.
        """
        newest = self.newest_flats
        following = self.begin_update()
        if following is not newest:
            for old, new in zip(newest, following, strict=True):
                new.copy_(old)
        self.commit_update()
        if not skip:
            # In-place writes to a parameter would make autograd refuse the older micro-batches in flight.
            with _unsafe_preserve_version_counter(tuple(self.params)):
                optimizer.step()

    @torch.no_grad()
    def go_home(self) -> None:
        """Moves the newest version into the first slot, which others (checkpoints, say) hold views of."""
        if self._tags:
            raise WeightVersionError(f"micro-batches {sorted(self._tags)} are in flight: drain first")
        first, slot = self._slots[0], self._where[self.newest]
        if slot is not first:
            for old, new in zip(slot.flats, first.flats, strict=True):
                new.copy_(old)
            slot.version = None
        first.version = self.newest
        self._where = {self.newest: first}
        for other in self._slots[1:]:
            other.version = None
        self._bound = -1
        self.bind_newest()

    def restart(self, first: int) -> None:
        """Renumbers the newest version ``first``, after a checkpoint was loaded into the parameters."""
        if self._tags:
            raise WeightVersionError(f"micro-batches {sorted(self._tags)} are in flight: drain first")
        self.bind_newest()
        slot = self._where[self.newest]
        for other in self._slots:
            other.version = None
        slot.version = first
        self._where = {first: slot}
        self.newest = self._bound = first

    def snapshot(self, also: Iterable[int], with_newest: bool) -> dict[str, Any]:
        """What `resume` takes: the numbers, and the versions that are still needed.

        Args:
            also: versions that are needed besides those of backwards to come.
            with_newest: the newest version too, which a checkpoint has unless it is not the true weights.
        """
        needed = {*also, *self._tags.values()} - {self.newest}
        return {
            "newest": self.newest,
            "tags": dict(self._tags),
            "versions": {v: self._slot_of(v).flats for v in sorted({*needed, *[self.newest] * with_newest})},
        }

    @torch.no_grad()
    def resume(self, snapshot: dict[str, Any]) -> None:
        """Puts a `snapshot` back; the parameters hold its newest version, and nothing may be in flight."""
        self.restart(snapshot["newest"])
        free = iter([slot for slot in self._slots if slot.version is None])
        for version, flats in snapshot["versions"].items():
            slot = self._where[version] if version == self.newest else next(free)
            for kept, flat in zip(slot.flats, flats, strict=True):
                kept.copy_(flat)
            slot.version = version
            self._where[version] = slot
        self._tags = dict(snapshot["tags"])

    def _slot_of(self, version: int) -> _Slot:
        slot = self._where.get(version)
        if slot is None or slot.version != version:
            raise WeightVersionError(f"weight version {version} was overwritten; alive: {sorted(self._where)}")
        return slot

    def _free_slot(self) -> _Slot:
        needed = set(self._tags.values()) if self.stash else set()
        current = self._where[self.newest]
        free = [slot for slot in self._slots if slot is not current and slot.version not in needed]
        if free:
            # The oldest: what is newer may still be evaluated.
            return min(free, key=lambda slot: -1 if slot.version is None else slot.version)
        if self.newest in needed:
            raise WeightVersionError(
                f"no free slot for version {self.newest + 1}: micro-batches in flight need {sorted(needed)} and there "
                f"are {len(self._slots)} slots"
            )
        return current
