"""``noflush compare``: update rules under delay on one device, each at its own tuned learning rate."""

from __future__ import annotations

import argparse
import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from noflush.compare import campaign, picture, tables
from noflush.compare.agenda import Plan
from noflush.compare.contestants import CONTESTANTS, chosen
from noflush.compare.halving import RUNGS
from noflush.compare.ledger import Ledger
from noflush.compare.result import Panel, panel, to_json
from noflush.compare.settings import LEAST_UPDATES, SEARCH_SEED, Task

INTERRUPTED = 130
_WIDTH = 160  # of tables that go into a file


def add(commands: Any) -> None:
    """Declares the subcommand."""
    p = commands.add_parser("compare", help="update rules under delay, each at its own tuned learning rate")
    p.add_argument(
        "--methods",
        default="adamw,nadam",
        help=f"of {', '.join(CONTESTANTS)}, separated by commas; each brings its synchronous row, and sync-adamw is "
        "there always (default: %(default)s)",
    )
    p.add_argument(
        "--contestant",
        action="append",
        default=[],
        metavar="JSON",
        help='one of your own: {"name": ..., "optimizer": {"type": ..., "params": {}}, "weights": "stash", '
        '"schedule": "1f1b_no_flush", "rates": [...]}; may be repeated',
    )
    p.add_argument(
        "--stages", default="8", help="virtual pipeline stages P, separated by commas (default: %(default)s)"
    )
    p.add_argument("--gas", type=int, default=1, help="gradient_accumulation_steps K (default: %(default)s)")
    p.add_argument("--seeds", type=int, default=3, help="runs reported of each (default: %(default)s)")
    p.add_argument("--tokens", type=float, default=500_000, help="of each of them (default: 500000)")
    p.add_argument(
        "--lr-budget",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="longest run of a search for a learning rate, as a share of --tokens (default: %(default)s)",
    )
    p.add_argument("--stage-ms", type=float, default=30.0, help="forward and backward of a micro-batch at a stage, for "
                   "equal time (default: %(default)s)")  # fmt: skip
    p.add_argument("--width", type=int, default=64)
    p.add_argument("--heads", type=int, default=4)
    p.add_argument("--sequence", type=int, default=64)
    p.add_argument("--depth", type=int, help="transformer blocks, a multiple of every P (default: one a stage)")
    p.add_argument("--batch", type=int, default=8, help="micro-batch size (default: %(default)s)")
    p.add_argument("--weight-decay", type=float, default=0.01, help="default: %(default)s")
    p.add_argument("--clip", type=float, default=1.0, help="of a stage's gradients; 0: none (default: %(default)s)")
    texts = p.add_mutually_exclusive_group()
    texts.add_argument("--text", help="a file to train on, as bytes (default: the standard library's source)")
    texts.add_argument(
        "--data",
        help="a flat file of token ids, with --vocabulary: uint8 up to 256, uint16 up to 65536, else int32; a Megatron "
        ".bin is one, if its ids are of that size",
    )
    p.add_argument("--vocabulary", type=int, help="with --data: number of ids")
    p.add_argument(
        "--out", default="runs/compare", help="folder of results; the same again goes on (default: %(default)s)"
    )
    p.add_argument("--jobs", type=int, default=1, help="processes, one thread each (default: %(default)s)")
    p.add_argument("--no-picture", action="store_true", help="draw nothing (a picture needs matplotlib)")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Runs what is missing, prints the tables and writes them; exit status 130 when it is broken off."""
    from noflush.compare import corpus

    task, plan = _task(args), _plan(args)
    if not args.no_picture:
        picture.require()
    task = replace(task, digest=corpus.load(task).digest)
    out = Path(args.out)
    ledger = Ledger(out, task)
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=_WIDTH)
    console.print(*_about(plan, task), sep="\n", markup=False, soft_wrap=True)
    try:
        with _terminated_as_interrupted():
            campaign.run(plan, task, ledger, args.jobs, console)
    except KeyboardInterrupt:
        console.print(f"stopped; the same command goes on with what {ledger.path} lacks")
        return INTERRUPTED
    except RuntimeError as error:
        console.print(str(error), markup=False)
        return 1
    panels = [panel(plan, task, stages, ledger.find, args.stage_ms) for stages in plan.stages]
    settings = {name: value for name, value in vars(args).items() if name not in ("run", "command", "out")}
    about = [*_about(plan, task), _spent(panels, plan, task)]
    (out / "compare.md").write_text(tables.markdown(panels, task, about, args.stage_ms))
    (out / "compare.json").write_text(json.dumps(to_json(panels, settings), indent=1))
    if not args.no_picture:
        picture.draw(panels, out / "compare.png")
    _print(console, panels, task, args.stage_ms)
    console.print(about[-1])
    console.print(f"written: {out}/compare.md, compare.json" + ("" if args.no_picture else ", compare.png"))
    return 0


def _task(args: argparse.Namespace) -> Task:
    if (args.data is None) != (args.vocabulary is None):
        raise ValueError("--data and --vocabulary belong together: give the file of ids and how many ids there are")
    if args.vocabulary is not None and args.vocabulary < 2:
        raise ValueError(f"--vocabulary {args.vocabulary}: it must be 2 or more")
    names = ("width", "heads", "sequence", "depth", "batch", "gas", "text", "data", "weight_decay", "clip")
    return Task(**{name: getattr(args, name) for name in names}, vocabulary=args.vocabulary or 256)


def _plan(args: argparse.Namespace) -> Plan:
    for name, value in (("--seeds", args.seeds), ("--jobs", args.jobs)):
        if value < 1:
            raise ValueError(f"{name} {value}: it must be 1 or more")
    if not 0 < args.lr_budget <= 1:
        raise ValueError(f"--lr-budget {args.lr_budget:g}: it must be above 0 and no more than 1, a share of --tokens")
    if not args.stage_ms > 0:
        raise ValueError(f"--stage-ms {args.stage_ms:g}: it must be above 0")
    try:
        stages = tuple(dict.fromkeys(int(word) for word in args.stages.split(",")))
    except ValueError:
        raise ValueError(f"--stages {args.stages}: give numbers separated by commas, such as 8,32") from None
    if min(stages) < 1:
        raise ValueError(f"--stages {args.stages}: every one must be 1 or more")
    if args.depth is not None and (args.depth < 1 or any(args.depth % p for p in stages)):
        raise ValueError(f"--depth {args.depth} does not divide into {args.stages} stages; give a multiple of each")
    per_update = args.batch * args.gas * args.sequence
    updates = int(args.tokens // per_update) if args.tokens > 0 else 0
    shortest = int(updates * args.lr_budget * RUNGS[0])
    if shortest < LEAST_UPDATES:
        need = round(LEAST_UPDATES / RUNGS[0] / args.lr_budget + 1) * per_update
        raise ValueError(
            f"--tokens {args.tokens:g}: {updates} updates of {per_update} tokens, of which a search's shortest run "
            f"has {shortest}, and {LEAST_UPDATES} are needed; give {need} or more"
        )
    plan = Plan(
        contestants=tuple(chosen([name for name in args.methods.split(",") if name], args.contestant)),
        stages=stages,
        seeds=args.seeds,
        updates=updates,
        search_updates=round(updates * args.lr_budget),
    )
    for contestant in plan.contestants:
        for p in stages:
            contestant.plan(p, args.gas)
    return plan


def _about(plan: Plan, task: Task) -> list[str]:
    of = task.data or task.text or "the standard library's source"
    blocks = ", ".join(str(task.blocks(p)) for p in plan.stages)
    rungs = ", ".join(str(round(plan.search_updates * share)) for share in RUNGS)
    return [
        f"a GPT of {blocks} blocks of width {task.width}, {task.heads} heads, on {of} ({task.vocabulary} ids)",
        f"{plan.updates} updates of {task.gas} x {task.batch} x {task.sequence} tokens: "
        f"{plan.updates * task.tokens_per_update:,} tokens; warm-up over 5 %, cosine to a tenth; "
        f"weight decay {task.weight_decay:g}, clipping at {task.clip:g} a stage; {plan.seeds} seeds from 1",
        f"learning rates by successive halving, runs of {rungs} updates from seed {SEARCH_SEED}, judged on another "
        "part of the held-out text",
    ]


def _spent(panels: list[Panel], plan: Plan, task: Task) -> str:
    rows = [row for one in panels for row in one.rows]
    searched = sum(row.search_tokens for row in rows)
    each = searched / len(rows) / (plan.updates * task.tokens_per_update)
    return f"spent on learning rates: {searched:,} tokens, {each:.2f} times a reported run for each contestant and P"


def _print(console: Console, panels: list[Panel], task: Task, stage_ms: float) -> None:
    for one in panels:
        table = Table(title=tables.title(one, task))
        for column in tables.COLUMNS:
            table.add_column(
                column, justify="left" if column == "contestant" else "right", no_wrap=column == "contestant"
            )
        for row in one.rows:
            table.add_row(*tables.cells(row))
        console.print(table)
        console.print(tables.time_line(one, stage_ms))
    for line in tables.notes(panels):
        console.print(f"- {line}", soft_wrap=True)


@contextmanager
def _terminated_as_interrupted() -> Iterator[None]:
    """SIGTERM ends things as Ctrl-C does, so that workers are ended too."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
