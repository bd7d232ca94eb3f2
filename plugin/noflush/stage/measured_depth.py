"""How deep a pipeline had better be, by what compute and links take here: `order.depth` decides."""

from __future__ import annotations

from typing import TYPE_CHECKING

from noflush.order.actions import Op
from noflush.order.depth import DepthChoice, choose_depth
from noflush.order.timing import Cost
from noflush.stage import link_probe

if TYPE_CHECKING:
    from noflush.stage.stage import Stage


def measured(stage: Stage) -> DepthChoice:
    """The choice, alike on all ranks; on all of them at the same call, of a drained pipeline that has been full."""
    typical, runner = stage.recorder.typical, stage.runner
    cost = Cost(
        typical(Op.FORWARD) + typical(Op.SEND_ACTIVATION),
        typical(Op.BACKWARD) + typical(Op.SEND_GRAD),
        typical(Op.UPDATE),
    )
    above, below = runner.traffic()
    one_way = stage.posting == "ahead"
    mine = link_probe.measure(runner.neighbours, above, below, stage.device, stage.stage, cost, one_way)
    costs, links = link_probe.gather(mine, stage.schedule.stages)
    # Receives are posted for as many messages as links were deep, and which bring tied weights is settled.
    least = stage.schedule.extra_in_flight if stage.tied.ties else 0
    return choose_depth(stage.schedule, costs, links, least)
