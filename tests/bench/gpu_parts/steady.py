"""One update does not wait for the GPU, allocates nothing, can be captured in a graph, and is what the reference is."""

from __future__ import annotations

import argparse
import json
import sys

import torch

from noflush.kernels.choice import choose
from noflush.kernels.eager import EagerKernel
from tests.bench.gpu_parts import device as gpu
from tests.bench.update import Ours

CLOSE = 1e-4  # of weights around 1, twelve updates of 3e-4 apart
KINDS = (("fp32", "fp32", "fp32"), ("fp32", "bf16", "fp32"), ("bf16", "bf16", "bf16"))


def captured(action, device):
    """``action`` as a CUDA graph, which replays it; itself on a CPU."""
    if device.type != "cuda":
        return action
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # captures without running
        action()
    return graph.replay


def check(gradient, model, moments, numel, device):
    """Twelve updates, six of them as a graph's replays, beside the reference's: what was found."""
    args = argparse.Namespace(rule="nadamw", numel=numel, gradient=gradient, model=model, moments=moments)
    kernel, _ = choose("triton", device, numel)
    ours, reference = Ours(kernel, args, device), Ours(EagerKernel(), args, device)
    gradients = [torch.randn(numel, device=device).to(ours.gradient.dtype) for _ in range(12)]

    def step(run, gradient):
        run.gradient.copy_(gradient)
        run.whole()
        if not run.flat.master:
            run.flat.weights.copy_(run.flat.target)

    step(ours, gradients[0])  # compiles
    gpu.settle(device)
    allocations = gpu.Allocations(device)
    with gpu.forbidding_waits(device):
        for gradient in gradients[1:6]:
            step(ours, gradient)
    allocated = allocations.since()
    source = gradients[6].clone()
    replay = captured(lambda: step(ours, source), device)
    for gradient in gradients[6:]:
        source.copy_(gradient)
        replay()
    for gradient in gradients:
        step(reference, gradient)
    gpu.settle(device)
    difference = (ours.flat.weights - reference.flat.weights).abs().max().item()
    return allocated | {"steps": int(ours.flat.clock[0].item()), "max_difference_from_reference": difference}


def right(found):
    """Whether the updates were made, without allocating, and made the reference's weights."""
    allocated = found.get("blocks_given_out", 0) + found.get("segments_from_driver", 0)
    return found["steps"] == 12 and not allocated and found["max_difference_from_reference"] < CLOSE


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--dry", action="store_true")
    args = p.parse_args()
    device, numel = gpu.of(args.dry), 1_003 if args.dry else 1_000_003
    row = {"waits_for_the_gpu": None if args.dry else 0}  # one would have raised
    for gradient, model, moments in KINDS:
        row[f"gradient {gradient}, model {model}, moments {moments}"] = check(gradient, model, moments, numel, device)
    print(json.dumps(row))
    wrong = [kind for kind, found in row.items() if isinstance(found, dict) and not right(found)]
    if wrong:
        sys.exit(f"not 12 updates without an allocation to the reference's weights: {'; '.join(wrong)}")


if __name__ == "__main__":
    main()
