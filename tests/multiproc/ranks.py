"""Runs a function on several gloo ranks with a hard time limit: a deadlock is a failure, not a hang."""

from __future__ import annotations

import io
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
import zipfile
from pathlib import Path

from noflush.demo.port import held_port

# The server imports torch, DeepSpeed and Megatron once; ranks are forked from it before any thread or group exists.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
        "torch",
        "deepspeed",
        "noflush.patches.deepspeed.engine",
        "noflush.simulate",
        "noflush.launch.training.loop",
        "noflush.launch.data.datasets",
        "noflush.launch.training.start",
        "tests.multiproc.ranks",
    ]
)


class RankError(AssertionError):
    """A rank failed or did not end in time; carries every rank's traceback."""


def _main(function, rank, world, port, folder, environment, kwargs, back=False):
    os.environ.update(
        environment,
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1",
    )  # fmt: skip
    import deepspeed
    import torch

    import noflush

    noflush.register()
    torch.set_num_threads(1)
    out = Path(folder) / str(rank)
    try:
        if back:
            from noflush.stage import alone

            alone.enter(rank, world)
        deepspeed.init_distributed("gloo")
        result = function(rank, **kwargs)
        # Not plain pickle: for a tensor it names a function, which megatron-core replaces by one of its own, and a test
        # may have put another tree in that one's place.
        held = io.BytesIO()
        torch.save(("ok", result), held)
        out.write_bytes(held.getvalue())
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    except BaseException as error:
        if not out.exists():
            out.write_bytes(pickle.dumps(("error", type(error).__name__, str(error), traceback.format_exc())))
        os._exit(1)


def _read(out):
    import torch

    held = out.read_bytes()
    return (
        torch.load(io.BytesIO(held), weights_only=False) if zipfile.is_zipfile(io.BytesIO(held)) else pickle.loads(held)
    )


def run_ranks(
    function, world, timeout=120, expect_errors=False, environment=(), stopped=(), comes_back=None, **kwargs
):  # fmt: skip
    """``[function(rank, **kwargs) for rank in ...]`` on ``world`` ranks.

    With ``expect_errors``, a failed rank's entry is ``(type name, message)``. Ranks in ``stopped`` are not waited for.
    ``comes_back``: (rank, seconds) of one that dies, and whose process is started again, without its world, so much
    later.
    """
    with held_port() as port, tempfile.TemporaryDirectory() as folder:
        ranks = [
            CONTEXT.Process(target=_main, args=(function, rank, world, port, folder, dict(environment), kwargs))
            for rank in range(world)
        ]
        for process in ranks:
            process.start()
        deadline = time.monotonic() + timeout
        if comes_back:
            back, seconds = comes_back
            ranks[back].join(timeout)
            time.sleep(seconds)
            arguments = (function, back, world, port, folder, dict(environment), kwargs, True)
            ranks[back] = CONTEXT.Process(target=_main, args=arguments)
            ranks[back].start()
        waited_for = [i for i in range(world) if i not in stopped]
        for i in waited_for:
            ranks[i].join(max(0.1, deadline - time.monotonic()))
        late = [i for i in waited_for if ranks[i].is_alive()]
        for process in ranks:
            process.kill()
            process.join()
        results = []
        for rank in range(world):
            out = Path(folder) / str(rank)
            results.append(_read(out) if out.exists() else ("missing",))
        if late:
            raise RankError(f"ranks {late} of {world} did not end within {timeout} s; results: {results}")
        failed = [r for r in results if r[0] != "ok"]
        if failed and not expect_errors:
            raise RankError("\n".join(r[-1] if r[0] == "error" else "rank died" for r in failed))
        return [r[1] if r[0] == "ok" else tuple(r[1:3]) for r in results]
