"""The arithmetic of docs/replicas.md, against every state that two stages of three groups can be in."""

from __future__ import annotations

from itertools import product

import pytest

from tests.bench.routing import leaving, routing

STAGES, GROUPS = 2, 3


@pytest.mark.parametrize("down", [0.01, 0.2, 0.5])
def test_what_is_left_is_the_mean_over_all_states(down):
    left = whole = 0.0
    for state in product((0, 1), repeat=STAGES * GROUPS):
        chance = 1.0
        for up in state:
            chance *= 1 - down if up else down
        by_stage = [state[stage::STAGES] for stage in range(STAGES)]
        left += chance * min(map(sum, by_stage)) / GROUPS
        whole += chance * sum(all(of) for of in zip(*by_stage, strict=True)) / GROUPS
    assert routing(STAGES, GROUPS, down) == pytest.approx(left)
    assert leaving(STAGES, down) == pytest.approx(whole)
