"""Messages between neighbouring stages: non-blocking sends, receives posted into buffers of their own.

Each pair of neighbours has three process groups of two ranks: activations down, gradients up, and control down
(small CPU messages); over NCCL a fourth, for `peer_watch`. Traffic of one kind never waits behind another, on gloo or
on NCCL, where all messages of a group share one stream.

A gloo `Work.is_completed()` stays False until somebody waits, so a finished send cannot be found by asking: sends are
*retired by protocol*, when a later message proves that the peer has consumed them. When receives are posted is decided
in `posting`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from noflush.failure.last_words import PeerError
from noflush.stage.messages import TensorSpec
from noflush.stage.peer import Attention, Peer, lost, wait_for

if TYPE_CHECKING:
    from noflush.stage.link import LinkAbove, LinkBelow

_CONTROL_WORDS = 64
# A stage runs ahead of the next one by some calls, whose headers gloo sends only once their receives are posted: with
# one at a time a header costs a round trip, which on a link full of activations may take longer than the call.
_CONTROL_POSTED = 8


# What NCCL can carry; everything else travels as its bytes, which costs nothing.
NATIVE = {
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16),
    *(torch.uint8, torch.int8, torch.int32, torch.int64),
}


def as_wire(tensor: Tensor) -> Tensor:
    """A contiguous ``tensor`` as it travels: itself or a view of its bytes."""
    return tensor if tensor.dtype in NATIVE else tensor.reshape(-1).view(torch.uint8)


class Outbox:
    """The sending end of one channel. Holds what it sent until `retire` says that the peer has it.

    ``sent`` counts the messages ever sent; ``device`` is where they lie.
    """

    def __init__(self, peer: Peer, kind: str, device: torch.device) -> None:
        self._peer = peer
        self._kind = kind
        self.device = device
        self._open: deque[tuple[int, list[Tensor], list[dist.Work]]] = deque()
        self.sent = 0

    @property
    def peer(self) -> Peer:
        """The far end."""
        return self._peer

    @property
    def open_sends(self) -> int:
        """Messages sent and not yet retired."""
        return len(self._open)

    @contextmanager
    def restarted(self) -> Iterator[None]:
        """Forgets afterwards what was sent."""
        yield
        self.sent = 0

    def send(self, index: int, tensors: Sequence[Tensor]) -> None:
        """Starts sending message ``index``; the tensors must not be written until it is retired."""
        # Conjugated and negated lazily, a tensor has no bytes of its own to show.
        self._start(index, [as_wire(t.detach().resolve_conj().resolve_neg().contiguous()) for t in tensors])

    def _start(self, index: int, payload: list[Tensor]) -> None:
        try:
            works = [dist.isend(t, dst=self._peer.rank, group=self._peer.group) for t in payload if t.numel()]
        except RuntimeError as error:
            raise lost(self._peer, f"sending {self._kind} {index} to", error, time.monotonic()) from error
        self._open.append((index, payload, [w for w in works if w is not None]))
        self.sent += 1

    def send_again(self, index: int, payload: Sequence[Tensor]) -> None:
        """Sends message ``index`` as `untaken` gave it."""
        self._start(index, [t.to(self.device) for t in payload])

    @property
    def newest(self) -> int:
        """Number of the newest message that is not retired; -1 without one."""
        return self._open[-1][0] if self._open else -1

    def untaken(self, first: int) -> list[tuple[int, list[Tensor]]]:
        """(index, tensors as they travel) of the messages from number ``first`` on; they stay."""
        return [(index, payload) for index, payload, _ in self._open if index >= first]

    def retire(self, up_to: int) -> None:
        """Forgets messages with index <= ``up_to``, which the peer is known to have consumed."""
        while self._open and self._open[0][0] <= up_to:
            index, _, works = self._open.popleft()
            for work in works:
                wait_for(work, self._peer, f"sending {self._kind} {index} to")


class Inbox:
    """The receiving end of one channel: messages 0, 1, 2, ... in order, each posted before it is taken.

    Args:
        device: where messages are received. On an accelerator receives are started from a stream of their own, not
            behind the computation that is enqueued already.
    """

    def __init__(self, peer: Peer, kind: str, device: torch.device) -> None:
        self._peer = peer
        self._kind = kind
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._posted: deque[tuple[int, list[Tensor], list[dist.Work]]] = deque()
        self.next_to_post = 0

    @property
    def peer(self) -> Peer:
        """The far end."""
        return self._peer

    @property
    def posted(self) -> int:
        """Receives that wait for their message."""
        return len(self._posted)

    @contextmanager
    def restarted(self) -> Iterator[None]:
        """Counts messages from 0 again afterwards."""
        yield
        self.next_to_post = 0

    def post(self, specs: Sequence[TensorSpec]) -> None:
        """Posts the receive of message `next_to_post`, of tensors like ``specs``."""
        with torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():
            tensors = [torch.empty(spec.shape, dtype=spec.dtype, device=self._device) for spec in specs]
            works = []
            for tensor in tensors:
                if tensor.numel():
                    work = self._irecv(as_wire(tensor))
                    assert work is not None
                    works.append(work)
        self._posted.append((self.next_to_post, tensors, works))
        self.next_to_post += 1

    def posted_specs(self) -> list[list[tuple[tuple[int, ...], torch.dtype]]]:
        """Of every receive that waits for its message the (shape, dtype) of its tensors, as they travel."""
        wires = ([as_wire(t) for t in tensors] for _, tensors, _ in self._posted)
        return [[(tuple(t.shape), t.dtype) for t in tensors] for tensors in wires]

    def renumber(self, following: int) -> None:
        """The next message to be posted has number ``following``; none may be posted."""
        assert not self._posted
        self.next_to_post = following

    def take(self, index: int) -> list[Tensor]:
        """Message ``index``, which was posted; on gloo blocks until it is here. Raises PeerError."""
        if not self._posted or self._posted[0][0] != index:
            posted = f"{self._posted[0][0]} is next" if self._posted else "no receive is posted"
            raise PeerError(f"stage {self._peer.own_stage} expected {self._kind} {index} but {posted}")
        _, tensors, works = self._posted.popleft()
        for work in works:
            wait_for(work, self._peer, f"waiting for {self._kind} {index} from")
        if self._stream is not None:
            for tensor in tensors:  # allocated for one stream, read on another
                tensor.record_stream(torch.cuda.current_stream(self._device))
        return tensors

    def _irecv(self, buffer: Tensor) -> dist.Work | None:
        try:
            return dist.irecv(buffer, src=self._peer.rank, group=self._peer.group)
        except RuntimeError as error:
            # Gloo refuses a receive where the connection is known to be broken.
            raise lost(
                self._peer, f"asking for {self._kind} {self.next_to_post} of", error, time.monotonic()
            ) from error


_CONTROL = (TensorSpec((_CONTROL_WORDS,), torch.int64, False),)


class ControlOut:
    """Sends lists of integers down the pipeline, in messages of one fixed size."""

    def __init__(self, peer: Peer) -> None:
        self._outbox = Outbox(peer, "control message before activation", torch.device("cpu"))

    @property
    def open_sends(self) -> int:
        """Messages sent and not yet retired."""
        return self._outbox.open_sends

    def send(self, words: Sequence[int], before: int) -> None:
        """Sends ``words`` (any number of int64); the peer reads them before activation number ``before``."""
        rest = [len(words), *words]
        while rest:
            chunk, rest = rest[:_CONTROL_WORDS], rest[_CONTROL_WORDS:]
            message = torch.zeros(_CONTROL_WORDS, dtype=torch.int64)
            message[: len(chunk)] = torch.tensor(chunk, dtype=torch.int64)
            self._outbox.send(before, [message])

    def retire(self, activation: int) -> None:
        """The peer has read activation number ``activation``, and so all that was sent before it."""
        self._outbox.retire(activation)


class ControlIn:
    """Receives what a `ControlOut` sends, some messages of which may come before they are taken."""

    def __init__(self, peer: Peer) -> None:
        self._inbox = Inbox(peer, "control message", torch.device("cpu"))
        for _ in range(_CONTROL_POSTED):
            self._inbox.post(_CONTROL)
        self._received = 0

    def take(self, before: int) -> list[int]:
        """The next list of integers, which was sent ``before`` that activation; blocks until it is here."""
        words: list[int] = []
        while not words or len(words) < words[0] + 1:
            (message,) = self._inbox.take(self._received)
            self._inbox.post(_CONTROL)
            self._received += 1
            words += message.tolist()
        return words[1 : words[0] + 1]


@dataclass
class Neighbours:
    """Every channel of one stage; None where there is no neighbour.

    ``watched``: whom `PeerWatch` watches, by gloo groups of its own: the neighbours, and those next in the row of ranks
    that share the stage. None over gloo, which needs no watch. ``attention``: what this rank waits for.
    ``above``, ``below``: what stands for a neighbour that dies; None: nothing does, and its death ends this stage.
    """

    activations_out: Outbox | None = None
    activations_in: Inbox | None = None
    gradients_out: Outbox | None = None
    gradients_in: Inbox | None = None
    control_out: ControlOut | None = None
    control_in: ControlIn | None = None
    watched: tuple[Peer, ...] = ()
    attention: Attention | None = None
    above: LinkAbove | None = None
    below: LinkBelow | None = None

    @property
    def open_sends(self) -> int:
        """Messages of all channels sent and not yet retired."""
        return sum(c.open_sends for c in (self.activations_out, self.gradients_out, self.control_out) if c)

    def flush(self) -> None:
        """Waits until what was sent on detours is on its way."""
        for link in (self.above, self.below):
            if link is not None:
                link.flush()

    def warm_up(self) -> None:
        """Has every pair of ranks open its connections, which each may hold up the CPU: once, before training.

        Link by link down the pipeline, so that no two stages wait for each other.
        """
        first = (TensorSpec((1,), torch.float32, False),)
        for inbox, outbox in ((self.activations_in, self.gradients_out), (self.gradients_in, self.activations_out)):
            if inbox is not None and outbox is not None:
                with inbox.restarted(), outbox.restarted():
                    nothing = [torch.zeros(1, device=outbox.device)]
                    # On either end the channel that leads down comes first.
                    if inbox is self.activations_in:
                        inbox.post(first)
                        outbox.send(0, nothing)
                    else:
                        outbox.send(0, nothing)
                        inbox.post(first)
                    inbox.take(0)
                    outbox.retire(0)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
