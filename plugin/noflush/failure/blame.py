"""Who is to blame when a run breaks, from what every rank said before it ended. Pure.

A rank that notices first looks guilty to its own neighbours: its end closes connections too. So every rank leaves its
last words, and blame follows them from rank to rank until it reaches one that failed, or one that said nothing.
Nobody is accused for being quiet alone: a connection that was closed proves an end, a wait that ran out only silence.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from typing import Literal

How = Literal["closed", "silent"]
Store = Literal["answers", "refuses", "silent", "none"]
"""What the store, where ranks leave their words, does: "refuses" if its keeper's connection broke, "silent" if it takes
the question and gives no answer, "none" before ranks have met."""


@dataclass(frozen=True)
class Words:
    """What a rank leaves behind when it ends.

    Attributes:
        rank: who speaks.
        fault: its own fault, one line; None if it lost a peer.
        lost: the rank whose connection failed; None if that is not known, as in a collective.
        how: whether that connection was closed, or nothing came.
        seconds: how long it waited.
        absent: this rank had not listened for longer than its peers wait: they may have given up on it.
    """

    rank: int
    fault: str | None = None
    lost: int | None = None
    how: How = "closed"
    seconds: float = 0.0
    absent: bool = False

    def dumps(self) -> str:
        """As text, for the store."""
        return json.dumps(asdict(self))

    @classmethod
    def loads(cls, text: str | bytes) -> Words:
        """The inverse of `dumps`."""
        return cls(**json.loads(text))


@dataclass(frozen=True)
class Verdict:
    """What is known: ``accused`` is a rank or None, ``sentence`` says it in words, without a full stop.

    ``sure``: nothing that another rank may still say can change it.
    """

    accused: int | None
    sentence: str
    sure: bool = True


Name = Callable[[int], str]


def judge(
    own: Words,
    said: Mapping[int, Words],
    world: int,
    store: Store,
    keeper: int | None,
    name: Name = "rank {}".format,
    alive: Collection[int] = (),
) -> Verdict:
    """The verdict of the rank that said ``own``.

    Args:
        own: its words.
        said: the words of the others, by rank.
        world: ranks in all.
        store: whether ``said`` could be read.
        keeper: the rank that keeps the store; None if a launcher's agent does.
        name: of a rank, as people know it.
        alive: ranks that have answered a roll call: they have not noticed yet.
    """
    if own.fault is not None:
        return Verdict(own.rank, f"{name(own.rank)} failed: {own.fault}")
    if own.lost is None:
        return _without_a_name(own, said, world, store, keeper, name, alive)
    return _follow(own, own, said, store, keeper, name)


def _follow(
    start: Words, own: Words, said: Mapping[int, Words], store: Store, keeper: int | None, name: Name
) -> Verdict:
    """Blame from ``start`` on along what each rank has lost."""
    at, passed = start, {start.rank}
    while True:
        target = at.lost
        if target is None:
            return Verdict(None, f"{name(at.rank)} lost a peer and does not know which", sure=False)
        if target == own.rank:
            return Verdict(
                own.rank, f"{name(own.rank)} was silent{_for(at.seconds)}, and {name(at.rank)} gave up on it"
            )
        if target in passed:
            pair = f"{name(at.rank)} and {name(target)}"
            return Verdict(None, f"{pair} heard nothing from each other: look at the network between them")
        if target not in said:
            return _said_nothing(at, target, own, store, keeper, name)
        if said[target].fault is not None:
            return Verdict(target, f"{name(target)} failed: {said[target].fault}")
        passed.add(target)
        at = said[target]


def _said_nothing(at: Words, target: int, own: Words, store: Store, keeper: int | None, name: Name) -> Verdict:
    """``at`` lost ``target``, which left no words, or none that could be read."""
    gone = Verdict(target, f"{name(target)} is gone: its connection to {name(at.rank)} was closed")
    silent = Verdict(target, f"{name(target)} has been silent{_for(at.seconds)}: stopped, stuck or cut off", False)
    if store == "silent" and keeper is not None:
        if target == keeper and at.how == "closed":
            return gone
        return Verdict(
            keeper, f"{name(keeper)} has been silent: the store that it keeps takes questions and does not answer"
        )
    if store == "answers":
        return gone if at.how == "closed" else silent
    if own.absent and own.how == "closed":
        return Verdict(
            None,
            f"{name(target)} has ended; {name(own.rank)} had not listened{_for(own.seconds)}, longer than its "
            "peers wait: they may have given up on it",
        )
    if target == keeper and at.how == "closed":
        return gone
    keeping = "the launcher" if keeper is None else name(keeper)
    lost = f"{name(target)} has ended" if at.how == "closed" else f"{name(at.rank)} heard nothing from {name(target)}"
    return Verdict(
        None, f"{lost}, and the store that {keeping} keeps cannot be reached: one of the two for the other's sake"
    )


def _without_a_name(
    own: Words,
    said: Mapping[int, Words],
    world: int,
    store: Store,
    keeper: int | None,
    name: Name,
    alive: Collection[int],
) -> Verdict:
    """A collective failed: of whom is not known, but others may know, or only one be left."""
    for words in said.values():
        if words.fault is not None:
            return Verdict(words.rank, f"{name(words.rank)} failed: {words.fault}")
    for words in said.values():
        if words.lost is not None and words.lost != own.rank:
            return _follow(words, own, said, store, keeper, name)
    if store == "silent" and keeper is not None and keeper != own.rank:
        return Verdict(
            keeper, f"{name(keeper)} has been silent: the store that it keeps takes questions and does not answer"
        )
    missing = [rank for rank in range(world) if rank != own.rank and rank not in said and rank not in alive]
    if len(missing) == 1 and (store == "answers" or world == 2):
        (last,) = missing
        if own.how == "closed":
            return Verdict(last, f"{name(last)} is gone: a connection was closed, and all others have answered")
        return Verdict(last, f"{name(last)} has been silent{_for(own.seconds)}: stopped, stuck or cut off", False)
    heard = "a connection was closed" if own.how == "closed" else f"nothing came{_for(own.seconds)}"
    listed = ", ".join(map(name, missing[:8])) + (", ..." if len(missing) > 8 else "")
    return Verdict(None, f"{heard}, it is not known by whom; not heard from: {listed}", sure=False)


def _for(seconds: float) -> str:
    """How long something lasted, if that is known."""
    return f" for {seconds:.0f} s" if seconds >= 0.5 else ""
