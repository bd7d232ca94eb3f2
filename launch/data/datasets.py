"""Training, validation and test samples, from megatron-core's datasets."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from megatron.core.datasets import gpt_dataset
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig, MockGPTDataset
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import get_blend_from_list

from noflush.launch.arguments.files import all_prefixes
from noflush.launch.arguments.settings import Settings
from noflush.launch.data.index import read_index
from noflush.launch.data.token_ids import fault, first_outside
from noflush.launch.data.tokenizer import Tokenizer
from noflush.launch.refusal import RefusedError
from noflush.launch.training.evaluations import evaluations_until


class CheckedDataset(IndexedDataset):  # type: ignore[misc]
    """Documents of a pair, whose token ids are looked at as they are read.

    An id without an embedding is an IndexError on a CPU and an assertion of the device on a GPU; and megatron-core
    takes -1 for padding.

    Args:
        prefix: of the pair.
        vocabulary: token ids there are.
        mmap: whether to map the .bin.
    """

    def __init__(self, prefix: str, vocabulary: int, mmap: bool) -> None:
        super().__init__(prefix, mmap=mmap)
        self._vocabulary = vocabulary

    def get(self, idx: int, offset: int = 0, length: int | None = None) -> Any:
        """Token ids of a document from ``offset`` on. Raises RefusedError for one outside the vocabulary."""
        ids = super().get(idx, offset, length)
        at = first_outside(ids, self._vocabulary)
        if at is not None:
            raise RefusedError(fault(self.path_prefix, int(idx), offset + at, int(ids[at]), self._vocabulary))
        return ids


class GPTDataset(gpt_dataset.GPTDataset):  # type: ignore[misc]
    """megatron-core's, over checked documents; its name, by which cached indices are found, is the same."""

    @staticmethod
    def build_low_level_dataset(dataset_path: str, config: GPTDatasetConfig) -> CheckedDataset:
        """The documents of ``dataset_path``."""
        return CheckedDataset(dataset_path, config.tokenizer.vocab_size, config.mmap_bin_files)


def samples_needed(settings: Settings) -> tuple[int, int, int]:
    """Training, validation and test samples that a run reads, as Megatron counts them."""
    steps = settings.steps
    evaluation = steps.eval_iterations * steps.eval_size
    before_the_last = evaluations_until(steps.iterations, steps.eval_every, steps.eval_from)
    return steps.samples, (before_the_last + 1) * evaluation, evaluation


def _of_data(tokenizer: Tokenizer, prefixes: Sequence[str]) -> Tokenizer:
    """``tokenizer``, by which cached indices are named, with the data: other data of the same name has others."""
    named = copy.copy(tokenizer)
    named.unique_identifiers = OrderedDict(tokenizer.unique_identifiers)
    named.unique_identifiers["data"] = {prefix: read_index(prefix).identity() for prefix in prefixes}
    return named


def build_datasets(settings: Settings, tokenizer: Tokenizer, reads: bool) -> Sequence[Any]:
    """(training, validation, test) datasets, each None on ranks that do not read, or where there is no such data.

    Collective: rank 0 builds the cached indices, the others wait for them.
    """
    data = settings.data
    prefixes = all_prefixes(data)

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
        tokenizer=_of_data(tokenizer, prefixes),
        reset_position_ids=data.reset_positions,
        reset_attention_mask=data.reset_mask,
        eod_mask_loss=data.mask_eod,
        create_attention_mask=data.reset_mask,
    )
    kind = MockGPTDataset if data.mock else GPTDataset
    builder = BlendedMegatronDatasetBuilder(kind, list(samples_needed(settings)), lambda: reads, config)
    built: Sequence[Any] = builder.build()
    return built
