"""By which way two ranks of NCCL can share one GPU: each is tried, and the row has what NCCL says of it."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time

import torch
import torch.distributed as dist

from tests.bench.gpu_parts import device as gpu
from tests.bench.gpu_parts import machine
from tests.bench.gpu_parts.ranks import Ranks, RanksError, join, own_device

_EACH_S = 20.0
_MODULE = "tests.bench.gpu_parts.sharing"


def rank_main(dry):
    """Sends a tensor there and back, checks it, and times it."""
    device = own_device()
    join(device, _EACH_S)
    rank, numel = int(os.environ["RANK"]), 1_000 if dry else 4_000_000
    tensor = torch.full((numel,), float(rank + 1), device=device)

    def there_and_back():
        if rank == 0:
            dist.send(tensor, 1)
            dist.recv(tensor, 1)
        else:
            dist.recv(tensor, 0)
            dist.send(tensor, 0)

    there_and_back()
    gpu.settle(device)
    assert torch.equal(tensor, torch.ones_like(tensor)), "what was received is not what was sent"
    start, rounds = time.perf_counter(), 3 if dry else 20
    for _ in range(rounds):
        there_and_back()
    gpu.settle(device)
    seconds = (time.perf_counter() - start) / rounds / 2
    print(json.dumps({"ms": round(seconds * 1e3, 3), "GBps": round(tensor.nbytes / seconds / 1e9, 2)}), flush=True)
    dist.destroy_process_group()


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--dry", action="store_true")
    p.add_argument("--as-rank", action="store_true")
    args = p.parse_args()
    if args.as_rank:
        rank_main(args.dry)
        return
    row, worked = {"nccl": machine.nccl_version(), "mps": machine.mps_runs()}, []
    for way in ("gloo",) if args.dry else ("plain", "multi-rank", "host id"):
        try:
            row[way] = Ranks(_MODULE, 2, ["--dry"] * args.dry, _EACH_S, way).gather()[0]
            worked.append(way)
        except RanksError as error:
            row[way] = str(error).splitlines()
        print(json.dumps(row), flush=True)
    if not worked:
        sys.exit("no way worked")


if __name__ == "__main__":
    main()
