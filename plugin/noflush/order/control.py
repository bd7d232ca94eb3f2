"""The small messages beside the payload: a header that opens each call, and what activations will be. Pure.

They go down the pipeline on a channel of their own, over gloo on every machine; a receive of theirs holds up the CPU.
"""

from __future__ import annotations

from collections.abc import Iterable

from noflush.order.actions import Action, Op


def opening_order(stages: int, stage: int, call: int) -> list[Action]:
    """How ``stage`` opens a call. OPEN is where the first and last stages get their micro-batches.

    The first stage has them before it sends a header; all others hand the header on before they do anything else.
    """
    actions = [Action(stage, Op.OPEN, call)]
    if stage < stages - 1:
        actions.append(Action(stage, Op.SEND_HEADER, call))
    if stage > 0:
        actions = [Action(stage, Op.RECV_HEADER, call), *reversed(actions)]
    return actions


def with_specs(actions: Iterable[Action]) -> list[Action]:
    """The orders of a link's first call: each end says, or hears, what activations are before the first of them."""
    ordered: list[Action] = []
    said = heard = False
    for action in actions:
        if action.op is Op.SEND_ACTIVATION and not said:
            said = True
            ordered.append(Action(action.stage, Op.SEND_SPEC, 0))
        elif action.op is Op.POST_ACTIVATION and not heard:
            heard = True
            ordered.append(Action(action.stage, Op.RECV_SPEC, 0))
        ordered.append(action)
    return ordered
