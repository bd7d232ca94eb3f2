"""ZeRO-1 that cuts between matrices: parameter groups arranged so that DeepSpeed's equal shards end where one does.

DeepSpeed lays a group's parameters one after the other and cuts the row into equal parts. So each shard's matrices are
put in a row, and where that is shorter than the longest a parameter that nobody reads fills the gap: its gradient is
zero, it stands in no layer and so in no file of weights.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from noflush.methods.matrices import piece_of, set_gap
from noflush.methods.optimizer import DelayAwareOptimizer
from noflush.stage.cut import by_matrix, shard_length

GAP = "noflush_gap_"
"""With which the names of gaps begin."""
_UNIT = 2
"""DeepSpeed aligns a shard to so many elements."""


def arrange(rule: Any, replicas: int, names: dict[Any, str]) -> None:
    """Arranges the groups of ``rule`` whose method sees matrices for ``replicas`` shards.

    ``names``: of parameters; those of the gaps are added. Other optimizers, and one shard, are left as they are.
    """
    if not isinstance(rule, DelayAwareOptimizer) or replicas == 1:
        return
    for group in rule.param_groups:
        method = rule.method_of_group(group)
        if method.row.unit == "element":
            continue
        params: list[Tensor] = [p for p in group["params"] if p.requires_grad]
        sizes = [p.numel() for p in params]
        members = by_matrix([sum(method.cost(m.shape) for m in piece_of(p).matrices()) for p in params], replicas)
        length, arranged = shard_length(sizes, members, _UNIT), []
        for shard, of_shard in enumerate(members):
            arranged += [params[i] for i in of_shard]
            gap = length - sum(sizes[i] for i in of_shard)
            if gap:
                filler = nn.Parameter(params[0].detach().new_zeros(gap))
                set_gap(filler)
                # Of no other stage's: converters put what all stages have into one folder, by name.
                names[filler] = f"{GAP}{names[params[0]]}_{shard}"
                arranged.append(filler)
        group["params"] = arranged
