"""A checkpoint of pretrain_gpt.py as one state dict in the names of megatron-core's GPTModel, and back.

DeepSpeed keeps a file for every layer and tensor-parallel slice (layer_03-model_01-model_states.pt). Layer 0 is the
embedding, then come the transformer layers, the final norm and, unless it is tied, the output layer. Imports no host.
"""

from __future__ import annotations

import dataclasses
import pickle
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from noflush.launch.arguments.progress import Position
from noflush.launch.arguments.settings import Model
from noflush.launch.gpt.slices import GptSlices
from noflush.launch.training.beside_weights import WEIGHTS_ALONE, write_manifest, write_model
from noflush.stage.checkpoint import write_latest

State = dict[str, Tensor]

_FILE = re.compile(r"layer_(\d+)-model_(\d+)-model_states\.pt")
# Transformer Engine's layers hold the norms in the projections behind them.
_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
}
# Megatron-core's split layers insist on an entry that nobody else needs.
_EXTRA = "_extra_state"
_WITH_EXTRA = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2", "output_layer")


def _place(name: str) -> tuple[str, str]:
    """(megatron-core's prefix with {} for the layer, the pipeline layer's prefix) of a name in a layer's file."""
    for ours, plain in (("layer.", "decoder.layers.{}."), ("norm.", "decoder.final_layernorm.")):
        if name.startswith(ours):
            return plain, ours
    return "", ""


def read_weights(checkpoint: Path, model: Model) -> State:
    """All weights of a checkpoint, in the dtype they were trained in; a tied output layer has no entry of its own.

    Raises ValueError if a part is missing or cannot be read.
    """
    files: dict[int, dict[int, Path]] = {}
    for path in checkpoint.iterdir():
        if found := _FILE.fullmatch(path.name):
            files.setdefault(int(found[1]), {})[int(found[2])] = path
    layers = model.layers + (2 if model.tied else 3)
    count = max((max(slices) + 1 for slices in files.values()), default=1)
    missing = [
        f"layer_{layer:02d}-model_{number:02d}-model_states.pt"
        for layer in range(layers)
        for number in range(count)
        if number not in files.get(layer, {})
    ]
    if missing:
        raise ValueError(f"{checkpoint} is incomplete: {', '.join(missing[:3])}{' ...' * (len(missing) > 3)} missing")
    state: State = {}
    rule = GptSlices(model.gated)
    for layer in range(layers):
        slices = [_load(files[layer][number]) for number in range(count)]
        for name in slices[0]:
            plain, ours = _place(name)
            full = plain.format(layer - 1) + name[len(ours) :]
            if lacking := [number for number, part in enumerate(slices) if name not in part]:
                raise ValueError(f"{files[layer][lacking[0]]} has no {name}, and {files[layer][0]} has")
            state[full] = rule.merge(name, [part[name] for part in slices])
    return state


def _load(path: Path) -> State:
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(f"{path} cannot be read: {str(error).splitlines()[0]}") from None
    weights = {}
    for name, value in found.items() if isinstance(found, dict) else [("weights", None)]:
        if not str(name).endswith(_EXTRA):
            if not isinstance(value, Tensor):
                raise ValueError(f"{path} is no layer of a checkpoint: {name} is no tensor")
            for fused, plain in _FUSED_NORMS.items():
                name = name.replace(fused, plain)
            weights[name] = value
    return weights


def pad_vocabulary(state: State, model: Model, multiple: int) -> tuple[State, Model]:
    """Both with the vocabulary brought up to a multiple of ``multiple`` by rows of zeros, which count as padding.

    The loss gives them neither probability nor gradient, no token looks them up, and weight decay leaves zeros zeros:
    they add nothing to any norm, in any dtype, and a tokenizer that grows into them finds no other token's meaning.
    """
    rows = -(-model.vocabulary // multiple) * multiple
    if rows == model.vocabulary:
        return state, model
    state = dict(state)
    for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
        if name in state:
            weight = state[name]
            state[name] = torch.cat([weight, weight.new_zeros(rows - len(weight), weight.shape[1])])
    return state, dataclasses.replace(model, vocabulary=rows, vocabulary_padding=rows - model.token_ids)


def write_checkpoint(folder: str | Path, state: Mapping[str, Tensor], model: Model, tensor_parallel: int = 1) -> Path:
    """Writes ``state`` as a checkpoint of weights alone; pretrain_gpt.py loads it by ``--load FOLDER --finetune``.

    It fits any number of stages and data-parallel replicas, and the one size of tensor parallelism it was written for.
    Raises ValueError if the model does not divide by that, or if ``folder`` holds a checkpoint already.
    """
    sizes = {"heads": model.heads, "query groups": model.query_groups, "MLP channels": model.ffn_hidden}
    sizes["rows of the vocabulary"] = model.vocabulary
    for what, size in sizes.items():
        if size % tensor_parallel:
            raise ValueError(f"{size} {what} do not divide into {tensor_parallel} tensor-parallel slices")
    checkpoint = Path(folder) / "global_step0"
    if Path(folder).exists() and any(Path(folder).iterdir()):
        raise ValueError(f"{folder} is not empty: give a new folder")
    checkpoint.mkdir(parents=True)
    layers: dict[int, dict[str, Tensor]] = {}
    for name, weight in state.items():
        number, ours = _in_pipeline(name, model)
        layers.setdefault(number, {})[ours] = weight
    rule = GptSlices(model.gated)
    for number, weights in layers.items():
        cut = {name: rule.split(name, weight, tensor_parallel) for name, weight in weights.items()}
        for rank in range(tensor_parallel):
            # Cloned: torch.save would write the whole weight behind a slice.
            part: dict[str, Tensor | None] = {name: slices[rank].clone() for name, slices in cut.items()}
            for name in weights:
                owner, _, kind = name.rpartition(".")
                if kind == "weight" and owner.endswith(_WITH_EXTRA):
                    part[f"{owner}.{_EXTRA}"] = None
            torch.save(part, checkpoint / f"layer_{number:02d}-model_{rank:02d}-model_states.pt")
    # DeepSpeed reads one such file whatever the number of ranks, if it says that there is one.
    head = {"module": None, "global_steps": 0, "global_samples": 0, "skipped_steps": 0, "dp_world_size": 1}
    torch.save(
        {**head, "mp_world_size": 1, "noflush": dataclasses.asdict(Position())},
        checkpoint / "mp_rank_00_model_states.pt",
    )
    (checkpoint / WEIGHTS_ALONE).touch()
    write_model(checkpoint, model)
    write_manifest(checkpoint)
    write_latest(folder, checkpoint.name)
    return checkpoint


def _in_pipeline(name: str, model: Model) -> tuple[int, str]:
    """(number of the pipeline's layer, name in it) of megatron-core's ``name``."""
    if found := re.fullmatch(r"decoder\.layers\.(\d+)\.(.*)", name):
        return int(found[1]) + 1, f"layer.{found[2]}"
    if name.startswith("decoder.final_layernorm."):
        return model.layers + 1, name.replace("decoder.final_layernorm.", "norm.")
    return (model.layers + 2 if name.startswith("output_layer.") else 0), name
