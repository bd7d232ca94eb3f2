"""The demo of groups: two pipelines of two stages that average their weights, of which one dies and comes back.

    python examples/groups.py [--text FILE] [--out runs/groups]

Both train one Megatron GPT with launch/pretrain_gpt.py, each in its own world, on disjoint samples of one order. When
the second has done some updates, both its processes are killed; then it is started again without a checkpoint, takes
the first one's weights over while that trains on, and goes on. Writes groups.png.
"""

import argparse
import itertools
import json
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
from compare import HERE, ONE_CORE_A_STAGE, console, prepare
from matplotlib.figure import Figure
from rich.progress import BarColumn, Progress, TextColumn

from noflush.demo.port import held_port
from noflush.replicas.lighthouse import Lighthouse

STAGES = 2
COLOURS = {"first": "#4c78a8", "second": "#e45756"}
_ITERATION = re.compile(r"iteration +(\d+)/.*lm loss: (\S+)")
_GROUPS = re.compile(r"groups: (\d+) \(")
TOKENS = 8 * 128
"""Of a call."""


class Group:
    """One group's processes: each is started by torchrun, in a world of its own."""

    def __init__(self, name, data, args, lighthouse, progress):
        self.name, self.args, self._data, self._progress = name, args, data, progress
        self.points = []  # (seconds, iteration, loss)
        self.alive = []  # (seconds, groups)
        self.code = None
        self._config = args.out / name / "ds_config.json"
        self._config.parent.mkdir(parents=True, exist_ok=True)
        config = json.loads((HERE / "ds_config.json").read_text())
        config["optimizer"] = {"type": "DelayAwareMuon", "params": {"look_ahead": 0.9}}
        replicas = {"lighthouse": lighthouse, "average_every": 10, "fraction": 0.1, "name": name, "timeout_s": 30.0}
        config["async_pipeline"] |= {"replicas": replicas}
        self._config.write_text(json.dumps(config, indent=2))
        self.task = progress.add_task(name, total=None, note="")
        self._runs = 0

    def start(self):
        """Starts it, and has its output followed."""
        self._runs += 1
        with held_port() as port:
            command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(STAGES)]
            command += ["--master-port", str(port), "--module", "noflush.launch.pretrain_gpt"]
            command += [f"@{HERE / 'gpt_demo.args'}", *self._data, "--data-cache-path", str(self.args.out / "cache")]
            command += ["--pipeline-model-parallel-size", str(STAGES), "--train-iters", str(100 * self.args.steps)]
            command += ["--lr-warmup-fraction", "0", "--lr-warmup-iters", "30", "--lr-decay-style", "constant"]
            command += ["--lr", "4e-3", "--eval-iters", "0", "--exit-signal-handler", "--deepspeed"]
            command += ["--deepspeed_config", str(self._config), "--log-interval", "5"]
            streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
            self.process = subprocess.Popen(command, **streams, text=True, env=ONE_CORE_A_STAGE)
        self._progress.update(self.task, note="starts")
        thread = threading.Thread(target=self._follow, args=(self.process,), daemon=True)
        thread.start()
        return thread

    def kill(self):
        """All its processes, at once."""
        agent = psutil.Process(self.process.pid)
        for process in [agent, *agent.children(recursive=True)]:  # torchrun's ranks have sessions of their own
            process.kill()
        self._progress.update(self.task, note="killed")

    def end(self):
        """Its ranks are told to end, as a cluster does before the time is up."""
        for process in psutil.Process(self.process.pid).children():
            process.terminate()

    def _follow(self, process):
        with open(self.args.out / self.name / f"log{self._runs}.txt", "w") as log:
            for line in process.stdout:
                log.write(line)
                now = time.monotonic() - self.args.begun
                if found := _ITERATION.search(line):
                    self.points.append((now, int(found[1]), float(found[2])))
                    note = f"loss {float(found[2]):.3f}"
                    self._progress.update(self.task, completed=int(found[1]), note=note)
                if found := _GROUPS.search(line):
                    self.alive.append((now, int(found[1])))
        self.code = process.wait()


def rate(points, width=5.0):
    """Tokens a second over time: (seconds, rate), over windows of ``width`` seconds at least."""
    found, first = [], 0
    for last, (now, iteration, _) in enumerate(points):
        if now - points[first][0] >= width:
            begun, before, _ = points[first]
            found.append(((begun + now) / 2, (iteration - before) * TOKENS / (now - begun)))
            first = last
    return found


def draw(groups, path, killed, back):
    """Loss, live groups and tokens a second over time."""
    figure = Figure(figsize=(9, 7), layout="constrained")
    loss, live, speed = figure.subplots(3, 1, sharex=True, height_ratios=[3, 1, 2])
    for group in groups:
        colour = COLOURS[group.name]
        lives = [[p for p in group.points if p[0] < killed], [p for p in group.points if p[0] >= killed]]
        for number, points in enumerate(lives if group.name == "second" else [group.points]):
            label = f"{group.name} group" if not number else None
            loss.plot([p[0] for p in points], [p[2] for p in points], color=colour, label=label)
            rates = rate(points)
            speed.plot([t for t, _ in rates], [r for _, r in rates], color=colour)
    alive = groups[0].alive
    times, counts = [t for t, _ in alive], [n for _, n in alive]
    end = max(p[0] for group in groups for p in group.points)
    begin = min(p[0] for group in groups for p in group.points)
    live.step([begin, *times, end], [1, *counts, counts[-1] if counts else 1], where="post", color="#555555")
    for axes in (loss, live, speed):
        axes.axvline(killed, color="#999999", linestyle=":")
        axes.axvline(back, color="#999999", linestyle=":")
        axes.spines[["top", "right"]].set_visible(False)
    loss.text(killed, loss.get_ylim()[1], " killed", va="top", color="#666666")
    loss.text(back, loss.get_ylim()[1], " back", va="top", color="#666666")
    loss.set_ylabel("training loss (nats)")
    loss.set_title("Two groups of two stages; their weights are averaged while they train")
    loss.legend(frameon=False)
    live.set_ylabel("groups")
    live.set_yticks([1, 2])
    speed.set_ylabel("tokens/s")
    speed.set_ylim(bottom=0)
    speed.set_xlabel("seconds")
    figure.savefig(path, dpi=130)


def wait_for(condition, group, seconds):
    """Until ``condition()``, or the group or the time ends."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end or group.process.poll() is not None:
            log = sorted((group.args.out / group.name).glob("log*.txt"))[-1]
            sys.exit(f"the {group.name} group did not come to where it should; its log: {log}")
        time.sleep(0.1)


def main(args):
    """The demo."""
    data = prepare(args.text, args.out)
    lighthouse = Lighthouse()
    columns = (TextColumn("{task.description:>8}"), BarColumn(), TextColumn("{task.completed:>4}"),
               TextColumn("{task.fields[note]}"))  # fmt: skip
    args.begun = time.monotonic()
    with Progress(*columns, console=console) as progress:
        first, second = groups = [Group(name, data, args, lighthouse.address, progress) for name in ("first", "second")]
        threads = [group.start() for group in groups]
        try:
            wait_for(lambda: second.points and second.points[-1][1] >= args.steps, second, 240)
            second.kill()
            killed = time.monotonic() - args.begun
            threads[1].join(30)
            wait_for(lambda: first.alive and first.alive[-1][1] == 1, first, 60)
            threads[1] = second.start()
            wait_for(lambda: second.points[-1][0] > killed, second, 240)
            back = next(t for t, *_ in second.points if t > killed)
            both_again = second.points[-1][1] + args.steps
            wait_for(lambda: second.points[-1][1] >= both_again, second, 400)
            for group, thread in zip(groups, threads, strict=True):
                group.end()
                thread.join(60)
        finally:
            for group in groups:
                if group.process.poll() is None:
                    group.kill()
    lighthouse.close()
    if any(group.code != 0 for group in groups):
        sys.exit(f"exit statuses {[group.code for group in groups]}; logs in {args.out}")
    draw(groups, args.out / "groups.png", killed, back)
    at_death = [p for p in first.points if p[0] < killed][-1]
    gaps = [b[0] - a[0] for a, b in itertools.pairwise(first.points)]
    born = next(p for p in second.points if p[0] > killed)
    console.print(
        f"second group killed after {killed:.0f} s at iteration {second_last(second, killed)}, back after {back:.0f} s "
        f"at iteration {born[1]}, where the first one was: no checkpoint was read.\n"
        f"first group: at iteration {at_death[1]} when the other died; the longest it took for 5 iterations was "
        f"{max(gaps):.1f} s, the median {sorted(gaps)[len(gaps) // 2]:.1f} s.\n"
        f"loss at the end: {first.points[-1][2]:.3f} and {second.points[-1][2]:.3f} nats.  {args.out / 'groups.png'}"
    )


def second_last(second, killed):
    """The iteration at which it was killed."""
    return [p for p in second.points if p[0] < killed][-1][1]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", help="train on the bytes of this file (default: Python's standard library)")
    parser.add_argument("--out", type=Path, default=Path("runs/groups"), help="folder of all files")
    parser.add_argument("--steps", type=int, default=200, help="updates before the death, and after the return")
    main(parser.parse_args())
