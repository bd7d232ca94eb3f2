"""The demo: trains one Megatron GPT with launch/pretrain_gpt.py, with the flush and without, and compares.

    python examples/compare.py [--text FILE] [--out runs/demo]

The text is tokenized into Megatron's .bin/.idx first; its bytes are the tokens, so that a small model learns something
in a minute. The model's embeddings are tied, as Megatron's are by default. All runs have the same model, data, batch
size and tokens. Without the flush trains what suffers least from the delay, Muon with a look-ahead; with it AdamW, as
most people train, and Muon, the best that is known here. Each has the learning rate that was best for it
(docs/measured.md). Writes summary.json, loss.png and timeline.png.
"""

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from tokenizers.pre_tokenizers import ByteLevel

from noflush.demo.port import held_port
from noflush.demo.text import documents
from noflush.order.actions import Op
from noflush.order.schedule import Schedule
from noflush.order.timing import Cost, play
from noflush.watch import trace
from noflush.watch.timeline import draw_timeline

HERE = Path(__file__).parent
STAGES = 4


@dataclass(frozen=True)
class Run:
    """One of the runs; ``lr`` is the best of those tried."""

    title: str
    schedule: str
    optimizer: dict
    lr: float
    colour: str


MUON = {"type": "DelayAwareMuon", "params": {}}
RUNS = {
    "adamw": Run("AdamW, with the flush", "1f1b_flush", {"type": "PipeDreamAdamW", "params": {}}, 2.8e-3, "#b8a99a"),
    "muon": Run("Muon, with the flush", "1f1b_flush", MUON, 1.6e-2, "#9c755f"),
    "no_flush": Run(
        "Muon looking ahead, no flush",
        "1f1b_no_flush",
        {"type": "DelayAwareMuon", "params": {"look_ahead": 0.9}},
        5.6e-3,
        "#4c78a8",
    ),
}
WITH_ITS_COSTS = {"adamw": "adamw", "muon": "muon", "no_flush": "muon"}
"""Whose compute times a run has with a core a stage: with the flush at most two stages compute at once."""
ONE_CORE_A_STAGE = os.environ | {"OMP_NUM_THREADS": "1"}
console = Console(highlight=False)


def prepare(text, out):
    """The text as .bin/.idx in ``out``, a vocabulary of the 256 bytes beside it; arguments that name both."""
    out.mkdir(parents=True, exist_ok=True)
    letters = {letter: number for number, letter in enumerate(sorted(ByteLevel.alphabet()))}
    (out / "vocab.json").write_text(json.dumps(letters | {"<|endoftext|>": len(letters)}))
    (out / "merges.txt").write_text("#version: 0.2\n")
    with open(out / "corpus.jsonl", "w") as lines:
        lines.writelines(json.dumps({"text": document}) + "\n" for document in documents(text))
    tokenizer = ["--tokenizer-type", "GPT2BPETokenizer"]
    tokenizer += ["--vocab-file", str(out / "vocab.json"), "--merge-file", str(out / "merges.txt")]
    command = [sys.executable, "-m", "noflush.launch.preprocess_data", "--input", str(out / "corpus.jsonl")]
    command += ["--output-prefix", str(out / "corpus"), "--append-eod", *tokenizer]
    with console.status("tokenizing ..."):
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"tokenizing failed: {done.stderr.strip().splitlines()[-1]}")
    console.print(done.stdout.strip())
    return ["--data-path", str(out / "corpus_text_document"), *tokenizer]


def train(name, data, args, port, out):
    """One run in its own processes; returns its loss curve, how long each save held it up (s), and its trace."""
    shutil.rmtree(out / name, ignore_errors=True)
    (out / name).mkdir(parents=True)
    config = json.loads((HERE / "ds_config.json").read_text())
    config["optimizer"] = RUNS[name].optimizer
    config["async_pipeline"] |= {"schedule": RUNS[name].schedule, "trace_dir": str(out / name / "trace")}
    (out / name / "ds_config.json").write_text(json.dumps(config, indent=2))
    lr = args.lr or RUNS[name].lr
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(STAGES)]
    command += ["--master_port", str(port), "--module", "noflush.launch.pretrain_gpt"]
    command += [f"@{HERE / 'gpt_demo.args'}", *data, "--data-cache-path", str(out / "cache")]
    command += ["--train-iters", str(args.steps), "--lr", str(lr), "--min-lr", str(lr / 10), "--seed", str(args.seed)]
    command += ["--eval-interval", str(max(1, args.steps // 10)), "--save", str(out / name)]
    command += ["--save-interval", str(max(1, args.steps // 2)), "--async-save"]
    command += ["--deepspeed", "--deepspeed_config", str(out / name / "ds_config.json")]
    curve, pauses = follow(command, out / name / "log.txt", RUNS[name].title, args.steps)
    return curve, pauses, trace.read(out / name / "trace")


_ITERATION = re.compile(r"iteration +(\d+)/.*elapsed time per iteration \(ms\): ([\d.]+).*lm loss: (\S+)")
_SAVE = re.compile(r"training stood still for ([\d.]+) s")
_VALIDATION = re.compile(r"validation loss at iteration (\d+) \| lm loss value: (\S+)")


def follow(command, log, title, steps):
    """Runs the command with its output in ``log`` and its progress on the screen; stops here if it fails.

    Returns the validation losses, each with the training time and the tokens until then, and the pauses of saves (s).
    """
    columns = (
        TextColumn("{task.description:>28}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    curve, pauses, last, seconds, tokens = [], [], 0, 0.0, 8 * 128
    with open(log, "w") as file, Progress(*columns, console=console) as progress:
        task = progress.add_task(title, total=steps, note="starting 4 processes ...")
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(command, **streams, text=True, env=ONE_CORE_A_STAGE)
        for line in process.stdout:
            file.write(line)
            if found := _ITERATION.search(line):
                step = int(found[1])
                seconds += (step - last) * float(found[2]) / 1e3
                last = step
                note = f" validation {curve[-1]['val_loss']:.3f}" if curve else ""
                progress.update(task, completed=step, note=f"train {float(found[3]):.3f}{note} nats")
            elif found := _VALIDATION.search(line):
                step = int(found[1])
                point = {"step": step, "tokens": step * tokens, "seconds": seconds, "val_loss": float(found[2])}
                curve.append(point)
            elif found := _SAVE.search(line):
                pauses.append(float(found[1]))
        code = process.wait()
    if code:
        console.print("".join(Path(log).read_text().splitlines(keepends=True)[-30:]))
        sys.exit(f"training {title} failed with exit status {code}; its whole log: {log}")
    return curve, pauses


def at_time(curve, seconds):
    """Validation loss of a curve at a time, interpolated between its evaluations."""
    before = [p for p in curve if p["seconds"] <= seconds]
    after = [p for p in curve if p["seconds"] > seconds]
    if not before or not after:
        return (before or after)[-1 if before else 0]["val_loss"]
    a, b = before[-1], after[0]
    share = (seconds - a["seconds"]) / (b["seconds"] - a["seconds"])
    return a["val_loss"] + share * (b["val_loss"] - a["val_loss"])


def costs_of(events):
    """What a micro-batch costs each stage, from a trace: medians, so that a stolen core does not count."""
    costs = []
    for stage in range(STAGES):
        median = {
            op: statistics.median([e.end - e.start for e in events if e.stage == stage and e.op is op])
            for op in (Op.FORWARD, Op.BACKWARD, Op.UPDATE)
        }
        costs.append(Cost(median[Op.FORWARD], median[Op.BACKWARD], median[Op.UPDATE]))
    return costs


def summarise(curves, traces):
    """All the numbers of the comparison."""
    equal_time = min(curve[-1]["seconds"] for curve in curves.values())
    costs = {name: costs_of(traces[WITH_ITS_COSTS[name]].events) for name in curves}
    schedules = {name: Schedule(STAGES, 1, RUNS[name].schedule) for name in curves}
    predicted = {name: play(schedule, costs[name]) for name, schedule in schedules.items()}
    retimed = {
        name: [p | {"seconds": p["step"] * predicted[name].seconds_per_call} for p in curve]
        for name, curve in curves.items()
    }
    equal_time_alone = min(curve[-1]["seconds"] for curve in retimed.values())
    summary = {}
    for name, curve in curves.items():
        schedule, alone = schedules[name], predicted[name]
        tokens = curve[-1]["tokens"]
        summary[name] = {
            "tokens_per_s": tokens / curve[-1]["seconds"],
            "bubble": statistics.mean(trace.bubble(traces[name]).values()),
            "val_loss": curve[-1]["val_loss"],
            "val_loss_equal_time": at_time(curve, equal_time),
            "delay": [schedule.max_delay(s) for s in range(STAGES)],
            "seconds": curve[-1]["seconds"],
            "tokens": tokens,
            "predicted_core_a_stage": {
                "tokens_per_s": tokens / curve[-1]["step"] / alone.seconds_per_call,
                "bubble": 1 - statistics.mean(alone.utilisation),
                "val_loss_equal_time": at_time(retimed[name], equal_time_alone),
            },
        }
    summary["equal_time_s"] = equal_time
    return summary


def print_table(summary):
    """The one table of the demo, and what this machine's cores have to do with it."""
    table = Table(title=f"GPT, {STAGES} stages, K = 1, equal tokens")
    table.add_column("")
    for one in RUNS.values():
        table.add_column(one.title, justify="right")
    runs = [summary[name] for name in RUNS]
    rows = {
        "tokens/s": [f"{r['tokens_per_s']:,.0f}" for r in runs],
        "bubble measured": [f"{r['bubble']:.1%}" for r in runs],
        "validation loss, equal tokens (nats)": [f"{r['val_loss']:.4f}" for r in runs],
        f"validation loss, equal time ({summary['equal_time_s']:.0f} s)": [
            f"{r['val_loss_equal_time']:.4f}" for r in runs
        ],
        "delay by stage (updates)": [" ".join(map(str, r["delay"])) for r in runs],
        "predicted with a core a stage: tokens/s": [
            f"{r['predicted_core_a_stage']['tokens_per_s']:,.0f}" for r in runs
        ],
        "predicted with a core a stage: bubble": [f"{r['predicted_core_a_stage']['bubble']:.1%}" for r in runs],
        "predicted with a core a stage: loss, equal time": [
            f"{r['predicted_core_a_stage']['val_loss_equal_time']:.4f}" for r in runs
        ],
    }
    for label, cells in rows.items():
        table.add_row(label, *cells)
    console.print(table)
    without, best = summary["no_flush"], min((summary["adamw"], summary["muon"]), key=lambda r: r["val_loss"])
    ratio = without["tokens_per_s"] / best["tokens_per_s"]
    alone = [r["predicted_core_a_stage"] for r in (without, best)]
    faster = alone[0]["tokens_per_s"] / alone[1]["tokens_per_s"]
    console.print(
        f"Without the flush this machine, with {os.cpu_count()} cores for {STAGES} stages, trained {ratio:.2f} times "
        f"as fast as the best run with it. At equal tokens it is {_ahead(without, best, 'val_loss')} that one, at "
        f"equal time {_ahead(without, best, 'val_loss_equal_time')} it. Where there are fewer cores than stages the "
        "cores, not the schedule, set the pace; with a core a stage the same compute times give "
        f"{faster:.2f} times the speed (played through the schedule, links free), and at equal time it is "
        f"{_ahead(*alone, 'val_loss_equal_time')} it."
    )


def _ahead(one, other, key):
    """Who is ahead, in words."""
    difference = other[key] - one[key]
    return f"{abs(difference):.3f} nats {'ahead of' if difference > 0 else 'behind'}"


def draw_loss(curves, path):
    """Validation loss against tokens and against time."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, key, label in zip(
        figure.subplots(1, 2), ("tokens", "seconds"), ("tokens", "training time (s)"), strict=True
    ):
        for name, curve in curves.items():
            one = RUNS[name]
            axes.plot(
                [p[key] for p in curve], [p["val_loss"] for p in curve], "o-", ms=3, color=one.colour, label=one.title
            )
        axes.set_xlabel(label)
        axes.set_ylabel("validation loss (nats)")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=130)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--text", help="your own text file (default: the source of Python's standard library)")
    p.add_argument("--out", default="runs/demo")
    p.add_argument("--steps", type=int, default=600)
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--lr", type=float, help="one learning rate for all runs")
    p.add_argument("--port", type=int, help="for the processes of a run to meet at (default: a free one)")
    args = p.parse_args()
    out = Path(args.out).absolute()
    out.mkdir(parents=True, exist_ok=True)
    curves, pauses, traces = {}, {}, {}
    data = prepare(args.text, out / "data")
    for name in RUNS:
        with nullcontext(args.port) if args.port else held_port() as port:
            curves[name], pauses[name], traces[name] = train(name, data, args, port, out)
    summary = summarise(curves, traces)
    call_s = curves["no_flush"][-1]["seconds"] / curves["no_flush"][-1]["step"]
    summary["save"] = {"stood_still_s": pauses["no_flush"][0], "in_micro_batches": pauses["no_flush"][0] / call_s}
    (out / "summary.json").write_text(json.dumps(summary, indent=2))
    draw_loss(curves, out / "loss.png")
    drawn = [(RUNS[name].title, traces[name].events) for name in ("muon", "no_flush")]
    draw_timeline(drawn, str(out / "timeline.png"))
    print_table(summary)
    save = summary["save"]
    console.print(
        f"A checkpoint in the middle of the run without the flush held training up for {save['stood_still_s']:.2f} s, "
        f"{save['in_micro_batches']:.1f} micro-batches' time; nothing drained, and no loss is another for it."
    )
    console.print(f"numbers: {out / 'summary.json'}\nplots: {out / 'loss.png'}, {out / 'timeline.png'}")


if __name__ == "__main__":
    main()
