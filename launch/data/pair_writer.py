"""Writes .bin/.idx pairs that appear under their names when they are complete, all of them or none."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

from noflush.launch.data.encoding import Ids

_ENDINGS = ".bin", ".idx"


def output_faults(prefix: str, keys: Sequence[str]) -> list[str]:
    """What stands in the way of the files, as far as it shows before they are written; one sentence each."""
    folder = Path(prefix).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return [f"--output-prefix {prefix}: the folder {folder} cannot be made ({error.strerror})"]
    if not os.access(folder, os.W_OK | os.X_OK):
        return [f"--output-prefix {prefix}: the folder {folder} cannot be written to"]
    targets = [Path(f"{prefix}_{key}_document{ending}") for key in keys for ending in _ENDINGS]
    return [f"--output-prefix {prefix}: {path} is a directory; remove it" for path in targets if path.is_dir()]


class PairWriter:
    """The pairs ``PREFIX_KEY_document``.bin and .idx of one corpus, a pair a key; a context.

    They are written in a folder beside their place, ``PREFIX.partial-...``, which goes when the context ends, however
    it ends. Pairs of these names from before stay until `finish`.

    Args:
        prefix: of the names.
        keys: of the pairs.
        vocabulary: token ids there are; it decides between 2 and 4 bytes a token.

    Raises OSError naming the file that cannot be written.
    """

    def __init__(self, prefix: str, keys: Sequence[str], vocabulary: int) -> None:
        self._names = [f"{prefix}_{key}_document" for key in keys]
        self._dtype = DType.optimal_dtype(vocabulary)
        self._prefix = prefix
        self._resources = contextlib.ExitStack()
        self._builders: list[IndexedDatasetBuilder] = []

    def __enter__(self) -> PairWriter:
        parent, name = os.path.split(self._prefix)
        with _naming(f"{self._prefix}.partial-..."), contextlib.ExitStack() as made:
            self._folder = made.enter_context(tempfile.TemporaryDirectory(dir=parent or ".", prefix=f"{name}.partial-"))
            for number in range(len(self._names)):
                builder = IndexedDatasetBuilder(self._partial(number, ".bin"), dtype=self._dtype)
                made.callback(_close, builder)
                self._builders.append(builder)
            self._resources = made.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._resources.close()

    def _partial(self, number: int, ending: str) -> str:
        return os.path.join(self._folder, f"{number}{ending}")

    def add(self, number: int, ids: Ids) -> None:
        """Adds a document, [tokens] int32, to the pair of key ``number``."""
        with _naming(f"{self._names[number]}.bin"):
            self._builders[number].add_document(ids, [len(ids)])

    def finish(self) -> None:
        """Completes the pairs and puts them in their place."""
        for number, (name, builder) in enumerate(zip(self._names, self._builders, strict=True)):
            with _naming(f"{name}.bin"):
                builder.data_file.flush()
            with _naming(f"{name}.idx"):
                builder.finalize(self._partial(number, ".idx"))
            for ending in _ENDINGS:
                with _naming(f"{name}{ending}"):
                    _to_disk(self._partial(number, ending))
        for number, name in enumerate(self._names):
            # An old index must not be seen beside new tokens.
            with _naming(f"{name}.idx"):
                Path(f"{name}.idx").unlink(missing_ok=True)
            for ending in _ENDINGS:
                with _naming(f"{name}{ending}"):
                    os.replace(self._partial(number, ending), f"{name}{ending}")


def _close(builder: IndexedDatasetBuilder) -> None:
    with contextlib.suppress(OSError):  # the disk is full, and what is not written yet is thrown away
        builder.data_file.close()


def _to_disk(path: str) -> None:
    with open(path, "rb") as stream:
        os.fsync(stream.fileno())


@contextlib.contextmanager
def _naming(path: str) -> Iterator[None]:
    """A write that fails says of which file."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"{path} cannot be written ({error.strerror})") from None
