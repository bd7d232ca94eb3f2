"""16 MB from one GPU to the next beside running matmuls, by NCCL's ``max_ctas`` and the priority of its stream."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import time

import torch
import torch.distributed as dist

from noflush.stage.groups import without_splits
from tests.bench.gpu_parts import device as gpu
from tests.bench.gpu_parts.ranks import Ranks, join, own_device

_MODULE = "tests.bench.gpu_parts.overlap"
_TIMEOUT_S = 30.0
CHOICES = ((None, False), (None, True), (1, True), (2, True), (4, True), (8, True))
"""(max_ctas, high priority)."""


def options(max_ctas, high_priority):
    """NCCL's options of a group; None on a CPU, where gloo has none of these."""
    if not torch.cuda.is_available():
        return None
    found = dist.ProcessGroupNCCL.Options(is_high_priority_stream=high_priority)
    if max_ctas is not None:
        found.config.max_ctas = max_ctas
    return found


def seconds(action, device, rounds):
    """Median time of ``action``, both ranks starting together."""
    times = []
    for _ in range(rounds):
        gpu.settle(device)
        dist.barrier()
        start = time.perf_counter()
        action()
        gpu.settle(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def rank_main(dry):
    """For every choice: milliseconds of the messages, of the matmuls, and of both at once."""
    device, rank = own_device(), int(os.environ["RANK"])
    join(device, _TIMEOUT_S)
    n, numel, messages, matmuls, rounds = (16, 64, 2, 2, 1) if dry else (4096, 4_000_000, 8, 16, 7)
    a = torch.randn(n, n, device=device, dtype=torch.float32 if dry else torch.bfloat16)
    payload = torch.ones(numel, device=device)
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def compute():
        for _ in range(matmuls):
            torch.mm(a, a)

    def communicate(group):
        works = []
        with torch.cuda.stream(stream) if stream else contextlib.nullcontext():
            for _ in range(messages):
                move = dist.isend if rank == 0 else dist.irecv
                works.append(move(payload, 1 - rank, group=group))
            for work in works:
                work.wait()

    def both(group):
        if stream:
            compute()  # enqueued first, as a stage's forward is before its send
            communicate(group)
        else:
            communicate(group)
            compute()

    row = {}
    for max_ctas, high_priority in CHOICES:
        with without_splits():
            group = dist.new_group([0, 1], pg_options=options(max_ctas, high_priority))
        communicate(group)
        compute()
        row[f"max_ctas {max_ctas or 'as NCCL likes'}, {'high' if high_priority else 'normal'} priority"] = {
            "messages_ms": round(seconds(lambda: communicate(group), device, rounds) * 1e3 / messages, 4),  # noqa: B023
            "matmuls_ms": round(seconds(compute, device, rounds) * 1e3, 3),
            "both_ms": round(seconds(lambda: both(group), device, rounds) * 1e3, 3),  # noqa: B023
        }
    print(json.dumps(row), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--dry", action="store_true")
    p.add_argument("--as-rank", action="store_true")
    args = p.parse_args()
    if args.as_rank:
        rank_main(args.dry)
        return
    ranks = Ranks(_MODULE, 2, ["--dry"] * args.dry)
    print(json.dumps({"way": ranks.way} | ranks.gather()[1]))


if __name__ == "__main__":
    main()
