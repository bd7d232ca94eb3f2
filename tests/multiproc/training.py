"""One rank's training run for the tests, and the simulator's run of the same."""

from __future__ import annotations

import itertools

import torch

from noflush.demo.gpt import gpt_layers, next_token_loss, split_by_blocks
from noflush.order.schedule import Schedule

GPT = {"vocabulary": 32, "sequence": 12, "width": 16, "heads": 2, "depth": 4}
NADAMW = {"type": "DelayAwareNAdamW", "params": {"lr": 3e-3, "betas": [0.99, 0.999], "weight_decay": 0.01}}
ADAMW = {"type": "AdamW", "params": {"lr": 3e-3, "weight_decay": 0.01, "torch_adam": True}}


def layers(gpt=None):
    torch.manual_seed(7)
    return gpt_layers(**(gpt or GPT))


def data(count, batch=3, gpt=None, seed=1):
    shape = (batch, (gpt or GPT)["sequence"])
    draw = torch.Generator().manual_seed(seed)
    vocabulary = (gpt or GPT)["vocabulary"]
    make = lambda: torch.randint(0, vocabulary, shape, generator=draw)  # noqa: E731
    return [(make(), make()) for _ in range(count)]


def ds_config(gas, optimizer=NADAMW, block=None, **more):
    config = {
        "train_micro_batch_size_per_gpu": 3,
        "gradient_accumulation_steps": gas,
        "optimizer": optimizer,
        "gradient_clipping": 0.0,
        "steps_per_print": 1000,
        **more,
    }
    if block is not None:
        config["async_pipeline"] = block
    return config


def recording(loss_of=next_token_loss):
    """``loss_of`` as a loss function, and the list that takes what it gives in training, micro-batch by micro-batch."""
    losses = []

    def loss_fn(outputs, labels):
        loss = loss_of(outputs, labels)
        if torch.is_grad_enabled():
            losses.append(loss.item())
        return loss

    return loss_fn, losses


def build(
    stages,
    config,
    gpt=None,
    dp=1,
    loss_fn=next_token_loss,
    make_layers=layers,
    groups=None,
    cut="type:Block",
    **module_kwargs,
):
    """A pipeline engine over the test GPT: as many blocks a stage, embedding first, head last.

    ``cut`` is another ``partition_method``. ``groups`` makes parameter groups out of a list of parameters.
    """
    import deepspeed
    from deepspeed.pipe import PipelineModule

    parts = split_by_blocks(make_layers(gpt), stages)
    flat = [layer for part in parts for layer in part]
    module = PipelineModule(layers=flat, num_stages=stages, loss_fn=loss_fn, partition_method=cut, **module_kwargs)
    learnt = groups(list(module.parameters())) if groups else None
    engine, *_ = deepspeed.initialize(model=module, config=config, model_parameters=learnt)
    return engine


def train(rank, stages, gas, calls, config, gpt=None, between=None, drain=True, seed=1, **build_kwargs):
    """Trains ``calls`` calls; returns losses seen by loss_fn (last stage) and final weights by layer name."""
    loss_fn, losses = recording()
    engine = build(stages, config, gpt=gpt, loss_fn=loss_fn, **build_kwargs)
    replica = engine.grid.get_data_parallel_rank()
    stream = itertools.islice(data(calls * gas, gpt=gpt, seed=seed + 100 * replica), None)
    returned = []
    for call in range(calls):
        returned.append(engine.train_batch(data_iter=iter(list(itertools.islice(stream, gas)))).item())
        if between:
            between(engine, call)
    if drain and hasattr(engine, "drain"):
        engine.drain()
    weights = [p.detach().clone() for p in engine.module.parameters()]
    return {
        "losses": losses,
        "weights": weights,
        "returned": returned,
        "global_steps": engine.global_steps,
        "updates": getattr(engine, "updates", None),
        "lr": engine.get_lr(),
    }


def simulate(
    stages,
    gas,
    calls,
    make_optimizer,
    block=None,
    gpt=None,
    clip=0.0,
    drain_after=(),
    seed=1,
    make_lr=None,
    make_layers=layers,
    found=None,
    **more,
):
    """The same run in the delay simulator: micro-batch losses (a list a replica), and each stage's final weights.

    ``found`` takes the simulator's skipped updates.
    """
    from noflush.simulate import DelaySimulator

    block = block or {}
    schedule = Schedule(
        stages,
        gas,
        block.get("schedule", "1f1b_no_flush"),
        block.get("weights", "stash"),
        block.get("extra_in_flight", 0),
    )
    parts = split_by_blocks(make_layers(gpt), stages)
    simulator = DelaySimulator(parts, next_token_loss, make_optimizer, schedule, clip, make_lr, **more)
    replicas = more.get("replicas", 1)
    losses = [[] for _ in range(replicas)]
    streams = [data(calls * gas, gpt=gpt, seed=seed + 100 * replica) for replica in range(replicas)]
    for m, batches in enumerate(zip(*streams, strict=True)):
        for kept, loss in zip(losses, simulator.train_replicas(batches), strict=True):
            kept.append(loss.item())
        if (m + 1) % gas == 0 and (m + 1) // gas in drain_after:
            simulator.drain()
    if found is not None:
        found.extend(simulator.skipped)
    return losses if replicas > 1 else losses[0], [list(simulator.parameters(s).values()) for s in range(stages)]


def nadamw(params):
    from noflush.methods import DelayAwareNAdamW

    return DelayAwareNAdamW(params, lr=3e-3, betas=(0.99, 0.999), weight_decay=0.01)


def torch_nadam(params):
    return torch.optim.NAdam(params, lr=3e-3, betas=(0.99, 0.999), weight_decay=0.01, decoupled_weight_decay=True)


def adamw(params):
    return torch.optim.AdamW(params, lr=3e-3, weight_decay=0.01)


def assert_same(results, losses, weights):
    """Every micro-batch's loss and every weight equal the simulator's, bit for bit."""
    assert results[-1]["losses"] == losses
    for stage, (result, expected) in enumerate(zip(results, weights, strict=True)):
        for i, (got, want) in enumerate(zip(result["weights"], expected, strict=True)):
            assert got.dtype == want.dtype
            assert torch.equal(got, want), f"stage {stage}, parameter {i}: {(got - want).abs().max()}"
