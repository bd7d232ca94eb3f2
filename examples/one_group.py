"""One group of several, as a script: start it twice or more, with a lighthouse that all reach.

torchft_lighthouse --bind 127.0.0.1:29510 --min_replicas 1 --join_timeout_ms 1000
RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=29601 python -m noflush.run examples/one_group.py --name a   # and
RANK=1 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=29601 python -m noflush.run examples/one_group.py --name a
... the same with --name b and MASTER_PORT=29602, which is another world

If rank 1 dies, its pipeline goes on through the other group's, until the rank is back:

RANK=1 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=29601 python -m noflush.rejoin examples/one_group.py --name a
"""

import argparse
import time

import deepspeed
import torch
from deepspeed.pipe import LayerSpec, PipelineModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--name", required=True)
parser.add_argument("--lighthouse", default="127.0.0.1:29510")
parser.add_argument("--calls", type=int, default=300)
parser.add_argument("--stages", type=int, default=2)
parser.add_argument("--seconds", type=float, default=0.02, help="slept in each call")
args = parser.parse_args()

CONFIG = {
    "train_micro_batch_size_per_gpu": 8,
    "gradient_accumulation_steps": 2,
    "steps_per_print": 20,
    "optimizer": {"type": "DelayAwareNAdamW", "params": {"lr": 1e-3}},
    "async_pipeline": {
        "replicas": {
            "lighthouse": args.lighthouse, "average_every": 10, "fraction": 0.2, "timeout_s": 10.0,
            "reroute": True, "name": args.name,
        },
    },
}  # fmt: skip

deepspeed.init_distributed("gloo")
torch.set_num_threads(1)
torch.manual_seed(0)
layers = [LayerSpec(nn.Linear, 32, 64), nn.ReLU(), LayerSpec(nn.Linear, 64, 64), nn.ReLU(), LayerSpec(nn.Linear, 64, 2)]
model = PipelineModule(layers=layers, num_stages=args.stages, loss_fn=nn.CrossEntropyLoss())
engine, *_ = deepspeed.initialize(model=model, config=CONFIG)

numbers = torch.randn(4096, 32, generator=torch.Generator().manual_seed(1))
samples = TensorDataset(numbers, (numbers.sum(dim=1) > 0).long())  # is the sum of the 32 numbers positive?
data = iter(DataLoader(samples, batch_size=8, sampler=engine.group_samples(len(samples))))

# By what the engine has done, not by this process's own count: it may have come to others that were far already.
while engine.global_steps < args.calls:
    loss = engine.train_batch(data_iter=data)
    time.sleep(args.seconds)
engine.drain()
if engine.global_rank == 0:
    losses = list(engine.batch_losses().values())[-50:]
    print(f"done: {engine.global_steps} calls, mean of the last {len(losses)} losses {sum(losses) / len(losses):.4f}")
