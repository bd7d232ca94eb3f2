"""When a message that was sent may be forgotten: once a later one proves that the peer has taken it. Pure.

A gloo ``Work.is_completed()`` stays False until somebody waits, so a finished send cannot be found by asking.
"""

from __future__ import annotations

from noflush.order.actions import Op


def retired_by(received: Op, micro_batch: int, lag_above: int) -> int:
    """Up to which micro-batch a receive proves that its sender had taken what this stage sent it.

    Args:
        received: RECV_ACTIVATION, which proves it of gradients; or RECV_GRAD, which proves it of activations and of the
            control messages that came before them.
        micro_batch: that of the message received.
        lag_above: `Schedule.lag_in_call` of the stage above.
    """
    if received is Op.RECV_ACTIVATION:
        # The stage above had run B(m - lag - 1) when it sent this, so that gradient had arrived there.
        return micro_batch - lag_above - 1
    # The stage below has read the activation of m.
    return micro_batch
