"""A GPT of 134 M parameters by the Megatron launcher, 30 iterations on one GPU: tokens a second, and memory."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import math
import sys
from pathlib import Path

import torch

from noflush.launch.pretrain_gpt import main as pretrain
from tests.bench.gpu_parts import device as gpu
from tests.bench.gpu_parts.megatron_log import figures

_CONFIGS = Path(__file__).parents[3] / "launch" / "configs"
_ITERATIONS = 30
_TINY = (
    "--num-layers 2 --hidden-size 32 --num-attention-heads 2 --seq-length 16 --max-position-embeddings 16 "
    "--vocab-size 64 --micro-batch-size 2 --global-batch-size 2"
)


class Tee(io.StringIO):
    """Keeps what is written, and passes it on."""

    def __init__(self, file):
        super().__init__()
        self._file = file

    def write(self, text):
        self._file.write(text)
        return super().write(text)


def arguments(dry, bf16):
    """Of the launcher."""
    found = [f"@{_CONFIGS / 'gpt-134m-paper.args'}", "--pipeline-model-parallel-size", "1", "--mock-data"]
    found += ["--tokenizer-type", "NullTokenizer", "--vocab-size", "50257", "--train-iters", str(_ITERATIONS)]
    found += ["--lr-warmup-iters", "0", "--eval-iters", "0", "--log-interval", "10", *["--bf16"] * bf16]
    return found + (_TINY.split() if dry else [])


def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--bf16", action="store_true")
    p.add_argument("--dry", action="store_true")
    args = p.parse_args()
    device, sequence = gpu.of(args.dry), 16 if args.dry else 512
    log = Tee(sys.stdout)
    with contextlib.redirect_stdout(log):
        status = pretrain(arguments(args.dry, args.bf16))
    if status:
        sys.exit(status)
    ms, batch, losses = figures(log.getvalue())
    row = {
        "ms_an_iteration": ms,
        "tokens_per_s": round(batch * sequence / min(ms) * 1e3),
        "tokens_an_iteration": batch * sequence,
        "losses": losses,
    }
    if device.type == "cuda":
        row["peak_allocated_GB"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        row["peak_reserved_GB"] = round(torch.cuda.max_memory_reserved() / 1e9, 2)
    print(json.dumps(row), flush=True)
    if len(losses) != _ITERATIONS // 10 or not all(map(math.isfinite, losses)):
        sys.exit(f"expected {_ITERATIONS // 10} finite losses")


if __name__ == "__main__":
    main()
