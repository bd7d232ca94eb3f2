"""The synchronous twin: every update waits for all groups, and is made of their mean gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from noflush.replicas.rounds import Failed, Round, RunsRounds
from noflush.replicas.transport import State

_ATTEMPTS = 3


class MeanGradients:
    """Of one stage.

    Args:
        rounds: of this stage; one an update.
        words: what this group tells the others.
        heard, failed: are told of every round that ended well, and that did not.
        give: the state that a newcomer is given.
    """

    def __init__(
        self,
        rounds: RunsRounds,
        words: Callable[[], dict[str, Any]],
        heard: Callable[[Round], None],
        failed: Callable[[Failed], None],
        give: Callable[[], State],
    ) -> None:
        self._rounds, self._words, self._give = rounds, words, give
        self._heard, self._failed = heard, failed

    @torch.no_grad()
    def __call__(self, gradients: Sequence[Tensor]) -> None:
        """Makes flat ``gradients`` the mean over groups.

        A round that fails is tried again with those who are left. Where even that fails, as without a lighthouse, they
        stay this group's own.
        """
        whole = torch.cat([flat.reshape(-1).float().cpu() for flat in gradients]) if gradients else torch.empty(0)
        for _ in range(_ATTEMPTS):
            result = self._round(whole)
            if isinstance(result, Round):
                break
            self._failed(result)
        else:
            return
        self._heard(result)
        if result.average is None:
            return
        passed = 0
        for flat in gradients:
            flat.copy_(result.average[passed : passed + flat.numel()].view_as(flat))
            passed += flat.numel()

    def _round(self, whole: Tensor) -> Round | Failed:
        self._rounds.start(0, {**self._words(), "samples": 1.0}, whole)
        result = None
        while result is None:
            self._rounds.serve(self._give)
            result = self._rounds.poll(0.005)
        return result
