"""The model as a DeepSpeed pipeline: layers in order, each with random numbers of its own, and parameter groups."""

from __future__ import annotations

from collections.abc import Container
from itertools import accumulate
from typing import Any

import torch
from deepspeed.pipe import LayerSpec, PipelineModule, TiedLayerSpec
from deepspeed.runtime.pipe.topology import PipeModelDataParallelTopology
from torch import nn

from noflush.launch.arguments.settings import Model, Settings
from noflush.launch.gpt.config import layer_spec, transformer_config
from noflush.launch.gpt.layers import Block, Embedding, FinalNorm, Head, NextTokenLoss, tied_head
from noflush.launch.gpt.matrices import mark_matrices
from noflush.launch.gpt.slices import GptSlices
from noflush.patches.deepspeed.cut_module import CutPipelineModule


class _Seeded:
    """A layer built late, by random numbers of its own: the weights are alike however the model is split."""

    seed: int
    typename: type[nn.Module]
    module_args: tuple[Any, ...]

    def build(self, log: bool = False) -> nn.Module:
        # Seeding is the device's generator's too, from which dropout draws: it goes on afterwards where it stood.
        devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(self.seed)
            return self.typename(*self.module_args)


class SeededLayer(_Seeded, LayerSpec):  # type: ignore[misc]
    def __init__(self, seed: int, typename: type[nn.Module], *args: Any) -> None:
        super().__init__(typename, *args)
        self.seed = seed


class _TiedEmbedding(_Seeded, TiedLayerSpec):  # type: ignore[misc]
    def __init__(self, seed: int, *args: Any, forward_fn: Any = None) -> None:
        shared = "word_embeddings_weight"
        super().__init__("embedding", Embedding, *args, forward_fn=forward_fn, tied_weight_attr=shared)
        self.seed = seed


def layer_specs(
    model: Model,
    seed: int,
    tensor_parallel: int = 1,
    recomputed: Container[int] = (),
) -> list[LayerSpec]:
    """Embedding, ``model.layers`` blocks, final norm and output layer, none built yet.

    ``recomputed``: numbers of the blocks, from 1, that recompute their activations.
    """
    config = transformer_config(model, tensor_parallel)
    spec = layer_spec(model)
    # Seeds far apart, so that runs with neighbouring seeds share no layer's draws.
    seeds = [seed * 100_003 + number for number in range(model.layers + 2)]
    layers: list[LayerSpec] = [
        _TiedEmbedding(seeds[0], config, model) if model.tied else SeededLayer(seeds[0], Embedding, config, model)
    ]
    for number in range(1, model.layers + 1):
        layers.append(SeededLayer(seeds[number], Block, config, spec, model, number, number in recomputed))
    layers.append(SeededLayer(seeds[-1], FinalNorm, config))
    if model.tied:
        layers.append(_TiedEmbedding(seeds[0], config, model, forward_fn=tied_head))
    else:
        layers.append(SeededLayer(seeds[-1], Head, config, model))
    return layers


def next_token_loss(model: Model) -> NextTokenLoss:
    """The loss of ``model``, whose padded ids have no probability."""
    return NextTokenLoss(model.loss_in_low_precision, model.token_ids if model.vocabulary_padding else None)


def recomputing(settings: Settings) -> set[int]:
    """Numbers of the transformer layers that recompute their activations: so many first ones of every stage."""
    steps, by_stage = settings.steps, settings.layers_by_stage
    most = {None: 0, "block": steps.recompute_layers, "uniform": settings.model.layers}[steps.recompute]
    found: set[int] = set()
    for layers, end in zip(by_stage, accumulate(by_stage), strict=True):
        before = end - layers
        found |= {*range(before + 1, before + 1 + min(most, layers))}
    return found


def build_pipeline(settings: Settings) -> PipelineModule:
    """The run's module on this rank. torch.distributed and megatron-core's groups must be there."""
    steps, ranks = settings.steps, settings.ranks
    topology = PipeModelDataParallelTopology(num_pp=ranks.pipeline, num_mp=ranks.tensor, num_dp=ranks.data)
    layers = layer_specs(settings.model, steps.seed, ranks.tensor, recomputing(settings))
    module = CutPipelineModule(
        layers=layers,
        parts=[0, *(1 + end for end in accumulate(settings.layers_by_stage[:-1])), len(layers)],
        topology=topology,
        loss_fn=next_token_loss(settings.model),
        seed_layers=False,
        slice_rule=GptSlices(settings.model.gated),
    )
    mark_matrices(module, settings.model, ranks.tensor, settings.optimizer.split_qkv)
    return module


def parameter_groups(module: nn.Module, decay_all: bool = False) -> list[dict[str, Any]]:
    """Two groups, as Megatron's: weights that decay, and biases and other one-dimensional ones that do not.

    ``decay_all``: one group, of all.
    """
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            spared = not decay_all and (name.endswith(".bias") or parameter.dim() == 1)
            (others if spared else decayed).append(parameter)
    groups = [{"params": decayed, "wd_mult": 1.0}, {"params": others, "wd_mult": 0.0, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
