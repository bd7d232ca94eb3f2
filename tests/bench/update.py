"""Time of one optimizer update and its share of the memory bandwidth: noflush's kernels, torch's and others.

    python tests/bench/update.py --device cpu --numel 50000000 --json
    python tests/bench/update.py --device cuda --numel 1000000000 --model bf16 --json --record

All take turns in one process; figures are medians. ``ours`` is what ``kernel: auto`` takes: Triton on a GPU,
`torch.compile` on a CPU. The others get parameters of a million elements each, as a model has them. On a GPU fewer
parameters are taken than asked for where all of it would not fit. Whether an update waits, allocates or can be
captured, ``gpu.py --only update-steady`` says. ``--bytes`` prints the table of bytes a parameter that each variant must
move, and needs no device.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from noflush.kernels.choice import choose  # noqa: E402
from noflush.kernels.eager import EagerKernel  # noqa: E402
from noflush.methods import adamw, nadamw, nag  # noqa: E402
from noflush.methods.flat import Flat  # noqa: E402
from noflush.methods.table import METHODS, load  # noqa: E402
from tests.bench.record import record  # noqa: E402
from tests.bench.rivals import DTYPES, bytes_held, fitting, steps  # noqa: E402

HYPER = {
    "nadamw": nadamw.Hyper(3e-4, 0.99, 0.999, 1e-8, 0.01, 4e-3, 0.0, 0.0, 0.0),
    "adamw": adamw.Hyper(3e-4, 0.9, 0.999, 1e-8, 0.01),
    "nag": nag.Hyper(3e-4, 0.99, 0.01, 1.0, 0.0, 0.0),
}
METHOD = {load(name).__module__.split(".")[-1]: load(name).METHOD for name in METHODS}


def bytes_moved(rule, gradient, model, moments):
    """Bytes a parameter: (read, written), the gradient cleared in the same pass; the norm reads it once more."""
    state = DTYPES[moments].itemsize * (1 if rule == "nag" else 2)
    master = 4 if model != "fp32" else 0
    read = DTYPES[gradient].itemsize + 4 + state
    return read, state + master + DTYPES[model].itemsize + DTYPES[gradient].itemsize


def print_bytes():
    print("rule    gradient model moments  read written total  norm")
    for rule in HYPER:
        for gradient, model, moments in (("fp32", "fp32", "fp32"), ("fp32", "bf16", "fp32"), ("bf16", "bf16", "fp32"),
                                         ("fp16", "fp16", "fp32"), ("bf16", "bf16", "bf16")):  # fmt: skip
            if rule == "nag" and moments == "bf16":
                continue
            read, written = bytes_moved(rule, gradient, model, moments)
            norm = DTYPES[gradient].itemsize
            print(f"{rule:8}{gradient:9}{model:6}{moments:9}{read:4}{written:8}{read + written:6}{norm:6}")


class Ours:
    """A kernel and the flat tensors it updates."""

    def __init__(self, kernel, args, device):
        n = args.numel
        self.kernel = kernel
        draw = torch.Generator(device=device).manual_seed(1)
        weights = torch.randn(n, device=device, generator=draw)
        if args.rule == "nag":
            state = (weights.clone(),)
        else:
            state = tuple(torch.zeros(n, device=device, dtype=DTYPES[args.moments]) for _ in range(2))
        self.gradient = torch.randn(n, device=device, generator=draw).to(DTYPES[args.gradient])
        clock = torch.tensor([0.0, 1.0], device=kernel.clock_device(device))
        target = torch.empty(n, device=device, dtype=DTYPES[args.model])
        self.flat = Flat(
            METHOD[args.rule],
            *(self.gradient, weights, target, state, clock, HYPER[args.rule], args.model != "fp32"),
        )
        self.norm = kernel.norm([self.gradient])

    def update(self):
        self.kernel.update([self.flat], self.norm, 1.0, 1.0)

    def whole(self):
        self.kernel.update([self.flat], self.kernel.norm([self.gradient]), 1.0, 1.0)

    def only_norm(self):
        self.kernel.norm([self.gradient])


def milliseconds(action, device):
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        action()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)
    start = time.perf_counter()
    action()
    return (time.perf_counter() - start) * 1e3


def measure(args):
    """The row for ``args``: as many of ``args.numel`` parameters as fit into the memory that is free."""
    device = torch.device(args.device)
    n = args.numel
    if args.device == "cuda":
        free, _ = torch.cuda.mem_get_info()
        n = fitting(n, free, args.gradient, args.model, args.moments, args.rule == "nag")
    sized = argparse.Namespace(**vars(args) | {"numel": n})
    kernel, _ = choose(args.kernel, device, n)
    ours, plain = Ours(kernel, sized, device), Ours(EagerKernel(), sized, device)
    here, there = torch.randn(n, device=device), torch.empty(n, device=device)
    rivals, without = steps(n, device)
    actions = {
        "ours": ours.update,
        "ours_norm": ours.only_norm,
        "torch_kernel": plain.update,
        "copy": lambda: there.copy_(here),
        **rivals,
    }
    for name, action in list(actions.items()):
        try:
            action()
        except Exception as error:
            if name in ("ours", "ours_norm", "copy"):
                raise
            without[name] = f"{type(error).__name__}: {error}"[:200]
            del actions[name]
    times = {name: [] for name in actions}
    for _ in range(args.rounds):
        for name, action in actions.items():
            times[name].append(milliseconds(action, device))
    median = {name: statistics.median(values) for name, values in times.items()}
    moved = sum(bytes_moved(args.rule, args.gradient, args.model, args.moments))
    ours_rate, copy_rate = moved * n / median["ours"] / 1e6, 8 * n / median["copy"] / 1e6
    result = {f"{name}_ms": round(value, 3) for name, value in median.items()} | {
        "ours_GBps": round(ours_rate, 1),
        "copy_GBps": round(copy_rate, 1),
        "fraction_of_copy": round(ours_rate / copy_rate, 3),
        **{f"{name}_over_ours": round(median[name] / median["ours"], 2) for name in rivals if name in median},
        "without": without,
        "bytes_a_parameter": moved,
        "kernel": kernel.name,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        **{key: getattr(sized, key) for key in ("device", "numel", "rule", "gradient", "model", "moments")},
    }
    if args.device == "cuda":
        held = bytes_held(args.gradient, args.model, args.moments, args.rule == "nag")
        result |= {
            "asked_numel": args.numel,
            "counted_GB": round(n * sum(held) / 1e9, 1),
            "peak_GB": round(torch.cuda.max_memory_allocated() / 1e9, 1),
        }
    return result


def add_kinds(p):
    """The arguments that say which update."""
    p.add_argument("--rule", choices=list(HYPER), default="nadamw")
    p.add_argument("--gradient", choices=list(DTYPES), default="fp32")
    p.add_argument("--model", choices=list(DTYPES), default="fp32")
    p.add_argument("--moments", choices=["fp32", "bf16"], default="fp32")


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--numel", type=int, default=50_000_000)
    add_kinds(p)
    p.add_argument("--rounds", type=int, default=9)
    p.add_argument("--bytes", action="store_true", help="print the bytes each variant moves, and end")
    p.add_argument("--json", action="store_true", help="print one JSON object")
    p.add_argument("--record", action="store_true", help="append the result to tests/bench/results/update.jsonl")
    args = p.parse_args()
    if args.bytes:
        print_bytes()
        return
    args.kernel = "triton" if args.device == "cuda" else "compile"
    result = measure(args)
    if args.record:
        record("update", result, args.device)
    if args.json:
        print(json.dumps(result))
    else:
        for key, value in result.items():
            print(f"{key:32} {value}")


if __name__ == "__main__":
    main()
