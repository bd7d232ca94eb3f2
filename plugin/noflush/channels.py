"""Messages between neighbouring stages: non-blocking sends, receives posted ahead into buffers of their own.

Each pair of neighbours has three process groups of two ranks: activations down, gradients up, and control down
(small CPU messages). Traffic of one kind never waits behind another, on gloo or on NCCL, where all messages of
a group share one stream.

Two facts shape this file. A gloo `Work.is_completed()` stays False until somebody waits, so a finished send
cannot be found by asking: sends are *retired by protocol*, when a later message proves that the peer has
consumed them. And a gloo transfer starts only when its receive is posted: hence receives are posted ahead,
across calls, so that a slow link's latency is not paid at every call.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from noflush import last_words
from noflush.blame import Words
from noflush.last_words import PeerError

__all__ = ["ControlIn", "ControlOut", "Inbox", "Neighbours", "Outbox", "PayloadSpec", "Peer", "PeerError", "TensorSpec"]
_CONTROL_WORDS = 64
_DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.bool,
    torch.complex64,
    torch.complex128,
)


@dataclass(frozen=True)
class TensorSpec:
    """What both ends of a link agreed a tensor to be; ``differentiable`` ones send a gradient back."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    differentiable: bool

    @classmethod
    def of(cls, tensor: Tensor) -> TensorSpec:
        """The spec of a stage's output tensor."""
        return cls(tuple(tensor.shape), tensor.dtype, tensor.requires_grad)

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        return f"{kind}{list(self.shape)}{'' if self.differentiable else ' without gradient'}"


@dataclass(frozen=True)
class PayloadSpec:
    """What a stage hands to the next one: one tensor, or a tuple of any number of them."""

    tensors: tuple[TensorSpec, ...]
    is_tuple: bool

    @classmethod
    def of(cls, outputs: Tensor | tuple[Tensor, ...]) -> PayloadSpec:
        """The spec of a stage's outputs."""
        if isinstance(outputs, Tensor):
            return cls((TensorSpec.of(outputs),), False)
        return cls(tuple(TensorSpec.of(t) for t in outputs), True)

    def __str__(self) -> str:
        words = ", ".join(map(str, self.tensors))
        return f"({words})" if self.is_tuple else words

    def gradients(self) -> tuple[TensorSpec, ...]:
        """Specs of the gradients that come back, in order."""
        return tuple(spec for spec in self.tensors if spec.differentiable)

    def to_words(self) -> list[int]:
        """The spec as integers, for the control channel."""
        words = [int(self.is_tuple), len(self.tensors)]
        for spec in self.tensors:
            words += [_DTYPES.index(spec.dtype), int(spec.differentiable), len(spec.shape), *spec.shape]
        return words

    @classmethod
    def from_words(cls, words: Sequence[int]) -> PayloadSpec:
        """The inverse of `to_words`; trailing words are ignored."""
        is_tuple, count = bool(words[0]), words[1]
        at, specs = 2, []
        for _ in range(count):
            dtype, differentiable, ndim = words[at : at + 3]
            shape = tuple(words[at + 3 : at + 3 + ndim])
            specs.append(TensorSpec(shape, _DTYPES[dtype], bool(differentiable)))
            at += 3 + ndim
        return cls(tuple(specs), is_tuple)


class Attention:
    """How long this rank has not listened to its neighbours, which wait ``timeout_s`` for it."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._last = time.monotonic()
        self._away = self._back = -math.inf

    def turn(self) -> float:
        """A wait begins; returns the time."""
        now = time.monotonic()
        if now - self._last > self._timeout_s:
            self._away, self._back = now - self._last, now
        return now

    def met(self) -> None:
        """A wait has ended well."""
        self._last = time.monotonic()

    def absence(self) -> float:
        """Seconds of the newest absence that was too long, if it was just now; else 0.

        What had arrived before neighbours gave up can still be read after it, so "just now" is no single wait.
        """
        return self._away if time.monotonic() - self._back < self._timeout_s else 0.0


@dataclass(frozen=True)
class Peer:
    """The far end of a channel: its stage and global rank, and those at this end (for errors)."""

    group: dist.ProcessGroup
    rank: int
    stage: int
    own_rank: int
    own_stage: int
    timeout_s: float
    attention: Attention


def _as_bytes_if_bool(tensor: Tensor) -> Tensor:
    # NCCL has no bool; a byte view costs nothing.
    return tensor.view(torch.uint8) if tensor.dtype is torch.bool else tensor


def _await(work: dist.Work, peer: Peer, what: str) -> None:
    start = peer.attention.turn()
    try:
        if dist.get_backend(peer.group) == "gloo":
            work.wait(timedelta(seconds=peer.timeout_s))
        else:
            work.wait()  # orders the device's stream; NCCL's own watchdog holds the group's timeout
    except RuntimeError as error:
        raise _lost(peer, what, error, start) from error
    peer.attention.met()


def _lost(peer: Peer, what: str, error: RuntimeError, start: float) -> PeerError:
    """The error of a connection that failed: says so to the others first, and says whose fault it is."""
    silent, absent = last_words.ran_out(error), peer.attention.absence()
    waited = time.monotonic() - start
    own = Words(
        peer.own_rank,
        lost=peer.rank,
        how="silent" if silent else "closed",
        seconds=waited if silent else absent,
        absent=absent > 0,
    )
    verdict = last_words.leave(own)
    saw = f"It sent nothing for {peer.timeout_s:g} s (async_pipeline.peer_timeout_s). " if silent else ""
    where = "" if verdict.accused is None else "there and "
    return PeerError(
        f"stage {peer.own_stage} gave up {what} stage {peer.stage} (rank {peer.rank}): {_first_line(error)}. {saw}"
        f"{verdict.sentence[0].upper()}{verdict.sentence[1:]}. Look {where}in its log first, then resume from the "
        "newest checkpoint"
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class Outbox:
    """The sending end of one channel. Holds what it sent until `retire` says that the peer has it.

    ``sent`` counts the messages ever sent.
    """

    def __init__(self, peer: Peer, kind: str) -> None:
        self._peer = peer
        self._kind = kind
        self._open: deque[tuple[int, list[Tensor], list[dist.Work]]] = deque()
        self.sent = 0

    @property
    def open_sends(self) -> int:
        """Messages sent and not yet retired."""
        return len(self._open)

    def send(self, index: int, tensors: Sequence[Tensor]) -> None:
        """Starts sending message ``index``; the tensors must not be written until it is retired."""
        payload = [_as_bytes_if_bool(t.detach().contiguous()) for t in tensors]
        try:
            works = [dist.isend(t, dst=self._peer.rank, group=self._peer.group) for t in payload if t.numel()]
        except RuntimeError as error:
            raise _lost(self._peer, f"sending {self._kind} {index} to", error, time.monotonic()) from error
        self._open.append((index, payload, [w for w in works if w is not None]))
        self.sent += 1

    def retire(self, up_to: int) -> None:
        """Forgets messages with index <= ``up_to``, which the peer is known to have consumed."""
        while self._open and self._open[0][0] <= up_to:
            index, _, works = self._open.popleft()
            for work in works:
                _await(work, self._peer, f"sending {self._kind} {index} to")


class Inbox:
    """The receiving end of one channel: messages 0, 1, 2, ... in order, receives posted ahead.

    Args:
        ahead: how many receives are kept posted, at least 1.
        device: where messages are received.
    """

    def __init__(self, peer: Peer, kind: str, ahead: int, device: torch.device) -> None:
        self._peer = peer
        self._kind = kind
        self._ahead = ahead
        self._device = device
        self._posted: deque[tuple[int, list[Tensor], list[dist.Work]]] = deque()
        self._next = 0

    @property
    def posted(self) -> int:
        """Receives that wait for their message."""
        return len(self._posted)

    def take(self, index: int, specs: Sequence[TensorSpec], limit: int | None = None) -> list[Tensor]:
        """Message ``index``; blocks until it is here. ``specs`` also shapes the receives posted ahead of it.

        ``limit``: no receive is posted for messages from ``limit`` on (None: no limit). Raises PeerError.
        """
        self.post(specs, max(index + 1, limit) if limit is not None else None, at_least=1)
        received, tensors, works = self._posted.popleft()
        if received != index:
            raise PeerError(f"stage {self._peer.own_stage} expected {self._kind} {index} but {received} is next")
        for work in works:
            _await(work, self._peer, f"waiting for {self._kind} {index} from")
        self.post(specs, limit)
        return tensors

    def post(self, specs: Sequence[TensorSpec], limit: int | None = None, at_least: int = 0) -> None:
        """Posts receives until ``ahead`` are waiting or ``limit`` is reached."""
        while len(self._posted) < max(self._ahead, at_least) and (limit is None or self._next < limit):
            tensors = [torch.empty(spec.shape, dtype=spec.dtype, device=self._device) for spec in specs]
            works = []
            for tensor in tensors:
                if tensor.numel():
                    work = self._irecv(_as_bytes_if_bool(tensor))
                    assert work is not None
                    works.append(work)
            self._posted.append((self._next, tensors, works))
            self._next += 1

    def _irecv(self, buffer: Tensor) -> dist.Work | None:
        try:
            return dist.irecv(buffer, src=self._peer.rank, group=self._peer.group)
        except RuntimeError as error:
            # Gloo refuses a receive where the connection is known to be broken.
            raise _lost(self._peer, f"asking for {self._kind} {self._next} of", error, time.monotonic()) from error


_CONTROL = (TensorSpec((_CONTROL_WORDS,), torch.int64, False),)


class ControlOut:
    """Sends lists of integers down the pipeline, in messages of one fixed size."""

    def __init__(self, peer: Peer) -> None:
        self._outbox = Outbox(peer, "control message before activation")

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
    """Receives what a `ControlOut` sends."""

    def __init__(self, peer: Peer) -> None:
        self._inbox = Inbox(peer, "control message", ahead=1, device=torch.device("cpu"))
        self._received = 0

    def take(self) -> list[int]:
        """The next list of integers; blocks until it is here."""
        words: list[int] = []
        while not words or len(words) < words[0] + 1:
            (message,) = self._inbox.take(self._received, _CONTROL)
            self._received += 1
            words += message.tolist()
        return words[1 : words[0] + 1]


@dataclass
class Neighbours:
    """Every channel of one stage; None where there is no neighbour."""

    activations_out: Outbox | None = None
    activations_in: Inbox | None = None
    gradients_out: Outbox | None = None
    gradients_in: Inbox | None = None
    control_out: ControlOut | None = None
    control_in: ControlIn | None = None

    @property
    def open_sends(self) -> int:
        """Messages of all channels sent and not yet retired."""
        return sum(c.open_sends for c in (self.activations_out, self.gradients_out, self.control_out) if c)


def connect(
    pipelines: Sequence[Sequence[int]],
    rank: int,
    ahead: Sequence[int],
    device: torch.device,
    timeout_s: float,
) -> Neighbours:
    """Makes the groups of every pipeline (all ranks must call this alike) and this rank's channels.

    Args:
        pipelines: global ranks of each pipeline's stages, in stage order; the same on every rank.
        rank: this process.
        ahead: for each link s -> s+1, receives to keep posted.
        device: where activations and gradients live.
        timeout_s: how long a wait may last.
    """
    neighbours = Neighbours()
    patience, attention = timedelta(seconds=timeout_s), Attention(timeout_s)
    for ranks in pipelines:
        for s in range(len(ranks) - 1):
            pair = [ranks[s], ranks[s + 1]]
            down = dist.new_group(pair, timeout=patience)
            up = dist.new_group(pair, timeout=patience)
            control = dist.new_group(pair, timeout=patience, backend="gloo")
            far = partial(Peer, own_rank=rank, timeout_s=timeout_s, attention=attention)
            if rank == pair[0]:
                below = partial(far, rank=pair[1], stage=s + 1, own_stage=s)
                neighbours.activations_out = Outbox(below(down), "activation")
                neighbours.gradients_in = Inbox(below(up), "gradient", ahead[s], device)
                neighbours.control_out = ControlOut(below(control))
            elif rank == pair[1]:
                above = partial(far, rank=pair[0], stage=s, own_stage=s + 1)
                neighbours.activations_in = Inbox(above(down), "activation", ahead[s], device)
                neighbours.gradients_out = Outbox(above(up), "gradient")
                neighbours.control_in = ControlIn(above(control))
    return neighbours
