"""How many weights and bytes each stage of a GPT has on one rank. Pure: nothing is built.

Weights are counted exactly; activations are estimated after Korthikanti et al. (2022), equation 2, for an attention
that keeps no score matrix: 34 s b h bytes a layer in 16 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from noflush.launch.arguments.settings import Model, Settings
from noflush.order.schedule import Schedule

_MASTER = 4


def parameters_of_layer(model: Model, tensor: int = 1) -> int:
    """Weights of one transformer layer on one of ``tensor`` slices."""
    h, projection = model.hidden, model.heads * model.kv_channels
    norm = h * (2 if model.normalization == "LayerNorm" else 1)
    qkv = (projection + 2 * model.query_groups * model.kv_channels) // tensor
    fc1 = (2 if model.gated else 1) * model.ffn_hidden // tensor
    count = 2 * norm + h * qkv + projection // tensor * h + h * fc1 + model.ffn_hidden // tensor * h
    if model.bias:
        count += qkv + fc1 + 2 * h  # the projections' biases are whole on every slice
    elif model.qkv_bias:
        count += qkv
    if model.qk_norm:
        count += 2 * model.kv_channels * (2 if model.normalization == "LayerNorm" else 1)
    return count


def parameters_by_stage(model: Model, layers_by_stage: Sequence[int], tensor: int = 1) -> list[int]:
    """Weights of every stage on one of ``tensor`` slices; a tied embedding counts on both its stages."""
    counts = [layers * parameters_of_layer(model, tensor) for layers in layers_by_stage]
    words = model.vocabulary // tensor * model.hidden
    positions = model.max_positions * model.hidden if model.positions == "learned_absolute" else 0
    norm = model.hidden * (2 if model.normalization == "LayerNorm" else 1)
    counts[0] += words + positions
    # DeepSpeed builds a tied layer whole on both stages, its positions included.
    counts[-1] += norm + (0 if model.tied and len(counts) == 1 else words + (positions if model.tied else 0))
    return counts


def parameters(model: Model) -> int:
    """Weights of the whole model; a tied embedding counts once."""
    return sum(parameters_by_stage(model, [model.layers]))


@dataclass(frozen=True)
class StageBytes:
    """Bytes of one rank of one stage.

    Attributes:
        weights: the newest version, its gradients, float32 masters and moments.
        stash: the versions besides.
        activations: of all micro-batches in flight; estimated.
    """

    weights: int
    stash: int
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.stash + self.activations


def bytes_by_stage(settings: Settings, schedule: Schedule) -> list[StageBytes]:
    """What every stage needs under ``schedule``."""
    model, ranks = settings.model, settings.ranks
    width = 4 if settings.precision == "fp32" else 2
    zero = settings.deepspeed.get("zero_optimization") or {}
    sharded = ranks.data if zero.get("stage") else 1
    gradient = 4 if (settings.deepspeed.get("data_types") or {}).get("grad_accum_dtype") == "fp32" else width
    moment = 2 if _moments_in_bf16(settings) else 4
    found = []
    for stage, count in enumerate(parameters_by_stage(model, settings.layers_by_stage, ranks.tensor)):
        state = 2 * moment + (_MASTER if width == 2 else 0)
        owned = count
        if model.tied and 0 < stage == ranks.pipeline - 1 and not schedule.flushes:
            owned -= model.vocabulary // ranks.tensor * model.hidden  # read, not updated
        weights = count * (width + gradient) + owned * state // sharded
        stash = owned * width * (schedule.versions_alive(stage) - 1)
        held = schedule.in_flight(stage) * _activations(settings, settings.layers_by_stage[stage], width)
        if settings.steps.recompute is not None:
            held += _of_layer(settings, width)  # the one being recomputed
        if stage == ranks.pipeline - 1:
            # Logits, once in the model's dtype and once in float32 for the loss.
            samples = max(settings.batch.micro, settings.steps.eval_micro if settings.steps.eval_iterations else 0)
            held += model.sequence * samples * model.vocabulary // ranks.tensor * (width + 4)
        found.append(StageBytes(weights, stash, held))
    return found


def _of_layer(settings: Settings, width: int) -> int:
    """Of one micro-batch in one layer."""
    model = settings.model
    # 34 = 10 outside the split part, 24 within it.
    return int(model.sequence * settings.batch.micro * model.hidden * width * (10 + 24 / settings.ranks.tensor) / 2)


def _activations(settings: Settings, layers: int, width: int) -> int:
    """Of one micro-batch between its forward and its backward, in ``layers`` layers."""
    model, steps = settings.model, settings.steps
    boundary = model.sequence * settings.batch.micro * model.hidden * width
    whole = _of_layer(settings, width)
    if steps.recompute is None:
        return int(layers * whole)
    if steps.recompute == "block":
        kept = max(0, layers - steps.recompute_layers)
        return int(kept * whole + (layers - kept) * boundary)
    return int(layers * boundary)


def _moments_in_bf16(settings: Settings) -> bool:
    params = (settings.deepspeed.get("optimizer") or {}).get("params") or {}
    return params.get("moments") == "bf16"


def describe(model: Model) -> Sequence[str]:
    """Words for a model: size and kind."""
    kind = [model.normalization, model.activation + (" gated" if model.gated else ""), model.positions]
    if model.query_groups != model.heads:
        kind.append(f"{model.query_groups} key-value heads")
    kind.append("tied" if model.tied else "untied")
    if model.transformer_impl != "local":
        kind.append(f"layers of {model.transformer_impl}")
    return kind
