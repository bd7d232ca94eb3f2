"""Headers of several calls are on their way while the stage below takes none: a slow link's round trip is not paid."""

from __future__ import annotations

import pytest
import torch

from tests.multiproc.ranks import run_ranks

pytestmark = pytest.mark.multiproc
CALLS = 6


def ahead(rank):
    from noflush.stage.connect import connect

    channels = connect([[0, 1]], rank, torch.device("cpu"), timeout_s=20)
    if rank == 0:
        for call in range(CALLS):
            channels.control_out.send([call] * (call + 1), before=call)
        channels.control_out.retire(CALLS - 1)  # gloo ends a send once its receive is posted
        torch.distributed.barrier()
        return []
    torch.distributed.barrier()  # nothing is taken until all was sent
    return [channels.control_in.take(0) for _ in range(CALLS)]


def test_headers_are_sent_before_they_are_taken():
    assert run_ranks(ahead, 2)[1] == [[call] * (call + 1) for call in range(CALLS)]
