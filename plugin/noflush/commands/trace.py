"""``noflush trace``: the traces of all ranks as one picture and one Chrome trace, and the bubble they show."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console

from noflush.watch import trace
from noflush.watch.timeline import draw_timeline


def add(commands: Any) -> None:
    """Declares the subcommand."""
    p = commands.add_parser("trace", help="merge the ranks' traces; picture, Chrome trace, measured bubble")
    p.add_argument("folder", help="what async_pipeline.trace_dir named")
    p.add_argument("--png", help="draw the timeline of the newest events into this file")
    p.add_argument("--chrome", help="write a Chrome trace (for ui.perfetto.dev) into this file")
    p.add_argument("--window-s", type=float, help="seconds of the timeline to draw (default: some 24 actions a stage)")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints the bubble by stage and writes what was asked for. Raises ValueError for a folder without traces."""
    found = trace.read(args.folder)
    console = Console()
    for stage, share in trace.bubble(found).items():
        console.print(f"stage {stage}: bubble {share:.1%} of the time in train_batch()")
    if args.chrome:
        Path(args.chrome).write_text(json.dumps(trace.to_chrome(found.events)))
        console.print(f"Chrome trace: {args.chrome}")
    if args.png:
        draw_timeline([("", found.events)], args.png, args.window_s)
        console.print(f"timeline: {args.png}")
    return 0
