"""A small DeepSpeed pipeline run. The only thing noflush changes is the "async_pipeline" block of the config.

deepspeed --num_gpus 2 --module noflush.run examples/plain.py       # without the flush
deepspeed --num_gpus 2 examples/plain.py --flush                    # the same script in stock DeepSpeed
"""

import sys

import deepspeed
import torch
from deepspeed.pipe import LayerSpec, PipelineModule
from torch import nn

CONFIG = {
    "train_micro_batch_size_per_gpu": 16,
    "gradient_accumulation_steps": 2,
    "steps_per_print": 20,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
    "async_pipeline": {"enabled": True},
}
if "--flush" in sys.argv:
    del CONFIG["async_pipeline"]


def batches():
    """Endless (inputs, labels): is the sum of the 32 numbers positive?"""
    draw = torch.Generator().manual_seed(0)
    while True:
        x = torch.randn(CONFIG["train_micro_batch_size_per_gpu"], 32, generator=draw)
        yield x, (x.sum(dim=1) > 0).long()


deepspeed.init_distributed()
torch.manual_seed(0)
layers = [LayerSpec(nn.Linear, 32, 64), nn.ReLU(), LayerSpec(nn.Linear, 64, 64), nn.ReLU(), LayerSpec(nn.Linear, 64, 2)]
model = PipelineModule(layers=layers, num_stages=2, loss_fn=nn.CrossEntropyLoss())
engine, *_ = deepspeed.initialize(model=model, config=CONFIG)

data = batches()
for _ in range(200):
    loss = engine.train_batch(data_iter=data)
if engine.global_rank == 0:
    print(f"done: {engine.global_steps} calls, last known loss {loss.item():.4f}")
