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

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.grad_mode import _unsafe_preserve_version_counter
from torch.nn import Parameter
from torch.optim import Optimizer

# Bytes. Matrix kernels may choose another code path for another alignment; torch's own allocator gives 64.
_ALIGNMENT = 64


class WeightVersionError(RuntimeError):
    """A backward would have seen other weights than its forward: a fault of the engine, never of the user."""


@dataclass
class _Slot:
    """One version's storage: the flat buffers (one a dtype and device) and each parameter's view into them."""

    flats: list[Tensor]
    views: list[Tensor]
    version: int | None = None


class WeightRing:
    """The live weight versions of one stage.

    Args:
        params: the trainable parameters, each of any shape and dtype; their values become version ``first``.
            From here on ``param.data`` is a view into a slot.
        slots: how many versions may live at once, the newest included (`Schedule.versions_alive`).
        stash: False for the policy ``latest``: one slot, written in place, and a backward sees what is there.
        first: number of the version the parameters hold now.
    """

    def __init__(self, params: Iterable[Parameter], slots: int, stash: bool = True, first: int = 0) -> None:
        self.params = list(params)
        self.stash = stash
        self.newest = first
        self._bound = first
        self._tags: dict[int, int] = {}
        self._slots = [self._make_slot() for _ in range(slots)]
        self._where = {first: self._slots[0]}
        self._slots[0].version = first
        with torch.no_grad():
            for param, view in zip(self.params, self._slots[0].views, strict=True):
                view.copy_(param.data)
                param.data = view

    def _make_slot(self) -> _Slot:
        groups: dict[tuple[torch.dtype, torch.device], list[int]] = {}
        for i, param in enumerate(self.params):
            groups.setdefault((param.dtype, param.device), []).append(i)
        views: dict[int, Tensor] = {}
        flats = []
        for (dtype, device), members in groups.items():
            unit = max(1, _ALIGNMENT // dtype.itemsize)
            offsets, total = [], 0
            for i in members:
                offsets.append(total)
                total += -(-self.params[i].numel() // unit) * unit
            flat = torch.zeros(max(total, 1), dtype=dtype, device=device)
            flats.append(flat)
            for i, offset in zip(members, offsets, strict=True):
                views[i] = flat[offset : offset + self.params[i].numel()].view(self.params[i].shape)
        return _Slot(flats, [views[i] for i in range(len(self.params))])

    @property
    def slots(self) -> int:
        """How many versions can live at once."""
        return len(self._slots)

    @property
    def device(self) -> torch.device:
        """Where the stage's weights live (cpu for a stage without any)."""
        return self.params[0].device if self.params else torch.device("cpu")

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
            param.data = view
        self._bound = version

    def bind_newest(self) -> None:
        """Points every parameter at the newest version: what user code sees between calls."""
        self.bind(self.newest)

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

    def update(self, optimizer: Optimizer) -> None:
        """Makes the next version out of the newest one and the gradients, and binds it.

        An optimizer with ``step_into(targets)`` writes the next weights into the slot itself; any other one
        gets a copy of the newest weights there and updates it in place. Raises WeightVersionError if every
        slot is still needed.
        """
        self.bind_newest()
        current = self._where[self.newest]
        target = self._free_slot()
        step_into = getattr(optimizer, "step_into", None)
        if step_into is not None:
            step_into(dict(zip(self.params, target.views, strict=True)))
        if target is not current:
            if step_into is None:
                for old, new in zip(current.flats, target.flats, strict=True):
                    new.copy_(old)
            for param, view in zip(self.params, target.views, strict=True):
                param.data = view
        if step_into is None:
            # In-place writes to a parameter would make autograd refuse the older micro-batches in flight.
            with _unsafe_preserve_version_counter(tuple(self.params)):
                optimizer.step()
        if target.version is not None:
            del self._where[target.version]
        self.newest += 1
        self._bound = self.newest
        target.version = self.newest
        self._where[self.newest] = target

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

    def _slot_of(self, version: int) -> _Slot:
        slot = self._where.get(version)
        if slot is None or slot.version != version:
            raise WeightVersionError(f"weight version {version} was overwritten; alive: {sorted(self._where)}")
        return slot

    def _free_slot(self) -> _Slot:
        needed = set(self._tags.values()) if self.stash else set()
        current = self._where[self.newest]
        for slot in self._slots:
            if slot is not current and slot.version not in needed:
                return slot
        if self.newest in needed:
            raise WeightVersionError(
                f"no free slot for version {self.newest + 1}: micro-batches in flight need {sorted(needed)} and there "
                f"are {len(self._slots)} slots"
            )
        return current
