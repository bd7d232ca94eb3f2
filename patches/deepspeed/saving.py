"""How a checkpoint gets to the disk: DeepSpeed's files are written beside, and put in place when all ranks' are there.

DeepSpeed's ranks wait for each other between their files, so one whose disk is full must go on, and say so afterwards.
In the background, training waits for copies in host memory alone. DeepSpeed's checkpoint engine, which writes its files
in either case, has a background of its own ("decoupled"): it starts a process that imports the script anew, reads
tensors that training goes on writing, and has to be waited for before the next update; so it is not used.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import logging
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from noflush.stage.checkpoint import PARTIAL, make_room, put_in_place, remove, sync
from noflush.stage.not_written import NotWrittenError, why_not_written
from noflush.stage.snapshot import to_host

logger = logging.getLogger("noflush")

# DeepSpeed copies these beside the checkpoints, through a link too.
_SCRIPTS = ("zero_to_fp32.py", "zero_to_torch.py")
_AT_THE_END_S = 60.0
_NUMBERS = itertools.count()  # all ranks make theirs in one order

Writer = Callable[[Any, str], Any]


@dataclass
class _Save:
    """One checkpoint on its way."""

    number: int
    folder: Path
    tag: str
    latest: bool
    finish: Callable[[Path], None]
    partial: Path
    files: deque[tuple[Writer, Any, str]] = field(default_factory=deque)
    written: Future[str | None] | None = None
    told: bool = False
    placed: bool = False
    failed: str | None = None


class Saves:
    """The checkpoints of one engine of DeepSpeed's.

    Args:
        engine: whose ``checkpoint_engine`` writes.
        background: whether training goes on while it writes.
        places: whether this rank puts checkpoints in place: one that sees all files.

    Attributes:
        background: as given.
        stalled_s: how long the newest save held up training here.
    """

    def __init__(self, engine: Any, background: bool, places: bool) -> None:
        self._engine, self.background, self._places = engine, background, places
        self._world = dist.get_world_size()  # a script may end the group before it ends
        self._writer = ThreadPoolExecutor(1, "noflush-saves") if background else None
        self._under_way: _Save | None = None
        self._count, self._number = 0, next(_NUMBERS)
        self._store: Any = None
        self._save_own: Writer | None = None
        self.stalled_s = 0.0
        if background:
            self._store = dist.distributed_c10d._get_default_store()
            atexit.register(self._at_the_end)

    def save(
        self,
        collect: Callable[[str], Any],
        folder: str | Path,
        tag: str,
        latest: bool = True,
        finish: Callable[[Path], None] = lambda partial: None,
    ) -> Any:
        """Saves a checkpoint; on all ranks. One that is still on its way is waited for first.

        Args:
            collect: has the engine save under the tag that it is given, by its ``checkpoint_engine``.
            folder: of the checkpoints.
            tag: of this one.
            latest: whether ``latest`` is to name it.
            finish: called where checkpoints are put in place, with the folder that holds all files, before it is.

        Returns what ``collect`` does.

        Raises:
            NotWrittenError: on all ranks, of this checkpoint or of the one that was on its way.
        """
        self.finish()
        begun = time.monotonic()
        at = Path(folder)
        self._on_placer(lambda: self._make_room(at, tag), at / tag, at)
        save = _Save(self._count, at, tag, latest, finish, at / f"{tag}{PARTIAL}")
        self._count += 1
        failed: list[str] = []
        with self._collecting(save, failed):
            result = collect(save.partial.name)
        self._under_way = save
        if self._writer is None:
            save.written = Future()
            save.written.set_result(failed[0] if failed else None)
            self.finish()
        elif failed:
            save.written = Future()
            save.written.set_result(failed[0])
        else:
            save.written = self._writer.submit(self._write, save)
        self.stalled_s = time.monotonic() - begun
        return result

    def poll(self) -> None:
        """Puts a checkpoint in place whose files are all written by now; waits for nobody."""
        save = self._under_way
        if save is None or save.placed or save.written is None or not save.written.done():
            return
        key = f"noflush/saves/{self._number}/{save.number}"
        try:
            if not save.told:
                save.told = True
                self._store.add(key if save.written.result() is None else f"{key}/failed", 1)
            whole = self._places and save.failed is None and self._store.add(key, 0) == self._world
        except dist.DistNetworkError:  # whoever held the store is dead, which the next message of a neighbour's shows
            return
        if whole:
            try:
                self._place(save)
            except OSError as error:  # `finish` says so, on all ranks
                save.failed = why_not_written(error, error.filename or save.partial, save.folder)

    def finish(self) -> None:
        """Waits until the checkpoint that is on its way is in its place; on all ranks.

        Raises NotWrittenError on all ranks if it could not be written.
        """
        save, self._under_way = self._under_way, None
        if save is None:
            return
        assert save.written is not None
        failed = _first(save.written.result() or save.failed)
        try:
            if failed is not None:
                raise NotWrittenError(failed)
            self._on_placer(lambda: None if save.placed else self._place(save), save.partial, save.folder)
        except NotWrittenError:
            if self._places:
                shutil.rmtree(save.partial, ignore_errors=True)
            raise

    def _make_room(self, folder: Path, tag: str) -> None:
        for script in _SCRIPTS:
            if (folder / script).is_symlink():
                remove(folder / script)
        make_room(folder, tag)

    def _place(self, save: _Save) -> None:
        save.finish(save.partial)
        put_in_place(save.folder, save.tag, save.latest)
        save.placed = True

    @contextlib.contextmanager
    def _collecting(self, save: _Save, failed: list[str]) -> Iterator[None]:
        """Within, the engine's files are copied, or written; the first that cannot be is the last that is tried."""
        engine, writer = self._engine, self._engine.checkpoint_engine
        write, copy_script = writer.save, engine._copy_recovery_script

        def keeping(write: Writer) -> Writer:
            def keep(state_dict: Any, path: str) -> Any:
                if self.background:
                    save.files.append((write, to_host(state_dict), str(path)))
                    return None
                written = write(state_dict, path)
                _sync(path)
                return written

            return keep

        def trying(action: Callable[..., Any]) -> Callable[..., Any]:
            def attempt(*args: Any, **kwargs: Any) -> Any:
                if failed:
                    return None
                try:
                    return action(*args, **kwargs)
                except (OSError, RuntimeError) as error:
                    failed.append(why_not_written(error, kwargs.get("path") or str(args[-1]), save.folder))
                    return None

            return attempt

        writer.save, engine._copy_recovery_script = trying(keeping(write)), trying(copy_script)
        self._save_own = trying(keeping(torch.save))
        try:
            yield
        finally:
            self._save_own = None
            del writer.save, engine._copy_recovery_script

    def save_own(self, state: Any, path: Path) -> None:
        """Saves a file of this rank's own into the checkpoint that is being collected.

        Whichever replicas DeepSpeed's ``checkpoint.writer`` writes on: those have its files, and not what the others
        have in flight.
        """
        assert self._save_own is not None, "no checkpoint is being collected"
        self._save_own(state, str(path))

    def _write(self, save: _Save) -> str | None:
        """Why a file could not be written; None if all are on the disk."""
        path: str | Path = save.partial
        try:
            while save.files:
                write, state, path = save.files.popleft()
                write(state, path)
                _sync(path)
        except Exception as error:  # whatever it is: the others would wait for a rank that raised alone
            why = why_not_written(error, path, save.folder)
            logger.error("noflush: %s. The run ends with this error at its next save, or at its end", why)
            return why
        return None

    def _on_placer(self, action: Callable[[], None], path: Path, folder: Path) -> None:
        failed = None
        if self._places:
            try:
                action()
            except OSError as error:
                failed = why_not_written(error, error.filename or path, folder)
        failed = _first(failed)
        if failed is not None:
            raise NotWrittenError(failed)

    def _at_the_end(self) -> None:
        """A script may end while its last checkpoint is on its way."""
        save, deadline = self._under_way, time.monotonic() + _AT_THE_END_S
        if save is None or save.written is None:
            return
        with contextlib.suppress(Exception):  # the line below says it
            save.written.result()
            self.poll()
            while self._places and not save.placed and time.monotonic() < deadline:
                time.sleep(0.05)
                self.poll()
        if self._places and not save.placed:
            logger.error("noflush: checkpoint %s was not finished; the one before it is whole", save.folder / save.tag)


def _sync(path: str | Path) -> None:
    if Path(path).exists():  # DeepSpeed's parallel writers have names of their own
        sync(path)


def _first(failed: str | None) -> str | None:
    """The first rank's ``failed`` that is not None, on every rank."""
    told: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(told, failed)
    return next((found for found in told if found is not None), None)
