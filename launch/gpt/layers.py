"""The layers of the pipeline. What travels between stages: the hidden states [s, b, h], and a mask where one is needed.

A micro-batch's inputs are (tokens [b, s], positions [b, s]) and, where attention stops at ends of documents, a mask
[b, 1, s, s]; its labels are (labels [b, s], loss mask [b, s]).
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor, nn

from noflush.launch.arguments.settings import Model

Hidden = Tensor | tuple[Tensor, Tensor]


class Embedding(nn.Module):
    """Word and position embeddings: (tokens, positions[, mask]) to hidden states [s, b, h] (and the mask)."""

    def __init__(self, config: TransformerConfig, model: Model) -> None:
        super().__init__()
        self.embedding = LanguageModelEmbedding(
            config, model.vocabulary, model.max_positions, position_embedding_type=model.positions
        )

    @property
    def word_embeddings_weight(self) -> Tensor:
        """What a tied output layer shares."""
        weight: Tensor = self.embedding.word_embeddings.weight
        return weight

    def forward(self, inputs: tuple[Tensor, ...]) -> Hidden:
        """Hidden states of the model's dtype."""
        tokens, positions, *mask = inputs
        hidden = self.embedding(tokens, positions)
        return (hidden, mask[0]) if mask else hidden


class Rotary(RotaryEmbedding):  # type: ignore[misc]
    """megatron-core's rotary embedding, on the device of the hidden states rather than always on a GPU."""

    def __init__(self, model: Model) -> None:
        super().__init__(
            kv_channels=model.kv_channels,
            rotary_percent=model.rope_percent,
            rotary_interleaved=model.rope_interleaved,
            seq_len_interpolation_factor=model.rope_interpolation,
            rotary_base=model.rope_base,
            rope_scaling=model.rope_scaling is not None,
            rope_scaling_factor=model.rope_scaling or 1.0,
            use_cpu_initialization=True,
        )
        self._frequencies: Tensor = self.inv_freq
        self._angles: Tensor | None = None

    def angles(self, length: int, device: torch.device) -> Tensor:
        """Angles of the first ``length`` positions: float32 [length, 1, 1, d], kept for the next micro-batch."""
        if self._angles is None or self._angles.shape[0] != length or self._angles.device != device:
            self.inv_freq = self._frequencies.to(device)
            angles: Tensor = self.get_freqs_non_repeated(length)
            pairs = torch.stack((angles, angles), -1).flatten(1) if self.rotary_interleaved else angles.repeat(1, 2)
            self._angles = pairs[:, None, None, :]
        return self._angles


class Block(nn.Module):
    """One transformer layer of megatron-core's. ``number`` counts from 1 over the whole model."""

    def __init__(
        self, config: TransformerConfig, spec: ModuleSpec, model: Model, number: int, recompute: bool = False
    ) -> None:
        super().__init__()
        self.layer = TransformerLayer(config, spec.submodules, layer_number=number)
        self._rotary = Rotary(model) if model.positions == "rope" else None
        self._recompute = recompute

    def forward(self, inputs: Hidden) -> Hidden:
        """Hidden states [s, b, h] to hidden states, the mask handed on."""
        hidden, mask = inputs if isinstance(inputs, tuple) else (inputs, None)
        if self._recompute and torch.is_grad_enabled():
            import deepspeed

            hidden = deepspeed.checkpointing.checkpoint(self._layer, hidden, mask)
        else:
            hidden = self._layer(hidden, mask)
        return hidden if mask is None else (hidden, mask)

    def _layer(self, hidden: Tensor, mask: Tensor | None) -> Tensor:
        angles = None if self._rotary is None else self._rotary.angles(hidden.shape[0], hidden.device)
        output: Tensor = self.layer(hidden_states=hidden, attention_mask=mask, rotary_pos_emb=angles)[0]
        return output


class FinalNorm(nn.Module):
    """The norm behind the last layer; where the mask's way ends."""

    def __init__(self, config: TransformerConfig, norm: Any = WrappedTorchNorm) -> None:
        super().__init__()
        self.norm = norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)

    def forward(self, inputs: Hidden) -> Tensor:
        """Hidden states [s, b, h], normed."""
        output: Tensor = self.norm(inputs[0] if isinstance(inputs, tuple) else inputs)
        return output


class Head(nn.Module):
    """The output layer: hidden states [s, b, h] to this slice's logits [s, b, vocabulary / tensor parallel size]."""

    def __init__(self, config: TransformerConfig, model: Model) -> None:
        super().__init__()
        self.output_layer = tensor_parallel.ColumnParallelLinear(
            config.hidden_size,
            model.vocabulary,
            config=config,
            init_method=config.init_method,
            bias=False,
            skip_bias_add=False,
            gather_output=False,
        )

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits, in the model's dtype."""
        output: Tensor = self.output_layer(hidden)[0]
        return output


def tied_head(embedding: Embedding, hidden: Tensor) -> Tensor:
    """The output layer that shares the word embedding's weights."""
    gathered = tensor_parallel.copy_to_tensor_model_parallel_region(hidden)
    return torch.nn.functional.linear(gathered, embedding.word_embeddings_weight)


class NextTokenLoss:
    """Mean cross-entropy of a micro-batch over the tokens that count.

    Args:
        low_precision: whether the logits stay in the model's dtype (``--fp16-lm-cross-entropy``).
        token_ids: ids that have a probability, the first ones; the vocabulary's other rows have none, nor a gradient.
            None: all rows have one.
    """

    def __init__(self, low_precision: bool = False, token_ids: int | None = None) -> None:
        self._low_precision = low_precision
        self._token_ids = token_ids

    def __call__(self, logits: Tensor, labels: tuple[Tensor, Tensor]) -> Tensor:
        """0-dim float32 loss of ``logits`` [s, b, v] for ``labels`` (token ids [b, s], float mask [b, s]).

        The logits are overwritten: float32 ones by megatron-core's cross-entropy, those of padding in any case.
        """
        targets, mask = labels
        if not self._low_precision:
            logits = logits.float()
        if self._token_ids is not None:
            _mask_padding(logits, self._token_ids)
        losses = tensor_parallel.vocab_parallel_cross_entropy(logits, targets.transpose(0, 1).contiguous())
        mask = mask.transpose(0, 1).float()
        mean: Tensor = (losses.float() * mask).sum() / mask.sum().clamp(min=1.0)
        return mean


def _mask_padding(logits: Tensor, token_ids: int) -> None:
    """Overwrites this slice's ``logits`` [..., v] of padded ids by the dtype's lowest number: a probability of 0.

    Finite, because infinity times the loss mask's zeros would be nan. Autograd need not know: where the softmax is 0
    its gradient is too. A slice may be padding from its first column on; megatron-core subtracts the largest logit of
    all slices.
    """
    columns = logits.shape[-1]
    first = max(0, token_ids - parallel_state.get_tensor_model_parallel_rank() * columns)
    if first < columns:
        logits.detach()[..., first:].fill_(torch.finfo(logits.dtype).min)
