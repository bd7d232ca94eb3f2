"""Which micro-batches of one common order each group of pipelines trains on. Pure.

The order is cut into *blocks*, a micro-batch each. Between two changes of membership group k of R takes every R-th of
the blocks that are free, from the k-th on, and asks nobody. At a change all agree on what has been taken: blocks that a
group has not come to, above all those of one that has died, are free again, and are handed out first.

A group goes on by the old membership up to a *claim*, which it told the others with its words to that round: it cannot
know when the round ends. What a dead group drew after its last words is drawn again; so is what a group draws beyond
its claim while a round takes longer than it had expected (`SharedOrder.drawn_twice` counts those).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

Run = tuple[int, int, int]
"""First block, end and stride of some blocks, as of a `range`."""


@dataclass(frozen=True)
class Membership:
    """Who shares the order, and what of it is free.

    Attributes:
        term: how many changes it is from the first.
        members: their keys, in the order of turns.
        freed: blocks below ``horizon`` that are free.
        horizon: all blocks from this one on are free.
    """

    term: int
    members: tuple[str, ...]
    freed: tuple[Run, ...] = ()
    horizon: int = 0

    def block(self, member: int, turn: int) -> int:
        """The block of ``member``'s turn number ``turn``."""
        index = turn * len(self.members) + member
        for run in self.freed:
            length = len(range(*run))
            if index < length:
                return range(*run)[index]
            index -= length
        return self.horizon + index

    def after(self, taken: dict[str, int], members: Sequence[str]) -> Membership:
        """The next membership, ``taken`` being how many turns each member has had (0 where it is not named)."""
        turns = [taken.get(key, 0) for key in self.members]
        most = max(turns, default=0)
        left = sorted(b for k, had in enumerate(turns) for b in self._blocks(k, had, most))
        # Freed blocks to which nobody's turn has come.
        rest = islice(self._freed_blocks(), most * len(self.members), None)
        freed = _runs(sorted([*left, *rest]))
        beyond = max(0, most * len(self.members) - sum(len(range(*run)) for run in self.freed))
        return Membership(self.term + 1, tuple(members), freed, self.horizon + beyond)

    def _blocks(self, member: int, first: int, end: int) -> Iterator[int]:
        return (self.block(member, turn) for turn in range(first, end))

    def _freed_blocks(self) -> Iterator[int]:
        for run in self.freed:
            yield from range(*run)

    def plain(self) -> dict[str, Any]:
        """As JSON has it."""
        return {"term": self.term, "members": list(self.members), "freed": self.freed, "horizon": self.horizon}

    @staticmethod
    def of(plain: dict[str, Any]) -> Membership:
        """The inverse of `plain`."""
        freed = tuple((int(a), int(b), int(c)) for a, b, c in plain["freed"])
        return Membership(int(plain["term"]), tuple(plain["members"]), freed, int(plain["horizon"]))


def _runs(blocks: Sequence[int]) -> tuple[Run, ...]:
    """``blocks``, ascending, as few runs as a look at neighbours finds."""
    found: list[list[int]] = []  # first, last, stride
    for block in blocks:
        if found and found[-1][2] in (0, block - found[-1][1]):
            found[-1][1:] = [block, block - found[-1][1]]
        else:
            found.append([block, block, 0])
    return tuple((first, last + 1, stride or 1) for first, last, stride in found)


class SharedOrder:
    """One group's part in the order, at the stage that decides for it.

    Args:
        key: of this group, among all that ever take part.
        ahead: blocks that a group may draw while a round is under way, if nothing better is known.

    Attributes:
        drawn: turns it has had in the membership by which it draws now.
        drawn_twice: blocks that it drew beyond a claim, which another may have drawn too.
    """

    def __init__(self, key: str, ahead: int = 8) -> None:
        self.key, self._ahead = key, ahead
        self.drawn = self.drawn_twice = 0
        # By which it draws, and those to come; of all but the last, after how many turns they end.
        self._memberships = deque([Membership(0, (key,))])
        self._ends: deque[int] = deque()
        self._at_last_words = 0
        self._claim = 0
        self._heard: dict[str, int] = {}

    @property
    def membership(self) -> Membership:
        """The newest that is agreed."""
        return self._memberships[-1]

    def next(self) -> int:
        """The next block of this group."""
        while self._ends and self.drawn >= self._ends[0]:
            self.drawn_twice += self.drawn - self._ends.popleft()
            self._memberships.popleft()
            self.drawn = 0
        membership = self._memberships[0]
        block = membership.block(membership.members.index(self.key), self.drawn)
        self.drawn += 1
        return block

    def words(self, waits: bool = False) -> dict[str, Any]:
        """What this group tells the others when a round begins; ``waits``: it draws nothing until that ends."""
        drawn = 0 if self._ends else self.drawn
        self._claim = drawn if waits else drawn + max(self._ahead, 2 * (drawn - self._at_last_words))
        self._at_last_words = drawn
        order = self.membership.plain()
        return {
            "key": self.key, "order": order, "drawn": drawn, "claim": self._claim, "heard": self._heard,
            "waits": waits,
        }  # fmt: skip

    def agree(self, told: Sequence[dict[str, Any]]) -> bool:
        """Takes in what a round's members told, in the order of ranks; whether the membership is another from now on.

        Those of the newest term decide. A group that was cut off from them takes theirs over, and what it drew in the
        meantime is drawn again.
        """
        # Who has drawn most, among equal terms: whoever is new has no order to lose.
        leader = max(told, key=lambda one: (one["order"]["term"], one["order"]["horizon"], one["drawn"]))
        newest = Membership.of(leader["order"])
        keys = tuple(one["key"] for one in told)
        of_newest = {one["key"]: one for one in told if Membership.of(one["order"]) == newest}
        if keys == newest.members and len(of_newest) == len(keys):
            self._heard = {key: one["drawn"] for key, one in of_newest.items()}
            return False
        # Those who are gone count by their last words: by what they had drawn, not by what they might.
        taken = dict(leader["heard"]) | {key: one["claim"] for key, one in of_newest.items()}
        following = newest.after(taken, keys)
        if self.key in of_newest:
            self._ends.append(self._claim)
        else:
            mine = told[keys.index(self.key)]
            self.drawn_twice += 0 if mine["waits"] else self.drawn
            self._memberships.clear()
            self._ends.clear()
            self.drawn = 0
        self._memberships.append(following)
        self._heard, self._at_last_words = {}, 0
        return True

    def kept(self) -> dict[str, Any]:
        """For a checkpoint: what is free once this group is alone; JSON can say it."""
        drawn = 0 if self._ends else self.drawn
        alone = self.membership.after({**self._heard, self.key: drawn}, (self.key,))
        return alone.plain()

    def resume(self, kept: dict[str, Any]) -> None:
        """Goes on from what `kept` gave, under this group's own key."""
        before = Membership.of(kept)
        self._memberships = deque([Membership(before.term, (self.key,), before.freed, before.horizon)])
        self._ends.clear()
        self.drawn = self._at_last_words = 0
        self._heard = {}


def block_samples(block: int, size: int, count: int) -> tuple[int, range]:
    """Epoch, and positions in it, of a block of ``size`` samples; blocks do not cross the end of ``count`` samples."""
    in_epoch = count // size
    epoch, number = divmod(block, in_epoch)
    return epoch, range(number * size, (number + 1) * size)
