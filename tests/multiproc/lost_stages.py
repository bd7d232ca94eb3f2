"""Groups of which one stage's process dies, and comes back: what the tests and the benchmark run."""

from __future__ import annotations

import os
import signal
import time

import torch

from noflush.stage.alone import is_alone
from tests.multiproc import training as t
from tests.multiproc.group_training import RATE, block, gpt_of


def train_losing(
    rank, where, name, seed, stages, calls, gas=1, dies=None, dies_again=None, will=None, slow=0.02, optimizer=RATE,
    more=None, extra=None, between=None, wire="model", dies_after=None, until=None, ended=None,
    peer_timeout_s=1800.0,
):  # fmt: skip
    """One rank of a group.

    ``dies``: the call before which this rank's process is killed, by rank, leaving ``will``; ``dies_again``: that of
    one that has come back; ``dies_after``: the last stage dies after as many micro-batches. ``between``: called with
    engine and call after each; what it returns is kept. ``until``: a file at which it ends before its last call;
    ``ended``: one that it leaves at its end.
    """
    recorded, losses = t.recording()

    def loss_fn(outputs, labels):
        if dies_after is not None and len(losses) == dies_after and not is_alone():
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGKILL)
        return recorded(outputs, labels)

    replicas = block(where, name=name, reroute=True, **{"average_every": 3, **(extra or {})})
    config = t.ds_config(gas, optimizer, {**replicas, "wire": wire, "peer_timeout_s": peer_timeout_s}, **(more or {}))
    engine = t.build(stages, config, gpt=gpt_of(stages), loss_fn=loss_fn)
    engine.group.join()
    began, times, kept = engine.global_steps, [], []
    last = dies_again if is_alone() else (dies or {}).get(rank)
    while engine.global_steps < calls and not (until and until.exists()):
        call = engine.global_steps
        if call == last:
            time.sleep(0.5)  # what was sent is on its way
            if will:
                torch.save(result_of(engine, losses, times) | {"began": began}, will)
            os.kill(os.getpid(), signal.SIGKILL)
        engine.train_batch(iter(t.data(gas, seed=seed + 1000 * call)))
        times.append(time.monotonic())
        if between is not None:
            kept.append(between(engine, call))
        time.sleep(slow)
    engine.drain()
    if ended and rank == 0:  # the last one to need the others
        ended.touch()
    return result_of(engine, losses, times) | {"began": began, "kept": kept}


def result_of(engine, losses, times):
    """What the oracle compares."""
    rerouting = engine.group.lost_stages.rerouting
    return {
        "losses": losses,
        "weights": [p.detach().clone() for p in engine.module.parameters()],
        "served": list(rerouting.guests.served),
        "exchanges": list(engine.group.averager.exchanges),
        "born_of": engine.group.averager.born_of,
        "key": engine.group.key,
        "times": times,
        "heard": engine.batch_losses(),
    }
