"""What a GPT's micro-batch sends over each link of its pipeline. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from noflush.order.wire_format import AS_IN_MODEL, Wire, wire_bytes


@dataclass(frozen=True)
class LinkTraffic:
    """Bytes of a micro-batch on every link: ``down`` its activations, ``up`` their gradients."""

    down: int
    up: int


def link_traffic(hidden: int, sequence: int, micro_batch: int, width: int, wire: Wire = AS_IN_MODEL) -> LinkTraffic:
    """Of activations of ``micro_batch`` x ``sequence`` x ``hidden`` numbers, ``width`` bytes each in the model."""
    numbers = micro_batch * sequence * hidden
    return LinkTraffic(wire_bytes(wire.activations, numbers, width), wire_bytes(wire.gradients, numbers, width))
