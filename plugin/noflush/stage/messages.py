"""All that travels between the stages of a pipeline.

::

    down                                                    up
    before a call   Header: micro-batches, Notices          with a micro-batch's gradients, after a batch's last
    before the      PayloadSpec: what activations are         its report: losses, loss scale, every stage's bubble
    first one                                                 and skipped updates, norms, a request to stop
    then            activations                             gradients

A thing travels one way: counts of skipped updates and norms go up, where the first stage judges and adds them; which
batches were skipped goes down, to the last stage, which owns the loss scale, and the norm of all stages to all. Small
messages (headers, specs) are whole numbers on a channel of their own; a report is a tensor of the gradient message.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Payload = Tensor | tuple[Tensor, ...]

DTYPES = (
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

    @property
    def nbytes(self) -> int:
        """Bytes of such a tensor."""
        return math.prod(self.shape) * self.dtype.itemsize

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        return f"{kind}{list(self.shape)}{'' if self.differentiable else ' without gradient'}"


@dataclass(frozen=True)
class PayloadSpec:
    """What a stage hands to the next one: one tensor, or a tuple of any number of them."""

    tensors: tuple[TensorSpec, ...]
    is_tuple: bool

    @classmethod
    def of(cls, outputs: Payload) -> PayloadSpec:
        """The spec of a stage's outputs, which `payloads.check_outputs` let pass."""
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
            words += [DTYPES.index(spec.dtype), int(spec.differentiable), len(spec.shape), *spec.shape]
        return words

    @classmethod
    def from_words(cls, words: Sequence[int]) -> PayloadSpec:
        """The inverse of `to_words`; trailing words are ignored."""
        is_tuple, count = bool(words[0]), words[1]
        at, specs = 2, []
        for _ in range(count):
            dtype, differentiable, ndim = words[at : at + 3]
            shape = tuple(words[at + 3 : at + 3 + ndim])
            specs.append(TensorSpec(shape, DTYPES[dtype], bool(differentiable)))
            at += 3 + ndim
        return cls(tuple(specs), is_tuple)


@dataclass(frozen=True)
class StageFigures:
    """One stage's figures as it knew them when it opened a call.

    Attributes:
        busy_ns: nanoseconds of compute since the run began.
        spent_ns: nanoseconds in `train_batch` since the run began.
    """

    busy_ns: int
    spent_ns: int

    WORDS = 2

    def words(self) -> list[int]:
        """Whole numbers that a header can carry."""
        return [self.busy_ns, self.spent_ns]

    @classmethod
    def read(cls, words: Sequence[int]) -> tuple[StageFigures, ...]:
        """The figures of several stages from their words, one after the other."""
        return tuple(cls(*words[at : at + cls.WORDS]) for at in range(0, len(words), cls.WORDS))


@dataclass(frozen=True)
class BatchNorm:
    """A gradient norm over all stages, unscaled and before clipping, and the call (from 1) whose batch it is of."""

    step: int
    norm: float


_NO_NORM = BatchNorm(0, 0.0)


@dataclass(frozen=True)
class Notices:
    """What stages tell those behind them with a call's header.

    Attributes:
        skipped: batches that some stage so far skipped for gradients that are not finite, newly learnt.
        stopped_by: the stage for whose sake the first one ends the run, and its updates skipped in a row; or None.
        stop_requested: whether a rank of the first stage knows that somebody asked for a stop.
        norm: over all stages, the newest that the first one knows; or None.
        figures: of the stages so far, in order.
    """

    skipped: tuple[int, ...] = ()
    stopped_by: tuple[int, int] | None = None
    stop_requested: bool = False
    norm: BatchNorm | None = None
    figures: tuple[StageFigures, ...] = ()


@dataclass(frozen=True)
class Header:
    """What opens a call, from stage to stage down the pipeline.

    Attributes:
        pulled: micro-batches that the first stage has for it.
        ready: whether those are enough, on every replica.
        notices: what there is to tell besides.
    """

    pulled: int
    ready: bool
    notices: Notices = Notices()

    def words(self) -> list[int]:
        """Whole numbers for the control channel."""
        stage, count = self.notices.stopped_by or (0, 0)
        figures = [word for of_stage in self.notices.figures for word in of_stage.words()]
        norm = self.notices.norm or _NO_NORM
        (bits,) = struct.unpack("<q", struct.pack("<d", norm.norm))
        return [
            *(self.pulled, int(self.ready), stage, count, int(self.notices.stop_requested), norm.step, bits),
            len(figures),
            *figures,
            *self.notices.skipped,
        ]

    @classmethod
    def read(cls, words: Sequence[int]) -> Header:
        """The inverse of `words`."""
        pulled, ready, stage, in_a_row, stop, step, bits, count, *rest = words
        (norm,) = struct.unpack("<d", struct.pack("<q", bits))
        stopped_by = (stage, in_a_row) if in_a_row else None
        told = BatchNorm(step, norm) if step else None
        notices = Notices(tuple(rest[count:]), stopped_by, bool(stop), told, StageFigures.read(rest[:count]))
        return cls(pulled, bool(ready), notices)


@dataclass(frozen=True)
class ReportLayout:
    """Positions in a report, a vector of float64 on its way up.

    Attributes:
        losses: the batch's mean loss and the module's additional losses.
        stages: pipeline stages.
    """

    losses: int
    stages: int

    @property
    def words(self) -> int:
        """Length of the vector."""
        return self.losses + 3 * self.stages + 3

    @property
    def bubbles(self) -> slice:
        """Every stage's bubble fraction as last measured."""
        return slice(self.losses, self.losses + self.stages)

    @property
    def skipped(self) -> slice:
        """Every stage's updates skipped so far."""
        return slice(self.losses + self.stages, self.losses + 2 * self.stages)

    @property
    def in_a_row(self) -> slice:
        """Every stage's newest updates skipped without a break."""
        return slice(self.losses + 2 * self.stages, self.losses + 3 * self.stages)

    @property
    def stop(self) -> int:
        """1.0 if a stage so far was asked to stop, else nan."""
        return self.words - 3

    @property
    def scale(self) -> int:
        """The loss scale the batch's gradients carry."""
        return self.words - 2

    @property
    def squares(self) -> int:
        """Sum of the squared gradient norms of the batch before, of the stages so far."""
        return self.words - 1


class BatchReports:
    """One stage's side of the reports: what it adds, and what it has read.

    Args:
        layout: of the reports.
        stage: this stage.
        device: where reports live.

    Attributes:
        newest: the newest report, or None.
        step: the call (from 1) whose batch it reports, or None.
        bubble: this stage's bubble as last measured.
    """

    def __init__(self, layout: ReportLayout, stage: int, device: torch.device) -> None:
        self.layout = layout
        self.newest: Tensor | None = None
        self.step: int | None = None
        self.bubble = math.nan
        self._stage = stage
        self._device = device

    def first(self, losses: Tensor, scale: Tensor | float) -> Tensor:
        """The last stage's report of a batch: its mean ``losses`` [losses] and loss scale."""
        report = torch.full((self.layout.words,), math.nan, dtype=torch.float64, device=self._device)
        report[: self.layout.losses] = losses
        report[self.layout.scale] = scale
        report[self.layout.squares] = 0.0
        return report

    def add(self, received: Tensor, step: int, skipped: int, in_a_row: int, stop: bool) -> Tensor:
        """``received`` with what this stage has to say; the newest report from now on, that of call ``step``.

        Args:
            received: the report as the stage below sent it.
            step: the call whose batch it reports, from 1.
            skipped, in_a_row: this stage's updates skipped so far, and the newest of them without a break.
            stop: whether this rank was asked to stop.
        """
        report = received.clone()
        report[self.layout.bubbles][self._stage] = self.bubble
        report[self.layout.skipped][self._stage] = skipped
        report[self.layout.in_a_row][self._stage] = in_a_row
        if stop:
            report[self.layout.stop] = 1.0
        self.newest, self.step = report, step
        return report

    def bubbles(self) -> list[float]:
        """Every stage's bubble as last heard from it (nan: never), this stage's newest."""
        return self._heard(self.layout.bubbles, self.bubble, float)

    def skipped(self, mine: int) -> list[int]:
        """Every stage's skipped updates as last heard from it; this stage's are ``mine``."""
        return self._heard(self.layout.skipped, mine, lambda n: 0 if math.isnan(n) else int(n))

    def _heard(self, where: slice, mine: float, read: Callable[[float], float]) -> list:  # type: ignore[type-arg]
        heard = [math.nan] * self.layout.stages if self.newest is None else self.newest[where].tolist()
        heard[self._stage] = mine
        return [read(n) for n in heard]

    def scale(self) -> float | None:
        """The newest batch's loss scale; None before any."""
        return None if self.newest is None else float(self.newest[self.layout.scale])

    def without_request(self, report: Tensor) -> Tensor:
        """``report``, in which nobody asks for the run to stop: for a checkpoint, whose next run is to go on."""
        report = report.clone()
        report[self.layout.stop] = math.nan
        return report

    def clear(self) -> None:
        """Forgets what was read, after a checkpoint was loaded."""
        self.newest = self.step = None

    def resume(self, newest: Tensor | None, step: int | None) -> None:
        """The newest report is ``newest``, that of call ``step``, in a checkpoint that was loaded."""
        self.newest = None if newest is None else newest.to(self._device)
        self.step = step
