"""Whether an order gets to its end under an accelerator's rules, whose messages need both ends at once. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from noflush.order.actions import Action, Op
from noflush.order.program import Program, ScheduleError, draw

_SENT_BY = {Op.POST_ACTIVATION: (Op.SEND_ACTIVATION, -1), Op.POST_GRAD: (Op.SEND_GRAD, +1)}
_SAID_BY = {Op.RECV_HEADER: Op.SEND_HEADER, Op.RECV_SPEC: Op.SEND_SPEC}


def check_in_step(order: Program, one_norm: bool = False) -> None:
    """Raises ScheduleError if a CPU that finishes all it has started before it starts anything else would hang.

    That is the strictest way to drive an accelerator. A send and its receive are one kernel on either side, done when
    both have been started; they start in stream order; ``wait`` holds up the stream and not the CPU. Whatever else
    may come in between only makes a stage wait for things that it started *earlier*: a device-wide synchronisation
    at any point, on any number of stages at once; a full launch queue; all streams on one hardware queue
    (``CUDA_DEVICE_MAX_CONNECTIONS=1``), where what cannot start holds up what was started later. To wait for all of
    them each time is every such wait at once. Waits can only close a circle, never open one, so what gets to its
    end here gets there under any of them.

    Assumed: a kernel that is enqueued earlier gets its place on the device although a receive that was enqueued later
    occupies a few multiprocessors already. A cooperative kernel that needs all of them would be none.

    Replicas need no playing: each runs the same order, and no action that can start ever becomes unable to. So what one
    does alone, all can do in step with each other, and meet at each collective of theirs.

    Args:
        order: a program of `call_order`'s, posts included.
        one_norm: an update is a collective of all stages.
    """
    said = [{Op.SEND_HEADER: 0, Op.SEND_SPEC: 0} for _ in order[0]]
    received = [{Op.POST_ACTIVATION: 0, Op.POST_GRAD: 0} for _ in order[0]]
    for call, column in enumerate(order):
        stuck = _play(column, said, received, one_norm)
        if stuck is not None:
            stage, position = stuck
            raise ScheduleError(
                f"on an accelerator, stage {stage} may stand still for ever at {column[stage][position]} in call "
                f"{call}: if it waits for what it has started, in a device-wide synchronisation say, it waits for a "
                "message whose other end is started only later\n" + draw(order, call, stage, position)
            )


def _play(
    column: Sequence[Sequence[Action]], said: list[dict[Op, int]], received: list[dict[Op, int]], one_norm: bool
) -> tuple[int, int] | None:
    """Plays one call: (stage, position) of one that stands still for ever, or None.

    ``said``: control messages that each stage has sent; ``received``: messages whose transfer is over, by its post.
    """
    stages = len(column)
    rows = [[*row, Action(s, Op.OPEN, -1)] for s, row in enumerate(column)]  # a last action that never starts
    at = [0] * stages
    ready = list(range(stages))
    while ready:
        stage = ready.pop()
        row, i = rows[stage], at[stage]
        while True:
            _, op, index = row[i]
            if op is Op.SEND_ACTIVATION or op is Op.SEND_GRAD:
                # A send goes when its receiver has come to the post that covers it, and takes messages in order.
                post, peer = (Op.POST_ACTIVATION, stage + 1) if op is Op.SEND_ACTIVATION else (Op.POST_GRAD, stage - 1)
                _, waits, up_to = rows[peer][at[peer]]
                if waits is not post or not received[peer][post] == index <= up_to:
                    break
                received[peer][post] = index + 1
                if index == up_to:
                    ready.append(peer)
            elif op is Op.POST_ACTIVATION or op is Op.POST_GRAD:
                if received[stage][op] <= index:  # its sender moves it on
                    sends, peer = _SENT_BY[op][0], stage + _SENT_BY[op][1]
                    if rows[peer][at[peer]][1:] == (sends, received[stage][op]):
                        ready.append(peer)
                    break
            elif op in _SAID_BY:
                if said[stage - 1][_SAID_BY[op]] <= index:
                    break
            elif op is Op.SEND_HEADER or op is Op.SEND_SPEC:
                said[stage][op] += 1
                ready.append(stage + 1)
            elif index < 0:
                break
            elif op is Op.UPDATE and one_norm:
                if any(rows[s][at[s] if s != stage else i][1:] != (op, index) for s in range(stages)):
                    break
                at = [place + 1 for place in at]
                i = at[stage] = i + 1
                ready = list(range(stages))
                continue
            i += 1
            at[stage] = i
        at[stage] = i
    return next(((s, at[s]) for s in range(stages) if at[s] < len(column[s])), None)
