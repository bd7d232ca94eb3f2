"""``noflush plan``: delay, weight versions, memory and predicted utilisation by stage, before anything runs."""

from __future__ import annotations

import argparse
import json
from typing import Any

from rich.console import Console
from rich.table import Table

from noflush.methods.price import gpt_stage, price
from noflush.methods.table import METHODS
from noflush.order.depth import choose_depth
from noflush.order.link_traffic import LinkTraffic, link_traffic
from noflush.order.plan import Plan, communicator_line, human_bytes, make_plan
from noflush.order.policies import POLICIES
from noflush.order.schedule import Schedule
from noflush.order.tied_traffic import ENOUGH, TiedTraffic, tied_traffic
from noflush.order.timing import Cost, Link
from noflush.order.wire_format import WIRES, Wire

_FIRST = '"estimate": "first"'


def add(commands: Any) -> None:
    """Declares the subcommand."""
    p = commands.add_parser("plan", help="delay, weight versions, memory and utilisation by stage")
    p.add_argument("--stages", type=int, required=True, help="pipeline stages P")
    p.add_argument("--gas", type=int, default=1, help="gradient_accumulation_steps K (default: %(default)s)")
    p.add_argument("--weights", choices=tuple(POLICIES), default="stash")
    p.add_argument("--extra-in-flight", type=int, default=0, help="micro-batches in flight beyond one a stage")
    p.add_argument("--forward-ms", type=float, default=1.0, help="forward of a micro-batch at a stage")
    p.add_argument("--backward-ms", type=float, help="its backward (default: twice the forward)")
    p.add_argument("--link-latency-ms", type=float, default=0.0, help="one way, between neighbours")
    p.add_argument(
        "--link-mbit", type=float, help="of a link each way, in Mbit/s; needs a GPT's sizes (default: no limit)"
    )
    p.add_argument(
        "--wire",
        default="model",
        help=f"{', '.join(WIRES)}, or two of them: ACTIVATIONS,GRADIENTS (default: %(default)s)",
    )
    memory = p.add_argument_group("memory (either the parameters of each stage, or a GPT's sizes)")
    memory.add_argument("--parameters", help="trainable parameters: one count a stage, separated by commas, or a total")
    memory.add_argument("--num-layers", type=int, help="transformer layers, a multiple of the stages")
    memory.add_argument("--hidden-size", type=int)
    memory.add_argument("--vocab-size", type=int, default=50304, help="default: %(default)s")
    memory.add_argument("--seq-length", type=int, default=1024, help="default: %(default)s")
    memory.add_argument("--bytes-per-parameter", type=int, default=4, help="of a stashed weight (default: %(default)s)")
    memory.add_argument("--micro-batch-size", type=int, default=1, help="sequences (default: %(default)s)")
    memory.add_argument("--tied", action="store_true", help="the output layer is the word embedding")
    memory.add_argument("--masters", action="store_true", help="mixed precision: float32 masters beside the weights")
    p.add_argument("--data-parallel", type=int, default=1, help="replicas (default: %(default)s)")
    p.add_argument("--tensor-parallel", type=int, default=1, help="slices of a stage (default: %(default)s)")
    p.add_argument("--json", action="store_true", help="print JSON")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints the plan. Raises ValueError for sizes that do not fit each other."""
    schedule = Schedule(args.stages, args.gas, weights=args.weights, extra_in_flight=args.extra_in_flight)
    backward = 2 * args.forward_ms if args.backward_ms is None else args.backward_ms
    if args.forward_ms <= 0 or backward <= 0 or args.link_latency_ms < 0:
        raise ValueError(
            f"--forward-ms {args.forward_ms}, --backward-ms {backward}, --link-latency-ms {args.link_latency_ms}: "
            "compute must take more than 0 ms and the link 0 or more"
        )
    cost = Cost(args.forward_ms / 1e3, backward / 1e3)
    data, tensor = args.data_parallel, args.tensor_parallel
    if data < 1 or tensor < 1:
        raise ValueError(f"--data-parallel {data}, --tensor-parallel {tensor}: give 1 or more, 1 for none")
    tied, traffic = _tied(args), _traffic(args)
    link = _link(args, traffic)
    links = [link] * (args.stages - 1)
    plan = make_plan(schedule, _parameters(args), args.bytes_per_parameter, cost, links, data, tensor)
    if args.json:
        found = plan.to_json()
        if traffic is not None:
            found["link"] = {"down_bytes": traffic.down, "up_bytes": traffic.up}
        if tied is not None:
            found["tied"] = {"bytes": tied.tied, "activation_bytes": tied.gas * tied.activations, "share": tied.share,
                             "enough_gas": tied.enough_gas}  # fmt: skip
        print(json.dumps(found, indent=2))
        return 0
    console = Console()
    _print(console, plan, link, cost)
    if args.num_layers and args.hidden_size:
        _print_methods(console, args, plan)
    if traffic is not None:
        _print_traffic(console, args, traffic)
    if tied is not None:
        _print_tied(console, tied, args.stages)
    return 0


def _traffic(args: argparse.Namespace) -> LinkTraffic | None:
    """What a micro-batch sends over each link; None where a GPT's sizes are not given, or there is no link."""
    names = args.wire.split(",")
    try:
        wire = Wire.read(dict(zip(("activations", "gradients"), names, strict=True)) if len(names) > 1 else args.wire)
    except ValueError as error:
        raise ValueError(f"--wire {args.wire}: {error}") from None
    if args.hidden_size is None or args.stages == 1:
        return None
    return link_traffic(args.hidden_size, args.seq_length, args.micro_batch_size, args.bytes_per_parameter, wire)


def _link(args: argparse.Namespace, traffic: LinkTraffic | None) -> Link:
    latency = args.link_latency_ms / 1e3
    if args.link_mbit is None or args.stages == 1:
        return Link(latency)
    if args.link_mbit <= 0 or traffic is None:
        raise ValueError(
            f"--link-mbit {args.link_mbit:g}: it must be more than 0, and what a link carries follows from a GPT's "
            "sizes; give --num-layers and --hidden-size"
        )
    return Link(latency, *(8 * count / (1e6 * args.link_mbit) for count in (traffic.down, traffic.up)))


def _tied(args: argparse.Namespace) -> TiedTraffic | None:
    """What a tied embedding adds to every link; None where there is none, or no link."""
    if args.tied and (args.num_layers is None or args.hidden_size is None or args.parameters):
        raise ValueError("--tied: what it adds follows from a GPT's sizes; give --num-layers and --hidden-size")
    if not args.tied or args.stages == 1:
        return None
    return tied_traffic(
        args.vocab_size, args.hidden_size, args.seq_length, args.micro_batch_size, args.gas, args.bytes_per_parameter,
        args.tensor_parallel,
    )  # fmt: skip


def _parameters(args: argparse.Namespace) -> list[int] | None:
    if args.parameters:
        try:
            counts = [int(float(word)) for word in args.parameters.split(",")]
        except ValueError:
            raise ValueError(
                f"--parameters {args.parameters}: give numbers separated by commas, such as 25e6,25e6"
            ) from None
        return counts if len(counts) > 1 or args.stages == 1 else [counts[0] // args.stages] * args.stages
    if args.num_layers is None and args.hidden_size is None:
        return None
    if not args.num_layers or not args.hidden_size:
        raise ValueError("--num-layers and --hidden-size belong together: give both, or --parameters")
    if args.num_layers % args.stages:
        raise ValueError(f"--num-layers {args.num_layers} does not divide into {args.stages} stages; use a multiple")
    h = args.hidden_size
    counts = [args.num_layers // args.stages * (12 * h * h + 13 * h)] * args.stages
    counts[0] += (args.vocab_size + args.seq_length) * h
    # A tied weight is its owner's, the first stage's.
    counts[-1] += (0 if args.tied else args.vocab_size * h) + 2 * h
    return counts


def _print_methods(console: Console, args: argparse.Namespace, plan: Plan) -> None:
    """What each method and policy costs stage 0, and a warning where an update eats what the bubble gave."""
    first = plan.stages[0]
    layers, hidden = args.num_layers // args.stages, args.hidden_size
    assert first.parameters is not None
    stage = gpt_stage(layers, hidden, first.parameters - 12 * layers * hidden * hidden)
    tokens = args.micro_batch_size * args.seq_length * args.gas
    prices = []
    for name, row in METHODS.items():
        prices.append((name, name, price(name, stage, tokens, args.masters)))
        if "estimate" in row.params:
            found = price(name, stage, tokens, args.masters, estimate="first")
            # Its row is below its method's: a narrow terminal has no room for more.
            prices.append((f"with {_FIRST}", f"{name}, {_FIRST}", found))
    table = Table(title=f"methods at stage 0, {tokens:,} tokens an update")
    for column in ("method", "state", "with look_ahead", "update"):
        table.add_column(column, justify="right", no_wrap=True)
    for label, _, found in prices:
        share = f"{found.update_share:.1%} of compute" if found.update_share else "memory-bound"
        table.add_row(label, human_bytes(found.state_bytes), f"+ {human_bytes(found.look_ahead_bytes)}", share)
    console.print(table)
    versions = {name: policy.slots(first.lag, args.gas) for name, policy in POLICIES.items()
                if policy.fault(first.lag, args.gas) is None}  # fmt: skip
    console.print(
        "weights at stage 0: "
        + ", ".join(
            f"{name} {human_bytes(count * args.bytes_per_parameter * first.parameters)}"
            for name, count in versions.items()
        )
    )
    saved = 1 / plan.flush - 1 / plan.no_flush
    for _, name, found in prices:
        if found.update_share > saved:
            console.print(
                f"{name}: an update costs {found.update_share:.0%} of a batch's compute, more than the {saved:.0%} "
                "that the flush costs: raise --gas or --micro-batch-size, or choose a method of elements"
            )


def _print_traffic(console: Console, args: argparse.Namespace, traffic: LinkTraffic) -> None:
    sizes = args.hidden_size, args.seq_length, args.micro_batch_size, args.bytes_per_parameter
    others = [f"{name} {human_bytes(link_traffic(*sizes, Wire.read(name)).down)}" for name in WIRES]
    console.print(
        f"each link carries {human_bytes(traffic.down)} of activations a micro-batch down, and "
        f"{human_bytes(traffic.up)} of gradients up; by form of --wire: {', '.join(others)}"
    )


def _print_tied(console: Console, tied: TiedTraffic, stages: int) -> None:
    small = f"K = {tied.enough_gas} makes it less than {float(ENOUGH):.0%}"
    console.print(
        f"tied embedding: each link carries {human_bytes(tied.tied)} more a batch, each way, {tied.share:.1%} of the "
        f"activations' {human_bytes(tied.gas * tied.activations)}"
        + (f"; {small} at this micro-batch" if tied.share >= ENOUGH else "")
    )
    between = "; stages between as much, to hand on" if stages > 2 else ""
    console.print(
        f"the last stage holds a copy and its gradient besides, {human_bytes(2 * tied.tied)} (no moments){between}"
    )


def _print(console: Console, plan: Plan, link: Link, cost: Cost) -> None:
    schedule = plan.schedule
    table = Table(title=f"{schedule.stages} stages, K = {schedule.gas}, weights {schedule.weights}")
    columns = ["stage", "delay", "mean", "versions", "in flight", "loss lag"]
    with_memory = plan.stages[0].parameters is not None
    for column in columns + (["weights", "stash"] if with_memory else []):
        table.add_column(column, justify="right", no_wrap=True)
    for row in plan.stages:
        cells = [row.stage, row.delay, f"{row.mean_delay:g}", row.versions, row.in_flight, row.loss_lag]
        if row.parameters is not None and row.stash_bytes is not None:
            cells += [f"{row.parameters / 1e6:.2f} M", human_bytes(row.stash_bytes)]
        table.add_row(*map(str, cells))
    console.print(table)
    console.print(
        "delay: in updates, largest and mean; versions: of the weights, alive at once; in flight: micro-batches; "
        "loss lag: calls until the stage learns a loss"
    )
    console.print(communicator_line(plan))
    console.print(
        f"predicted utilisation: {plan.no_flush:.1%} without the flush, {plan.flush:.1%} with it: "
        f"{plan.no_flush / plan.flush:.2f} times the throughput"
    )
    if schedule.stages == 1 or link == Link(0.0) or plan.no_flush >= 0.99:
        return
    choice = choose_depth(schedule, [cost] * schedule.stages, [link] * (schedule.stages - 1))
    if choice.extra > schedule.extra_in_flight:
        carried = choice.bound > schedule.gas * (cost.forward + cost.backward)
        console.print(
            f"the link costs {1 - plan.no_flush:.1%}; --extra-in-flight {choice.extra} would hide "
            + ("its latency, at more delay; its bandwidth sets the pace" if carried else "it, at more delay")
        )
