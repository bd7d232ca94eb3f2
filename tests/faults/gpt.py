"""One rank of launch/pretrain_gpt.py in little; it stops where a fault is to strike."""

from __future__ import annotations

import json
import os
import resource
import sys

from tests.faults.plain import Victim

ITERATIONS, SAVE_EVERY, EVALUATES = 6, 2, 5
TIMEOUT_MINUTES = 1
PEER_TIMEOUT_S = 5
SMALL = (
    "--num-layers 2 --hidden-size 16 --num-attention-heads 2 --seq-length 8 --max-position-embeddings 8 "
    f"--micro-batch-size 2 --train-iters {ITERATIONS} --lr 3e-3 --lr-decay-style constant --clip-grad 0.0 "
    "--untie-embeddings-and-output-weights --mock-data --vocab-size 31 --attention-dropout 0 --hidden-dropout 0 "
    f"--eval-iters 1 --eval-interval {EVALUATES} --num-workers 0 --log-interval 1 --pipeline-model-parallel-size 2 "
    f"--save-interval {SAVE_EVERY} --distributed-timeout-minutes {TIMEOUT_MINUTES} --save {{save}} --load {{save}}"
)
CONFIG = {
    "optimizer": {"type": "DelayAwareNAdamW", "params": {"betas": [0.99, 0.999]}},
    "async_pipeline": {"enabled": True, "peer_timeout_s": PEER_TIMEOUT_S},
}


def arguments(folder, save):
    """The run's arguments; its files are in ``folder``."""
    config = folder / "ds_config.json"
    config.write_text(json.dumps(CONFIG))
    words = SMALL.format(save=save).split()
    return [*words, "--deepspeed_config", str(config), "--data-cache-path", str(folder / "cache")]


def main(rank, world, port, folder, argv, phase, log, full_disk=False, job=None):
    """The process, its output in ``log``.

    ``full_disk``: from its second save on, files cannot grow beyond a size that a checkpoint's need. ``job``: the
    number of another SLURM job, whose rank this is.
    """
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1",
    )  # fmt: skip
    if job:
        os.environ["SLURM_JOB_ID"] = job
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    victim = Victim(folder, phase)
    _strike(victim, full_disk)
    victim.at("meeting")
    from noflush.launch.pretrain_gpt import main as pretrain

    status = pretrain(argv)
    sys.stdout.flush()
    os._exit(status)


def _strike(victim, full_disk):
    """Puts the phases of ``victim`` into this process."""
    import torch

    from noflush.launch.training import start
    from noflush.patches.deepspeed.engine import NoFlushEngine

    torch.set_num_threads(1)
    build, leave, write = start.build_engine, start.leave, torch.save
    train, evaluate = NoFlushEngine.train_batch, NoFlushEngine.eval_batch
    steps = [0]

    def built(*args, **kwargs):
        victim.at("start-up")
        return build(*args, **kwargs)

    def trained(engine, *args, **kwargs):
        steps[0] = engine.global_steps
        victim.at("first call" if not steps[0] else f"call {steps[0]}")
        return train(engine, *args, **kwargs)

    def evaluated(engine, *args, **kwargs):
        victim.at("evaluating")
        return evaluate(engine, *args, **kwargs)

    def written(*args, **kwargs):
        if steps[0] >= 2 * SAVE_EVERY - 1:
            if full_disk:
                # Less than a layer's file needs, and more than the log, which is a file too.
                resource.setrlimit(resource.RLIMIT_FSIZE, (16384, resource.RLIM_INFINITY))
            victim.at("saving")
        return write(*args, **kwargs)

    def left():
        victim.at("ending")
        leave()

    start.build_engine, start.leave, torch.save = built, left, written
    NoFlushEngine.train_batch, NoFlushEngine.eval_batch = trained, evaluated
