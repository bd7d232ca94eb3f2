"""Stands in for launch/pretrain_gpt.py: the same arguments, files, signals and log line, around a tiny model.

With it a failure of these tests is one of the batch script, of SLURM or of the engine, and not of Megatron's arguments.
"""

from __future__ import annotations

import signal
import sys

told_to_end: list[str] = []
for number in (signal.SIGUSR1, signal.SIGTERM):  # before the seconds that the imports below take
    signal.signal(number, lambda n, frame: told_to_end.append(signal.Signals(n).name))

import argparse  # noqa: E402
import os  # noqa: E402
import time  # noqa: E402
from pathlib import Path  # noqa: E402


class Parser(argparse.ArgumentParser):
    def convert_arg_line_to_args(self, line):
        return line.partition("#")[0].split()


parser = Parser(fromfile_prefix_chars="@")
parser.add_argument("--train-iters", type=int, required=True)
parser.add_argument("--save-interval", type=int, required=True)
parser.add_argument("--save", type=Path, required=True)
parser.add_argument("--load", type=Path, required=True)
parser.add_argument("--exit-signal-handler", action="store_true")
parser.add_argument("--dry-run", action="store_true")
parser.add_argument(
    "--pause", type=float, default=0.1, help="seconds an iteration takes at least, for a model so small"
)
args = parser.parse_args()
if args.dry_run:
    print(f"dry run of {os.environ.get('WORLD_SIZE', 'as many as needed')} ranks, {args.train_iters} iterations")
    sys.exit()
assert args.exit_signal_handler
assert args.load == args.save

from noflush.launch.ranks import export, rendezvous  # noqa: E402

found = rendezvous(os.environ)
print(found, flush=True)
export(found, os.environ)

import deepspeed  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from deepspeed.pipe import LayerSpec, PipelineModule  # noqa: E402
from torch import nn  # noqa: E402

import noflush  # noqa: E402

CONFIG = {
    "train_micro_batch_size_per_gpu": 4,
    "gradient_accumulation_steps": 1,
    "optimizer": {"type": "DelayAwareNAdamW", "params": {"lr": 1e-2}},
    "async_pipeline": {"enabled": True, "peer_timeout_s": 60},
}


def batch(iteration):
    """The same for an iteration whenever it is asked for: the sum of 16 numbers is to be learnt."""
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(iteration))
    return iter([(x, x.sum(dim=1, keepdim=True))])


noflush.register()
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # it would be compiled, and is never called
deepspeed.init_distributed("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
layers = [LayerSpec(nn.Linear, 16, 16), LayerSpec(nn.Linear, 16, 16), LayerSpec(nn.Linear, 16, 16)]
layers = [*layers, LayerSpec(nn.Linear, 16, 1)]
model = PipelineModule(layers=layers, num_stages=found.world_size, loss_fn=nn.MSELoss(), partition_method="uniform")
engine, *_ = deepspeed.initialize(model=model, config=CONFIG)


def save():
    """``latest`` names the checkpoint when every rank has written its part."""
    engine.save_checkpoint(str(args.save), tag=f"global_step{engine.global_steps}", save_latest=False)
    dist.barrier()
    if rank == 0:
        write("latest", f"global_step{engine.global_steps}")


def write(name, text):
    (args.save / f"{name}.part").write_text(text)
    (args.save / f"{name}.part").replace(args.save / name)


if (args.load / "latest").exists():
    engine.load_checkpoint(str(args.load))
    print(f"resumed at iteration {engine.global_steps}", flush=True)
end = False
while engine.global_steps < args.train_iters and not end:
    start = time.monotonic()
    loss = engine.train_batch(data_iter=batch(engine.global_steps))
    done = engine.global_steps
    if rank == found.world_size - 1:
        print(f" iteration {done:8d}/{args.train_iters:8d} | lm loss: {loss.item():.9E} |", flush=True)
    flag = torch.tensor([float(bool(told_to_end))])
    dist.all_reduce(flag)
    end = bool(flag.item())
    if done % args.save_interval == 0 or end or done == args.train_iters:
        save()
    time.sleep(max(0.0, args.pause - (time.monotonic() - start)))
if end and engine.global_steps < args.train_iters and rank == 0:
    write(
        "stopped", f"iteration {engine.global_steps} of {args.train_iters}, {told_to_end[0] if told_to_end else 'told'}"
    )
dist.barrier()
dist.destroy_process_group()
