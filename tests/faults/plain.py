"""One rank of a small DeepSpeed pipeline under noflush, as a user's script has it; it stops where a fault is to strike.

The victim writes its phase into a file and waits there for the driver's signal, so that every fault hits its phase.
"""

from __future__ import annotations

import atexit
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

CALLS, SAVES, EVALUATES, STEADY = 8, (3, 6), 5, 5
GPT = {"vocabulary": 32, "sequence": 8, "width": 16, "heads": 2, "depth": 3}
PEER_TIMEOUT_S = 4
MEETING_TIMEOUT_S = 8


class Victim:
    """Where this rank waits for its fault; ``phase`` is None on ranks that nothing happens to."""

    def __init__(self, folder, phase):
        self.reached = Path(folder) / "reached"
        self.phase = phase

    def at(self, phase):
        """Waits here, if this is the phase: for a kill for ever, for a stop until it is continued."""
        if phase == self.phase:
            self.phase = None
            self.reached.touch()
            deadline = time.monotonic() + 60
            while self.reached.exists() and time.monotonic() < deadline:
                time.sleep(0.01)


def main(rank, world, port, folder, save, phase, log):
    """The process: as a script's, its output in ``log``, an uncaught error told by the hook, handlers run."""
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
        DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1",
    )  # fmt: skip
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(out, 1)
    os.dup2(out, 2)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    status = 0
    try:
        script(rank, world, save, Victim(folder, phase))
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    os._exit(status)


def script(rank, world, save, victim):
    """Trains CALLS calls, resumed from ``save`` if there is a checkpoint; the last stage prints every call's loss."""
    import deepspeed
    import torch

    import noflush
    from noflush.stage.checkpoint import newest_complete
    from tests.multiproc import training as t

    noflush.register()
    torch.set_num_threads(1)
    victim.at("meeting")
    deepspeed.init_distributed("gloo", timeout=timedelta(seconds=MEETING_TIMEOUT_S), verbose=False)
    build_module = deepspeed.pipe.PipelineModule.__init__

    def built(module, *args, **kwargs):
        build_module(module, *args, **kwargs)
        victim.at("start-up")

    deepspeed.pipe.PipelineModule.__init__ = built
    engine = t.build(world, t.ds_config(1, block={"peer_timeout_s": PEER_TIMEOUT_S}), gpt=GPT)
    write = torch.save
    if newest_complete(save):
        engine.load_checkpoint(save)

    def strike(*_):
        if engine.global_steps == 0:
            victim.at("first call")
        if engine.global_steps == STEADY and not engine.evaluating:
            victim.at("steady state")
        if engine.evaluating:
            victim.at("evaluating")

    def strike_and_write(*args, **kwargs):
        if engine.global_steps == SAVES[1]:
            victim.at("saving")
        return write(*args, **kwargs)

    engine.module.register_forward_pre_hook(strike)
    torch.save = strike_and_write
    for call in range(engine.global_steps, CALLS):
        loss = engine.train_batch(iter(t.data(1, gpt=GPT, seed=call)))
        if rank == world - 1:
            print(f"call {call} loss {loss.item()!r}")
        if call == EVALUATES:
            engine.eval_batch(iter(t.data(2, gpt=GPT, seed=99)), num_micro_batches=2)
        if call + 1 in SAVES:
            engine.save_checkpoint(save)
    engine.drain()
    victim.at("ending")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    print("ended well")
