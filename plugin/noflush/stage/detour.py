"""Channels that go round a stage that has died: as `channels` has them, and by its link's lines once it is gone.

Direct messages are torch.distributed's; a closed connection is noticed at once, a peer that stands still is not
detoured (its neighbours give up after ``peer_timeout_s``, as without detours).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from noflush.stage.channels import ControlIn, ControlOut, Inbox, Outbox
from noflush.stage.link import CONTROL, Line, Link
from noflush.stage.messages import Header, StageFigures, TensorSpec
from noflush.stage.peer import Peer, wait_for


class DetourOutbox(Outbox):
    """An `Outbox` whose messages take the link's way."""

    def __init__(self, peer: Peer, kind: str, device: torch.device, link: Link) -> None:
        super().__init__(peer, kind, device)
        self._link, self._name = link, kind
        link.keepers.append(self)

    def _start(self, index: int, payload: list[Tensor]) -> None:
        with self._link.lock:
            sent = self.sent
            self._link.directly(lambda: super(DetourOutbox, self)._start(index, payload))
            if self.sent == sent:
                self._open.append((index, payload, []))
                self.sent += 1
                if (line := self._link.line_for(index)) is not None:
                    line.send(self._name, index, payload)

    def send_kept(self, first: int, end: int, line: Line) -> None:
        """As `SendsByLines`."""
        for index, payload in self.untaken(first):
            if index < end:
                line.send(self._name, index, payload)

    def retire(self, up_to: int) -> None:
        """As `Outbox.retire`; that the peer is gone is for the next receive to find."""
        while True:
            with self._link.lock:
                if not self._open or self._open[0][0] > up_to:
                    return
                index, _, works = self._open.popleft()
            for work in works:
                self._link.directly(partial(wait_for, work, self._peer, f"sending {self._name} {index} to"))


class DetourInbox(Inbox):
    """An `Inbox` whose messages take the link's way."""

    def __init__(self, peer: Peer, kind: str, device: torch.device, link: Link) -> None:
        super().__init__(peer, kind, device)
        self._link, self._name = link, kind
        self._specs: dict[int, Sequence[TensorSpec]] = {}

    def post(self, specs: Sequence[TensorSpec]) -> None:
        """As `Inbox.post`; by a line nothing need be posted."""
        following = self.next_to_post + 1
        self._specs[self.next_to_post] = specs
        self._link.directly(lambda: super(DetourInbox, self).post(specs))
        self.next_to_post = following

    def renumber(self, following: int) -> None:
        """As `Inbox.renumber`."""
        super().renumber(following)
        self._link.expect(following)

    def take(self, index: int) -> list[Tensor]:
        """As `Inbox.take`."""
        specs = self._specs.pop(index)
        direct = self._link.take_directly(self._name, index, lambda: super(DetourInbox, self).take(index))
        if direct is not None:
            return direct
        tensors = self._link.take(self._name, index)[0]
        return [as_model(t.to(self._device), spec) for t, spec in zip(tensors, specs, strict=True)]


def as_model(tensor: Tensor, spec: TensorSpec) -> Tensor:
    """What `as_wire` made of a tensor like ``spec``, back."""
    return tensor if tensor.dtype == spec.dtype else tensor.view(spec.dtype).reshape(spec.shape)


class DetourControlOut(ControlOut):
    """A `ControlOut` whose messages take the link's way."""

    def __init__(self, peer: Peer, link: Link) -> None:
        super().__init__(peer)
        self._link = link
        self._kept: deque[tuple[int, list[int]]] = deque()
        link.keepers.insert(0, self)

    def send(self, words: Sequence[int], before: int) -> None:
        """As `ControlOut.send`."""
        with self._link.lock:
            self._kept.append((before, list(words)))
            self._link.directly(lambda: super(DetourControlOut, self).send(words, before))
            if (line := self._link.line_for(before)) is not None:
                line.send(CONTROL, before, words=words)

    def send_kept(self, first: int, end: int, line: Line) -> None:
        """As `SendsByLines`; also those before ``first``, of which a stage behind may not have heard."""
        for before, words in self._kept:
            if before < end:
                line.send(CONTROL, before, words=words)

    def retire(self, activation: int) -> None:
        """As `ControlOut.retire`."""
        with self._link.lock:
            while self._kept and self._kept[0][0] <= activation:
                self._kept.popleft()
        self._link.directly(lambda: super(DetourControlOut, self).retire(activation))


class DetourControlIn(ControlIn):
    """A `ControlIn` whose messages take the link's way."""

    def __init__(self, peer: Peer, link: Link) -> None:
        self._link = link
        if link.direct:
            super().__init__(peer)

    def take(self, before: int) -> list[int]:
        """As `ControlIn.take`."""
        direct = self._link.take_directly(CONTROL, before, lambda: super(DetourControlIn, self).take(before))
        if direct is not None:
            return direct
        return _with_lost_stage(self._link.take(CONTROL, before)[1], self._link.peer.own_stage)


def _with_lost_stage(words: Sequence[int], stages_before: int) -> list[int]:
    """A header that one who stands in has passed on as it was: with figures of the stage that is lost, of nothing."""
    header = Header.read(words)
    missing = stages_before - len(header.notices.figures)
    figures = header.notices.figures + (StageFigures(0, 0),) * missing
    return replace(header, notices=replace(header.notices, figures=figures)).words()
