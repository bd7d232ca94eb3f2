"""Training, validation and test samples, from megatron-core's datasets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.datasets.utils import get_blend_from_list

from noflush.launch.arguments.settings import Settings
from noflush.launch.data.tokenizer import Tokenizer


def samples_needed(settings: Settings) -> tuple[int, int, int]:
    """Training, validation and test samples that a run reads, as Megatron counts them."""
    steps, size = settings.steps, settings.batch.global_size
    evaluations = steps.iterations // steps.eval_every + 1
    return steps.samples, evaluations * steps.eval_iterations * size, steps.eval_iterations * size


def build_datasets(settings: Settings, tokenizer: Tokenizer, reads: bool) -> Sequence[Any]:
    """(training, validation, test) datasets, each None on ranks that do not read, or where there is no such data.

    Collective: rank 0 builds the cached indices, the others wait for them.
    """
    data = settings.data

    def blend(prefixes: tuple[str, ...] | None) -> Any:
        return get_blend_from_list(list(prefixes)) if prefixes else None

    config = GPTDatasetConfig(
        random_seed=settings.steps.seed,
        sequence_length=settings.model.sequence,
        blend=blend(data.blend),
        blend_per_split=[blend(split) for split in data.splits] if data.splits else None,
        split=data.split if data.blend else None,
        path_to_cache=data.cache,
        mmap_bin_files=data.mmap,
        tokenizer=tokenizer,
        reset_position_ids=data.reset_positions,
        reset_attention_mask=data.reset_mask,
        eod_mask_loss=data.mask_eod,
        create_attention_mask=data.reset_mask,
    )
    kind = MockGPTDataset if data.mock else GPTDataset
    builder = BlendedMegatronDatasetBuilder(kind, list(samples_needed(settings)), lambda: reads, config)
    built: Sequence[Any] = builder.build()
    return built
