"""What an update of one GPT layer costs by each method, beside the layer's forward and backward.

    python tests/bench/matrices.py --hidden 768 --record
    python tests/bench/matrices.py --hidden 2048 --rounds 3 --record

The layer's weights are the four matrices of attention (query, key and value fused, and cut) and the two of an MLP four
times as wide; 768 is the 134 M model's, 2048 a 1.3 B model's. All take turns in one process; figures are medians. In
one thread of a CPU (--threads 1) they are of the time that it was computing, so that others on the machine count for
little. The update in which SOAP finds its bases anew is timed by itself, and counts as often as it comes. Says after
how many tokens an update costs under 5 % of a step.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import time
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import nn  # noqa: E402

from noflush.demo.gpt import Block  # noqa: E402
from noflush.kernels.choice import choose  # noqa: E402
from noflush.methods import newton_schulz  # noqa: E402
from noflush.methods.flat import FlatGroup  # noqa: E402
from noflush.methods.matrices import set_cut  # noqa: E402
from noflush.methods.method import Place  # noqa: E402
from noflush.methods.table import METHODS, load  # noqa: E402
from tests.bench.record import record  # noqa: E402
from tests.bench.update import milliseconds  # noqa: E402

SHARE = 0.05
_NEVER = 10**9
_LEARN = "forward and backward"
FUSED = (3, 0, 0, 0)
"""How many matrices each weight of a layer is, where more than one."""


class Update:
    """One method's flat state of the matrices of a layer, updated as in training, looking ahead or not."""

    def __init__(self, name, shapes, device, **given):
        params = [nn.Parameter(torch.randn(shape, device=device) * 0.02) for shape in shapes]
        for p, fused in zip(params, FUSED, strict=True):
            if fused:
                set_cut(p, 1, (p.shape[0] // fused,) * fused)
        self.kernel, _ = choose("triton" if device.type == "cuda" else "torch", device, 0)
        self.rule = load(name)(params, **given)
        self.rule.set_stage(Place(0, 8, 7.0))
        offsets = [sum(p.numel() for p in params[:i]) for i in range(len(params))]
        total = sum(p.numel() for p in params)
        self.rule.flatten([FlatGroup.of(0, params, offsets, total)], self.kernel)
        self.weights = torch.cat([p.detach().reshape(-1) for p in params])
        self.target = torch.empty(total, device=device, dtype=torch.bfloat16)
        self.gradient = torch.randn(total, device=device)
        self.norm = self.kernel.norm([self.gradient])

    def __call__(self, **settings):
        self.rule.param_groups[0].update(settings)
        # In mixed precision; the gradient is cleared, which changes no time.
        self.rule.step_flat(self.kernel, [self.gradient], [self.weights], [self.target], True, self.norm, 1.0)


def _computing(action, device):
    """Milliseconds."""
    if device.type != "cpu" or torch.get_num_threads() > 1:
        return milliseconds(action, device)
    start = time.process_time()
    action()
    return (time.process_time() - start) * 1e3


def _without_gram(matrices):
    with mock.patch.object(newton_schulz, "GRAM_FROM", math.inf):
        return newton_schulz.orthogonalized(matrices, 5)


def measure(args):
    """The row."""
    device, h = torch.device(args.device), args.hidden
    shapes = [(3 * h, h), (h, h), (4 * h, h), (h, 4 * h)]
    actions = {}
    for name in METHODS:
        actions[name] = Update(name, shapes, device)
    every = METHODS["DelayAwareSOAP"].params["refresh_every"].default
    soaps = {"DelayAwareSOAP": actions["DelayAwareSOAP"]}
    soaps["DelayAwareSOAP, estimate first"] = Update("DelayAwareSOAP", shapes, device, estimate="first")
    actions |= {name: lambda soap=soap: soap(refresh_every=_NEVER) for name, soap in soaps.items()}
    actions["DelayAwareMuon, look_ahead"] = Update("DelayAwareMuon", shapes, device, look_ahead=0.9)
    matrices = [torch.randn(h, h, device=device) for _ in range(4)]
    matrices += [torch.randn(4 * h, h, device=device), torch.randn(h, 4 * h, device=device)]
    for steps in (3, 5):
        actions[f"Newton-Schulz, {steps} steps"] = lambda steps=steps: newton_schulz.orthogonalized(matrices, steps)
    actions["Newton-Schulz, 5 steps, no Gram form"] = lambda: _without_gram(matrices)
    block = Block(h, max(1, h // 64), 1).to(device)
    x = torch.randn(1, args.tokens, h, device=device, requires_grad=True)

    def learn():
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            out = block(x)
        out.float().sum().backward()

    actions[_LEARN] = learn
    chosen = [name for name in actions if name == _LEARN or not args.only or any(word in name for word in args.only)]
    times = {name: [] for name in chosen}
    for _ in range(args.rounds + 1):
        for name in chosen:
            times[name].append(_computing(actions[name], device))
    median = {name: statistics.median(found[1:]) for name, found in times.items()}  # the first one compiles and loads
    for name in soaps.keys() & chosen:
        refreshing = _computing(lambda soap=soaps[name]: soap(refresh_every=1), device)
        median[f"{name}, refreshing"] = refreshing
        median[name] += (refreshing - median[name]) / every
    per_token = median[_LEARN] / args.tokens
    return {
        "ms": {name: round(value, 3) for name, value in median.items()},
        "tokens_for_5_percent": {
            name: round(median[name] * (1 - SHARE) / SHARE / per_token)
            for name in median
            if name.split(",")[0] in METHODS and not name.endswith("refreshing")
        },
        "hidden": h,
        "tokens": args.tokens,
        "device": args.device,
        "load": round(os.getloadavg()[0], 2),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    p.add_argument("--hidden", type=int, default=768, help="default: %(default)s")
    p.add_argument("--tokens", type=int, default=512, help="of a forward and backward (default: %(default)s)")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--record", action="store_true", help="append the result to tests/bench/results/matrices.jsonl")
    p.add_argument("--only", nargs="*", default=[], metavar="WORD", help="rows whose names have one of these words")
    p.add_argument("--threads", type=int, default=torch.get_num_threads(), help="default: %(default)s")
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    result = measure(args)
    if args.record:
        record("matrices", result, args.device)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
