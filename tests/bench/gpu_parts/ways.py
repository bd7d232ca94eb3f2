"""How several ranks get at the GPUs there are. Pure.

NCCL refuses two ranks of a communicator on one device of one host ("Duplicate GPU detected"). From 2.30 on
NCCL_MULTI_RANK_GPU_ENABLE=1 allows it. Before, ranks that say by NCCL_HOSTID to be on hosts of their own are let
through and talk over sockets: slow, but the order of everything on streams and communicators is the real one, which is
what is to be shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_MULTI_RANK = (2, 30)
_LOOPBACK = {"NCCL_SOCKET_IFNAME": "lo", "NCCL_NET": "Socket", "NCCL_IB_DISABLE": "1", "NCCL_MNNVL_ENABLE": "0"}


@dataclass(frozen=True)
class Gpus:
    """What there is: devices, UUIDs of MIG instances, and NCCL's version (None without NCCL)."""

    devices: int
    partitions: tuple[str, ...] = ()
    nccl: tuple[int, ...] | None = None


def way_of(world: int, gpus: Gpus) -> str:
    """How ``world`` ranks run on ``gpus``: the nearest there is to a GPU a rank. ``gloo``, on CPUs, without any."""
    if gpus.devices == 0 or gpus.nccl is None:
        return "gloo"
    if gpus.devices >= world:
        return "devices"
    if len(gpus.partitions) >= world:
        return "partitions"
    return "multi-rank" if gpus.nccl[:2] >= _MULTI_RANK else "host id"


def environment(way: str, rank: int, partitions: Sequence[str] = ()) -> dict[str, str]:
    """What ``rank`` needs set. ``plain`` shares a device and asks nothing of NCCL, which then says what it thinks."""
    found = {"LOCAL_RANK": "0", "NCCL_DEBUG": "WARN", "GLOO_SOCKET_IFNAME": "lo"}
    if way == "devices":
        found["LOCAL_RANK"] = str(rank)
    elif way == "multi-rank":
        found |= {"NCCL_MULTI_RANK_GPU_ENABLE": "1", "NCCL_NVLS_ENABLE": "0"}
    elif way == "host id":
        found |= _LOOPBACK | {"NCCL_HOSTID": f"noflush-{rank}"}
    elif way == "partitions":
        found |= _LOOPBACK | {"NCCL_HOSTID": f"noflush-{rank}", "CUDA_VISIBLE_DEVICES": partitions[rank]}
    return found
