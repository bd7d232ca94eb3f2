"""noflush without DeepSpeed: a plain torch pipeline that never flushes, checked against the simulator to the bit.

python examples/bare_torch.py [--stages 3] [--gas 1] [--weights stash]
"""

import argparse
import multiprocessing

import torch
import torch.distributed as dist
from torch import nn

from noflush.demo.port import held_port
from noflush.methods import DelayAwareNAdamW
from noflush.order.schedule import Schedule
from noflush.simulate import DelaySimulator
from noflush.stage.plain import PlainStage

CALLS, BATCH, WIDTH = 12, 4, 16
loss_fn = nn.functional.mse_loss


def layers(stages):
    """Each stage's part of the network, alike in every process."""
    torch.manual_seed(1)
    return [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH)) for _ in range(stages)]


def data(schedule):
    """Micro-batches of (inputs, labels)."""
    draw = torch.Generator().manual_seed(2)
    make = lambda: torch.randn(BATCH, WIDTH, generator=draw)  # noqa: E731
    return [(make(), make()) for _ in range(CALLS * schedule.gas)]


def make_optimizer(parameters):
    return DelayAwareNAdamW(parameters, lr=1e-2)


def train(rank, schedule, port, results):
    """One stage of the pipeline; the batch losses that it has learnt."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=schedule.stages)
    module = layers(schedule.stages)[rank]
    stage = PlainStage(schedule, module, loss_fn, make_optimizer(module.parameters()))
    batches = iter(data(schedule))
    for _ in range(CALLS):
        stage.train_on(batches)
    stage.drain()
    results.put((rank, stage.batch_losses(), [p.tolist() for p in module.parameters()]))
    dist.barrier()
    dist.destroy_process_group()


def main(stages, gas, weights):
    torch.set_num_threads(1)
    schedule = Schedule(stages, gas, weights=weights)
    simulator = DelaySimulator(layers(stages), loss_fn, make_optimizer, schedule)
    micro = [simulator.train_micro_batch(*batch) for batch in data(schedule)]
    expected = {t + 1: float(sum(micro[t * gas + 1 : (t + 1) * gas], micro[t * gas]) / gas) for t in range(CALLS)}
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    with held_port() as port:
        ranks = [context.Process(target=train, args=(r, schedule, port, results)) for r in range(stages)]
        for process in ranks:
            process.start()
        found = sorted(results.get(timeout=120) for _ in ranks)
    for rank, losses, parameters in found:
        assert losses == expected, f"stage {rank}: {losses} is not {expected}"
        assert parameters == [p.tolist() for p in simulator.parameters(rank).values()], f"stage {rank}: other weights"
    print(f"P = {stages}, K = {gas}, {weights}: {CALLS} losses and all weights equal the simulator's to the bit")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("stages", 3), ("gas", 1), ("weights", "stash")):
        parser.add_argument(f"--{name}", type=type(default), default=default)
    main(**vars(parser.parse_args()))
