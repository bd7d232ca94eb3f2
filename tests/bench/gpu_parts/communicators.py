"""GPU memory that communicators of a pair of ranks take: each kind of message between neighbouring stages has one."""

from __future__ import annotations

import argparse
import itertools
import json
import os

import torch
import torch.distributed as dist

from noflush.stage.groups import without_splits
from tests.bench.gpu_parts import device as gpu
from tests.bench.gpu_parts.ranks import Ranks, join, own_device

_MODULE = "tests.bench.gpu_parts.communicators"
_COUNT = 4
_TIMEOUT_S = 30.0


def used(device):
    """Bytes of the device in use, by whomever; 0 on a CPU."""
    if device.type != "cuda":
        return 0
    gpu.settle(device)
    free, total = torch.cuda.mem_get_info(device)
    return total - free


def first_messages(group, rank, device):
    """A message each way, with which a group connects its members."""
    tensor = torch.zeros(1 << 10, device=device)
    for sender in (0, 1):
        if rank == sender:
            dist.send(tensor, 1 - rank, group=group)
        else:
            dist.recv(tensor, 1 - rank, group=group)
    gpu.settle(device)


def rank_main():
    """Makes groups one by one, and prints what is in use after each: of both ranks together where they share."""
    device, rank = own_device(), int(os.environ["RANK"])
    join(device, _TIMEOUT_S)
    dist.barrier()
    first_messages(None, rank, device)
    taken = [used(device)]
    for _ in range(_COUNT):
        with without_splits():
            group = dist.new_group([0, 1])
        first_messages(group, rank, device)
        dist.barrier()
        taken.append(used(device))
        dist.barrier()
    print(json.dumps({"used": taken}), flush=True)
    dist.destroy_process_group()


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--dry", action="store_true")
    p.add_argument("--as-rank", action="store_true")
    args = p.parse_args()
    if args.as_rank:
        rank_main()
        return
    ranks = Ranks(_MODULE, 2, ["--dry"] * args.dry)
    taken = ranks.gather()[0]["used"]
    shared = 1 if ranks.way in ("devices", "partitions") else 2
    row = {"way": ranks.way, "ranks_on_the_device": shared}
    mib = [(after - before) / shared / 2**20 for before, after in itertools.pairwise(taken)]
    row["MiB_a_communicator_and_rank"] = [round(m, 1) for m in mib]
    print(json.dumps(row))


if __name__ == "__main__":
    main()
