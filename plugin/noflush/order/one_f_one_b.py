"""The order of compute: 1F1B without a flush, and its synchronous twin. Pure.

For P = 3, K = 1 without a flush (forward of m is ``Fm``, a call is one column)::

    call      0      1      2         3         4
    stage 0   F0     F1     F2 B0 U0  F3 B1 U1  F4 B2 U2
    stage 1   F0     F1 B0  F2 B1     F3 B2     F4 B3       (each B followed by its U)
    stage 2   F0 B0  F1 B1  F2 B2     F3 B3     F4 B4

Nothing drains between calls, and whatever a stage needs in call t its peers produce in calls <= t, so a barrier between
calls is safe. The twin computes in the same steady order, and catches up at each call's end.
"""

from __future__ import annotations

from noflush.order.actions import Action, Op
from noflush.order.schedule import Schedule


def compute_of_call(schedule: Schedule, stage: int, call: int) -> list[Action]:
    """Compute actions of one `train_batch` call: K forwards, the backwards that are due, the updates."""
    gas, flushes = schedule.gas, schedule.flushes
    first, last = call * gas, (call + 1) * gas
    lag = schedule.lag_in_call(stage)
    oldest = first if flushes else 0
    actions: list[Action] = []
    for m in range(first, last):
        actions.append(Action(stage, Op.FORWARD, m))
        if m - lag >= oldest:
            _backward(actions, stage, m - lag, gas)
    if flushes:
        for m in range(last - lag, last):
            _backward(actions, stage, m, gas)
    return actions


def compute_of_drain(schedule: Schedule, stage: int, calls: int) -> list[Action]:
    """Compute actions that finish what is in flight after ``calls`` calls; then the segment is over."""
    total = calls * schedule.gas
    actions: list[Action] = []
    for m in range(max(0, total - schedule.lag(stage)), total):
        _backward(actions, stage, m, schedule.gas)
    return actions


def _backward(actions: list[Action], stage: int, micro_batch: int, gas: int) -> None:
    actions.append(Action(stage, Op.BACKWARD, micro_batch))
    if (micro_batch + 1) % gas == 0:
        actions.append(Action(stage, Op.UPDATE, micro_batch // gas))
