"""Labels of micro-batches in flight, for another group's last stage that stands in for the own one.

The first stage, which reads the same data, keeps them until their gradients have come.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten, treespec_dumps, treespec_loads

from noflush.replicas.door import PeerLine, Refused, knock
from noflush.replicas.transport import State
from noflush.stage.prefetch import copied
from noflush.stage.stage import Stage


class KeptLabels:
    """At a first stage.

    Args:
        stage: that reads the micro-batches.
    """

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._lock = threading.Lock()
        self._kept: OrderedDict[int, Any] = OrderedDict()
        stage.batch_read = self._keep

    def _keep(self, micro_batch: int, batch: Any) -> None:
        if len(batch) < 2:
            return
        with self._lock:
            self._kept[micro_batch] = copied(batch[1])
            while len(self._kept) > self._stage.schedule.in_flight(self._stage.stage):
                self._kept.popitem(last=False)

    def answer(self, question: dict[str, Any], line: PeerLine) -> State:
        """Those of micro-batch ``question["number"]``. Raises Refused for one that is not in flight.

        Tensors, and what JSON can say, in tuples, lists and dicts.
        """
        with self._lock:
            if question["number"] not in self._kept:
                raise Refused(f"micro-batch {question['number']} is not in flight; kept: {list(self._kept)}")
            labels = self._kept[question["number"]]
        parts, shape = tree_flatten(labels)
        tensors = {str(i): part for i, part in enumerate(parts) if isinstance(part, Tensor)}
        plain = {str(i): part for i, part in enumerate(parts) if not isinstance(part, Tensor)}
        return tensors, {"plain": plain, "parts": len(parts), "shape": treespec_dumps(shape)}


def labels_of(door: str, number: int, device: torch.device, seconds: float) -> Any:
    """Those of micro-batch ``number`` of the group whose first stage is at ``door``. Raises Refused or OSError."""
    line, (tensors, plain) = knock(door, {"kind": "labels", "number": number}, seconds)
    line.close()
    parts = {**{name: part.to(device) for name, part in tensors.items()}, **plain["plain"]}
    return tree_unflatten([parts[str(i)] for i in range(plain["parts"])], treespec_loads(plain["shape"]))
