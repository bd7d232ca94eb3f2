"""What a stage does, step by step: the words in which orders are written, and the messages that compute needs. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import Enum
from typing import NamedTuple


class Op(str, Enum):
    """What an action does. The value is its spelling in text."""

    FORWARD = "F"
    BACKWARD = "B"
    UPDATE = "U"
    SEND_ACTIVATION = "SA"
    RECV_ACTIVATION = "RA"
    SEND_GRAD = "SG"
    RECV_GRAD = "RG"
    POST_ACTIVATION = "PA"
    POST_GRAD = "PG"
    OPEN = "O"
    SEND_HEADER = "SH"
    RECV_HEADER = "RH"
    SEND_SPEC = "SS"
    RECV_SPEC = "RS"

    # Enum's own is written in Python, and orders of a million actions are looked up by it.
    __hash__ = str.__hash__


POSTS = frozenset({Op.POST_ACTIVATION, Op.POST_GRAD})
COMPUTE = frozenset({Op.FORWARD, Op.BACKWARD, Op.UPDATE})
CONTROL = frozenset({Op.OPEN, Op.SEND_HEADER, Op.RECV_HEADER, Op.SEND_SPEC, Op.RECV_SPEC})
_SPELLINGS = "|".join(sorted((op.value for op in Op), key=len, reverse=True))
_ACTION = re.compile(rf"^(\d+)({_SPELLINGS})(\d+)$")


class Action(NamedTuple):
    """One step of one stage.

    ``index`` is a micro-batch; of UPDATE the number of the update, of OPEN and headers that of the call (all from 0).
    Round-trips to text: ``str(Action(2, Op.FORWARD, 7)) == "2F7"``.
    """

    stage: int
    op: Op
    index: int  # type: ignore[assignment]  # a tuple's method of that name is nobody's here

    def __str__(self) -> str:
        return f"{self.stage}{self.op.value}{self.index}"

    @classmethod
    def parse(cls, text: str) -> Action:
        """The action that ``text`` spells. Raises ValueError with the spelling expected."""
        found = _ACTION.match(text)
        if found is None:
            raise ValueError(f"{text!r} is not an action: expected <stage><{_SPELLINGS}><index>, as in '2F7'")
        stage, op, index = found.groups()
        return cls(int(stage), Op(op), int(index))


def with_communication(stages: int, actions: Sequence[Action]) -> list[Action]:
    """Adds to one stage's compute order the messages it needs: each receive just before, each send just after.

    Activations go to the next stage, gradients to the previous one; both ends number messages by
    micro-batch, so sender and receiver see one order per link and direction.
    """
    out: list[Action] = []
    for action in actions:
        s, op, m = action
        if op is Op.FORWARD:
            if s > 0:
                out.append(Action(s, Op.RECV_ACTIVATION, m))
            out.append(action)
            if s < stages - 1:
                out.append(Action(s, Op.SEND_ACTIVATION, m))
        elif op is Op.BACKWARD:
            if s < stages - 1:
                out.append(Action(s, Op.RECV_GRAD, m))
            out.append(action)
            if s > 0:
                out.append(Action(s, Op.SEND_GRAD, m))
        else:
            out.append(action)
    return out
