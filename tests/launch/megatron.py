"""Megatron runs in little, for the tests: settings of an argument list, made-up samples, the simulator's twin."""

from __future__ import annotations

import dataclasses
import itertools
import json

import torch

from noflush.launch.arguments.understand import understand

SMALL = (
    "--num-layers 4 --hidden-size 32 --num-attention-heads 4 --seq-length 16 --max-position-embeddings 16 "
    "--micro-batch-size 2 --train-iters 50 --lr 3e-3 --lr-decay-style cosine --min-lr 1e-4 --lr-warmup-iters 3 "
    "--weight-decay 0.1 --clip-grad 0.0 --untie-embeddings-and-output-weights --mock-data --vocab-size 63 "
    "--attention-dropout 0 --hidden-dropout 0 --eval-iters 0 --num-workers 0"
)
LLAMA = (
    " --position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear --group-query-attention "
    "--num-query-groups 2"
)
TIED = "!--untie-embeddings-and-output-weights "
NADAMW = {"type": "DelayAwareNAdamW", "params": {"betas": [0.99, 0.999]}}
VOCABULARY = 64
WORDS = "embedding.word_embeddings.weight"


class TiedHead(torch.nn.Module):
    """An embedding layer as the output layer."""

    def __init__(self, embedding):
        super().__init__()
        self.embedding = embedding

    def forward(self, hidden):
        from noflush.launch.gpt.layers import tied_head

        return tied_head(self.embedding, hidden)


def settings(arguments, world, folder, config=None):
    """Settings of ``SMALL`` with ``arguments`` behind it; ``config`` is the DeepSpeed config.

    ``!option`` among the arguments takes one of ``SMALL`` out.
    """
    path = folder / "ds_config.json"
    path.write_text(json.dumps(config or {"optimizer": NADAMW, "async_pipeline": {"enabled": True}}))
    out = [word[1:] for word in arguments.split() if word.startswith("!")]
    argv = [word for word in f"{SMALL} {arguments}".split() if word not in out and not word.startswith("!")]
    found, _ = understand([*argv, "--deepspeed_config", str(path)], world)
    return dataclasses.replace(found, model=dataclasses.replace(found.model, vocabulary=VOCABULARY))


def samples(count, sequence=16, seed=3):
    """Random tokens and labels: [count, sequence] each."""
    draw = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, VOCABULARY, (count, sequence + 1), generator=draw)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def micro_batch(tokens, labels):
    """What the pipeline takes."""
    positions = torch.arange(tokens.shape[1]).expand_as(tokens).contiguous()
    return (tokens, positions), (labels, torch.ones(labels.shape))


def train(rank, run, calls):
    """Trains ``calls`` calls; this rank's micro-batch losses (last stage), weights and figures."""
    from noflush.launch.training.start import build_engine, join

    join(run.ranks)
    engine = build_engine(run)
    losses, inner = [], engine.module.loss_fn

    def loss_fn(outputs, labels):
        loss = inner(outputs, labels)
        if torch.is_grad_enabled():
            losses.append(loss.item())
        return loss

    engine.module.loss_fn = engine.loss_model = loss_fn
    gas, micro, replicas = run.gas, run.batch.micro, run.ranks.data
    replica = engine.grid.get_data_parallel_rank()
    tokens, labels = samples(calls * gas * micro * replicas)
    for call in range(calls):
        batches = []
        for k in range(gas):
            start = ((call * gas + k) * replicas + replica) * micro
            batches.append(micro_batch(tokens[start : start + micro], labels[start : start + micro]))
        engine.train_batch(data_iter=iter(batches))
    if hasattr(engine, "drain"):
        engine.drain()
    weights = [p.detach().clone() for p in engine.module.parameters()]
    return {"losses": losses, "weights": weights, "norm": engine.get_global_grad_norm(), "lr": engine.get_lr()[0]}


def simulate(rank, run, calls):
    """The same run in the delay simulator: (micro-batch losses, final weights of every stage)."""
    from noflush.launch.arguments.pipelining import schedule_of as pipeline_schedule
    from noflush.launch.gpt.matrices import mark_matrices
    from noflush.launch.gpt.pipeline import layer_specs, next_token_loss
    from noflush.launch.training.learning_rate import rates_of
    from noflush.launch.training.start import join
    from noflush.methods.table import load
    from noflush.simulate import DelaySimulator, Shared

    join(dataclasses.replace(run.ranks, world=1, tensor=1, pipeline=1))
    layers = [spec.build() for spec in layer_specs(run.model, run.steps.seed)]
    for layer in layers:
        mark_matrices(layer, run.model, 1, run.optimizer.split_qkv)
    stages = run.ranks.pipeline
    ends = list(itertools.accumulate(run.layers_by_stage))
    parts = [layers[1 + end - count : 1 + end] for end, count in zip(ends, run.layers_by_stage, strict=True)]
    parts[0] = layers[:1] + parts[0]
    parts[-1] = parts[-1] + layers[-2:]
    shared = []
    if run.model.tied:
        parts[-1][-1] = TiedHead(layers[-1])
        reader = f"{len(parts[-1]) - 1}.embedding.{WORDS}"
        shared = [Shared(((0, f"0.{WORDS}"), (stages - 1, reader)))]

    def make_optimizer(params):
        groups = [
            {"params": [p for p in params if p.dim() > 1], "wd_mult": 1.0},
            {"params": [p for p in params if p.dim() == 1], "wd_mult": 0.0, "weight_decay": 0.0},
        ]
        section = run.deepspeed["optimizer"]
        return load(section["type"])([group for group in groups if group["params"]], **section["params"])

    class Scheduler:
        def __init__(self, optimizer):
            self.inner = rates_of(run)(optimizer)

        def step(self):
            self.inner.step(run.batch.global_size)

    simulator = DelaySimulator(
        [torch.nn.Sequential(*part) for part in parts],
        next_token_loss(run.model),
        make_optimizer,
        pipeline_schedule(run),
        run.deepspeed["gradient_clipping"],
        make_lr_scheduler=Scheduler,
        shared=shared,
    )
    tokens, labels = samples(calls * run.gas * run.batch.micro)
    losses = []
    for start in range(0, len(tokens), run.batch.micro):
        end = start + run.batch.micro
        losses.append(simulator.train_micro_batch(*micro_batch(tokens[start:end], labels[start:end])).item())
    simulator.drain()
    weights = [list(simulator.parameters(s).values()) for s in range(stages)]
    if run.model.tied:  # the engine has a tied layer before all others: the owner's words, and positions of no use
        weights[-1] = [weights[0][0], weights[-1][-1], *weights[-1][:-1]]
    return losses, weights
