"""``noflush simulate``: trains a small GPT with P virtual stages on one device, to see the price of staleness."""

from __future__ import annotations

import argparse
import json
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from noflush.order.policies import POLICIES
from noflush.order.schedule import Schedule


def add(commands: Any) -> None:
    """Declares the subcommand."""
    p = commands.add_parser("simulate", help="train with P virtual stages on one device: the price of staleness")
    p.add_argument("--stages", type=int, default=8, help="virtual pipeline stages P (default: %(default)s)")
    p.add_argument("--gas", type=int, default=1, help="gradient_accumulation_steps K (default: %(default)s)")
    p.add_argument("--weights", choices=tuple(POLICIES), default="stash")
    p.add_argument(
        "--recompute", type=int, default=0, metavar="N", help="recompute N layers together in backward (for latest)"
    )
    p.add_argument("--extra-in-flight", type=int, default=0)
    p.add_argument("--optimizer", default="DelayAwareNAdamW", help="ours, or any of torch.optim (AdamW is PipeDream)")
    p.add_argument(
        "--lr", type=float, default=1e-3, help="default: %(default)s, after a warm-up over 5%% of the updates"
    )
    p.add_argument("--momentum", type=float, help="beta1 or momentum (default: the optimizer's)")
    p.add_argument("--optimizer-params", default="{}", help="more of its parameters, as JSON")
    p.add_argument("--updates", type=int, default=300, help="optimizer updates (default: %(default)s)")
    p.add_argument("--batch", type=int, default=8, help="micro-batch size (default: %(default)s)")
    p.add_argument("--sequence", type=int, default=64)
    p.add_argument("--width", type=int, default=64)
    p.add_argument("--heads", type=int, default=4)
    p.add_argument("--depth", type=int, help="transformer blocks, a multiple of the stages (default: one a stage)")
    p.add_argument("--text", help="train on this file instead of the standard library's source")
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--json", help="write losses and settings into this file")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Trains with and without delay on the same data and prints both validation losses."""
    import torch

    from noflush.demo import text

    if args.updates < 1 or args.batch < 1:
        raise ValueError(f"--updates {args.updates}, --batch {args.batch}: both must be 1 or more")
    if args.recompute < 0:
        raise ValueError(f"--recompute {args.recompute}: it must be 0 (nothing) or more")
    schedules = {
        "flush": Schedule(args.stages, args.gas, "1f1b_flush"),
        "no flush": Schedule(args.stages, args.gas, weights=args.weights, extra_in_flight=args.extra_in_flight),
    }
    training, validation = text.corpus(args.text)
    console = Console()
    results: dict[str, dict[str, Any]] = {}
    for name, schedule in schedules.items():
        simulator = _simulator(args, schedule)
        stream = text.batches(training, args.batch, args.sequence, args.seed)
        losses = []
        for _ in track(range(args.updates * args.gas), description=f"{name:>8}", console=console):
            losses.append(simulator.train_micro_batch(*next(stream)).item())
        held_out = text.batches(validation, args.batch, args.sequence, seed=0)
        value = torch.stack([simulator.evaluate(*next(held_out)) for _ in range(16)]).mean().item()
        delays = [schedule.max_delay(s) for s in range(args.stages)]
        results[name] = {"val_loss": value, "delay": delays, "train_losses": losses}
    table = Table(title=f"{args.optimizer}, P = {args.stages}, K = {args.gas}, {args.updates} updates, equal tokens")
    for column in ("schedule", "delay by stage", "validation loss (nats)", "last training loss"):
        table.add_column(column, justify="right")
    for name, result in results.items():
        tail = result["train_losses"][-20:]
        cells = [name, " ".join(map(str, result["delay"])), f"{result['val_loss']:.4f}", f"{sum(tail) / len(tail):.4f}"]
        table.add_row(*cells)
    console.print(table)
    console.print(f"price of staleness: {results['no flush']['val_loss'] - results['flush']['val_loss']:+.4f} nats")
    if args.json:
        settings = {k: v for k, v in vars(args).items() if k != "run"}
        with open(args.json, "w") as file:
            json.dump({"settings": settings, **results}, file)
    return 0


def _simulator(args: argparse.Namespace, schedule: Schedule) -> Any:
    import torch

    from noflush.demo import gpt, text
    from noflush.methods.table import METHODS, load
    from noflush.simulate import DelaySimulator

    torch.manual_seed(args.seed)
    depth = args.depth or args.stages
    layers = gpt.gpt_layers(text.VOCABULARY, args.sequence, args.width, args.heads, depth)
    rule: Any = load(args.optimizer) if args.optimizer in METHODS else getattr(torch.optim, args.optimizer, None)
    if rule is None:
        raise ValueError(f"--optimizer {args.optimizer}: not one of {', '.join(METHODS)} nor of torch.optim")
    try:
        params = json.loads(args.optimizer_params)
    except json.JSONDecodeError as error:
        raise ValueError(f"--optimizer-params {args.optimizer_params}: not JSON ({error})") from error
    if args.momentum is not None:
        adam_like = "Adam" in args.optimizer
        params["betas" if adam_like else "momentum"] = (args.momentum, 0.999) if adam_like else args.momentum

    def build(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        try:
            optimizer: torch.optim.Optimizer = rule(parameters, lr=args.lr, **params)
        except TypeError as error:
            raise ValueError(f"--optimizer {args.optimizer}: {error}") from error
        return optimizer

    warm_up = max(1, args.updates // 20)
    return DelaySimulator(
        gpt.split_by_blocks(layers, args.stages),
        gpt.next_token_loss,
        build,
        schedule,
        recompute=args.recompute,
        make_lr_scheduler=lambda opt: torch.optim.lr_scheduler.LambdaLR(opt, lambda u: min(1.0, (u + 1) / warm_up)),
    )
