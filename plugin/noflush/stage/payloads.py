"""What a script may give to a stage, and a stage to the next one: checks of outputs, losses and batches.

DeepSpeed takes what it is given until some line far from the cause fails; here the first micro-batch is looked at, and
what does not fit is one sentence that says which stage returned what, and what is allowed.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from noflush.stage.messages import DTYPES, PayloadSpec


class PayloadError(TypeError):
    """A stage's outputs, a loss or a batch of a kind that cannot be used; the message says what it was, and may be."""


def check_outputs(outputs: Any, stage: int) -> None:
    """Raises PayloadError unless ``outputs`` can be sent: a dense tensor, or a tuple of one or more."""
    parts = outputs if isinstance(outputs, tuple) else (outputs,)
    if parts and all(isinstance(t, Tensor) and t.dtype in DTYPES and t.layout is torch.strided for t in parts):
        return
    raise PayloadError(
        f"stage {stage} returned {describe(outputs)}: the last layer of a stage must return a dense tensor, or a tuple "
        "of tensors, for the next stage's first layer; return tensors alone, and carry what else there is in the batch "
        "or in the layers"
    )


def check_alike(spec: PayloadSpec, first: PayloadSpec, stage: int, micro_batch: str) -> None:
    """Raises ValueError unless ``stage`` made of ``micro_batch`` what it had made of the first one: ``first``."""
    if spec != first:
        raise ValueError(
            f"stage {stage} made {spec} of {micro_batch}, but {first} was agreed with the first one: every micro-batch "
            "must have one shape; drop the last partial batch (drop_last=True) or pad"
        )


def check_loss(loss: Any) -> None:
    """Raises PayloadError unless ``loss`` is one that backward can start from: a tensor of one element."""
    if not (isinstance(loss, Tensor) and loss.numel() == 1 and loss.is_floating_point()):
        raise PayloadError(
            f"the last stage's loss is {describe(loss)}: it must be one tensor of one element, such as a mean; return "
            "what else is to be reported by the module's get_additional_losses()"
        )
    if torch.is_grad_enabled() and not loss.requires_grad:
        raise PayloadError(
            "the last stage's loss depends on nothing that trains: no parameter of any stage has requires_grad set, or "
            "a layer detaches what it returns; unfreeze one, or look for detach() and no_grad()"
        )


def check_batch(batch: Any, stage: int, stages: int) -> None:
    """Raises PayloadError unless ``batch`` is (inputs, labels) with what ``stage`` of ``stages`` reads of it.

    The first stage reads the inputs, a tensor or a tuple or list of tensors; the last one the labels, of any kind.
    """
    pair = isinstance(batch, (tuple, list)) and len(batch) >= (2 if stage == stages - 1 else 1)
    inputs = batch[0] if pair else None
    members = inputs if isinstance(inputs, (tuple, list)) else (inputs,)
    readable = stage > 0 or (members and all(isinstance(t, Tensor) for t in members))
    if not pair or not readable:
        raise PayloadError(
            f"stage {stage} was given {describe(batch)} as a micro-batch: it must be (inputs, labels), inputs being a "
            "tensor or a tuple of tensors; give one by the loader's collate_fn, or by engine.set_batch_fn(function)"
        )


def describe(value: Any) -> str:
    """``value`` in words: its kind, and the kinds inside of containers."""
    if isinstance(value, Tensor):
        kind = str(value.dtype).removeprefix("torch.")
        sparse = "" if value.layout is torch.strided else f" {str(value.layout).removeprefix('torch.')}"
        return f"a{sparse} tensor {kind}{list(value.shape)}"
    if isinstance(value, dict):
        return "a dict {" + _some([f"{key!r}: {describe(item)}" for key, item in value.items()]) + "}"
    if isinstance(value, (tuple, list)):
        return f"{'an empty' if not value else 'a'} {type(value).__name__}" + (
            f" ({_some([describe(item) for item in value])})" if value else ""
        )
    return "None" if value is None else f"{'an' if type(value).__name__[0] in 'aeiou' else 'a'} {type(value).__name__}"


def _some(words: Sequence[str], most: int = 4) -> str:
    return ", ".join([*words[:most], *(["..."] if len(words) > most else [])])
