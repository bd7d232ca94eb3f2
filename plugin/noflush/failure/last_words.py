"""Why a run breaks: every rank leaves its reason in torch.distributed's store, and hears those of the others.

The store is asked by a thread of its own, and the answer is waited for only so long: its keeper may be the one that is
gone or stopped, and a stopped keeper's store never answers, whatever timeout it was given. `blame` judges.
"""

from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from torch.distributed import DistError, DistNetworkError, distributed_c10d

from noflush.failure.blame import Store, Verdict, Words, judge
from noflush.failure.exit_guard import end_within

_KEY = "noflush/ended/{}"
_ROLL_CALL = "noflush/roll call"
_HERE = "noflush/here/{}"
_LISTENS_EVERY = 1.0
"""Seconds between two looks for a roll call. In a collective only those notice an end who have a connection to it."""
ANSWER = 2.0
"""Seconds for the store to answer; a healthy one takes less than a thousandth of that."""
PATIENCE = 4.0
"""Seconds for others to speak, where their words may change the verdict, or where this rank keeps the store."""


class PeerError(RuntimeError):
    """A neighbour died, hangs or broke the protocol; the message names both stages and the action."""


def is_about_peers(error: BaseException) -> bool:
    """Whether ``error`` tells of another rank rather than of this one."""
    words = "gloo", "nccl", "connection", "socket", "timed out", "peer", "application timeout"
    backend = isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)
    return isinstance(error, (PeerError, DistError)) or backend


def ran_out(error: BaseException) -> bool:
    """Whether an error about a peer says that a wait ran out, not that a connection was closed."""
    return "timed out" in str(error).lower() or "timeout" in str(error).lower()


@dataclass
class _Scene:
    """This process among the ranks."""

    rank: int = 0
    world: int = 1
    keeper: int | None = 0
    name: Callable[[int], str] = "rank {}".format
    store: Any = None
    verdict: Verdict | None = None
    hooked: bool = False


_scene = _Scene()


def attend(rank: int, world: int, name: Callable[[int], str], store: Any = None) -> None:
    """Says who this rank is, and how ranks are called; from now on an uncaught error leaves words and ends in time.

    Args:
        rank, world: of the job.
        name: of a rank, as people know it.
        store: where words are left; None: the default process group's.
    """
    _scene.rank, _scene.world, _scene.name = rank, world, name
    # torchrun's agent keeps the store itself; otherwise rank 0's process does.
    _scene.keeper = None if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else 0
    _scene.store = store if store is not None else _scene.store
    if not _scene.hooked:
        _scene.hooked = True
        _hook(sys.excepthook)
        # Handlers registered before this one run after it.
        atexit.register(lambda: end_within() if _scene.verdict is not None else None)
        if world > 1:
            _answer_roll_calls()


def _answer_roll_calls() -> None:
    """From now on this process says that it is there when another asks, whatever it is doing."""
    over = threading.Event()

    def answer() -> None:
        while not over.wait(_LISTENS_EVERY):
            store = _scene.store if _scene.store is not None else _default_store()
            try:
                if store is not None and store.check([_ROLL_CALL]):
                    store.set(_HERE.format(_scene.rank), "")
                    return
            except RuntimeError:  # its keeper has gone, or the ranks have parted
                return

    listener = threading.Thread(target=answer, daemon=True, name="noflush: roll call")
    listener.start()

    def end() -> None:
        over.set()
        listener.join(_LISTENS_EVERY)  # not to be torn down in the middle of a question

    atexit.register(end)


def _hook(before: Callable[[type[BaseException], BaseException, TracebackType | None], Any]) -> None:
    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        end_within()
        before(kind, error, trace)
        if _scene.world > 1 and isinstance(error, Exception):
            said = "" if _scene.verdict is None else str(error)
            verdict = explain(error)
            if verdict.sentence not in said:
                print(f"noflush: {verdict.sentence}", file=sys.stderr, flush=True)  # noqa: T201

    sys.excepthook = hook


def explain(error: BaseException) -> Verdict:
    """Leaves words about ``error``, if this process has not yet, and says whose fault it is, in bounded time."""
    if _scene.verdict is not None:
        return _scene.verdict
    if is_about_peers(error):
        # Of a collective it is not known whose connection failed; of the store it is.
        lost = _scene.keeper if isinstance(error, DistNetworkError) and _scene.keeper != _scene.rank else None
        return leave(Words(_scene.rank, lost=lost, how="silent" if ran_out(error) else "closed"))
    first = (str(error).strip().splitlines() or [""])[0]
    return leave(Words(_scene.rank, fault=f"{type(error).__name__}: {first}".rstrip(": ")))


def leave(own: Words) -> Verdict:
    """Leaves ``own`` for the others, hears theirs and judges; takes at most PATIENCE + ANSWER seconds."""
    talk = _Talk(own, _scene.world)
    store = _scene.store if _scene.store is not None else _default_store()
    state = talk.wait(store, _scene) if store is not None else "none"
    _scene.verdict = _judge(own, talk, state)
    return _scene.verdict


def _judge(own: Words, talk: _Talk, state: Store) -> Verdict:
    return judge(own, dict(talk.said), _scene.world, state, _scene.keeper, _scene.name, frozenset(talk.here))


def _default_store() -> Any:
    try:
        return distributed_c10d._get_default_store()
    except (RuntimeError, ValueError):  # the ranks have not met
        return None


@dataclass
class _Talk:
    """What this rank says and hears; the store is touched by a thread alone."""

    own: Words
    world: int
    said: dict[int, Words] = field(default_factory=dict)
    here: set[int] = field(default_factory=set)
    rounds: int = 0
    refused: bool = False
    over: bool = False
    answered: float = field(default_factory=time.monotonic)

    def _run(self, store: Any) -> None:
        try:
            # Asking for it back proves that it has arrived: the connections that others watch close after that.
            store.set(_KEY.format(self.own.rank), self.own.dumps())
            store.get(_KEY.format(self.own.rank))
            calls = self.own.fault is None and self.own.lost is None
            if calls:
                store.set(_ROLL_CALL, "")
            while not self.over:
                for rank in range(self.world):
                    if rank == self.own.rank or rank in self.said:
                        continue
                    if store.check([_KEY.format(rank)]):
                        self.said[rank] = Words.loads(store.get(_KEY.format(rank)))
                    if calls and rank not in self.here and store.check([_HERE.format(rank)]):
                        self.here.add(rank)
                    self.answered = time.monotonic()
                self.rounds += 1
                time.sleep(0.05)
        except RuntimeError:  # DistNetworkError and its kin
            self.refused = True

    def wait(self, store: Any, scene: _Scene) -> Store:
        """Talks until nothing more can change the verdict, and the store's keeper until all have read it."""
        threading.Thread(target=self._run, args=(store,), daemon=True, name="noflush: last words").start()
        deadline = time.monotonic() + PATIENCE
        while True:
            if self.refused:
                return "refuses"
            if time.monotonic() - self.answered > ANSWER:
                return "silent"
            if self.rounds:
                verdict = _judge(self.own, self, "answers")
                expected = set(range(self.world)) - {self.own.rank, verdict.accused}
                heard_all = scene.rank != scene.keeper or expected <= set(self.said)
                if (verdict.sure and heard_all) or time.monotonic() > deadline:
                    self.over = True
                    return "answers"
            time.sleep(0.02)
