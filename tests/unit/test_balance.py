"""The line that names the slowest stage."""

from __future__ import annotations

import pytest

from noflush.watch.balance import balance_line


@pytest.mark.parametrize("busy", [[10.0, 10.5, 9.8], [0.0, 0.0], [7.0]])
def test_even_stages(busy):
    assert balance_line(busy).endswith("; even")


def test_the_slowest_stage_is_named_with_what_it_costs():
    line = balance_line([10.0, 10.0, 30.0, 10.0])
    assert line.startswith(
        "compute of a call by stage (ms): 10.0 10.0 30.0 10.0; stage 2 sets the pace of all, at 2.00 "
    )
    assert "fewer layers (partition_method of the PipelineModule; Megatron's --pipeline-model-parallel-layout)" in line
