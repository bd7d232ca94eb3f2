"""Weight policies: which version a forward uses, how many live at once, and what a backward sees. Pure.

A policy is one entry here, and nothing else in the project decides by a policy's name.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal


def ceil_div(a: int, b: int) -> int:
    """The smallest integer not below a / b."""
    return -(-a // b)


def _works(lag: int, gas: int) -> str | None:
    return None


@dataclass(frozen=True)
class Policy:
    """One policy, of a stage with lag L and K micro-batches an update.

    Attributes:
        about: what it does, for people.
        version: ``version(m, L, K)``: the weight version, counted from the segment's start, that F(m) uses.
        slots: ``slots(L, K)``: weight versions that must be kept at once, the newest included.
        live: whether backward sees the live weights. Else it sees exactly those of its forward.
        fault: ``fault(L, K)`` at stage 0: why the policy cannot work there, and the fix; or None.
    """

    about: str
    version: Callable[[int, int, int], int]
    slots: Callable[[int, int], int]
    live: bool = False
    fault: Callable[[int, int], str | None] = _works


def _newest(micro_batch: int, lag: int, gas: int) -> int:
    return max(0, micro_batch - lag) // gas


def _no_version_before(lag: int, gas: int) -> str | None:
    if gas >= lag:
        return None
    return (
        f"gradient_accumulation_steps={gas} and a lag of {lag} at stage 0: version t-1 does not exist yet when batch t "
        f"starts; raise gradient_accumulation_steps to {lag} or more, or use weights 'stash'"
    )


POLICIES: dict[str, Policy] = {
    "stash": Policy(
        "backward sees exactly its forward's weights",
        version=_newest,
        slots=lambda lag, gas: ceil_div(lag, gas) + 1,
    ),
    "latest": Policy(
        "one version; backward sees the live weights",
        version=_newest,
        slots=lambda lag, gas: 1,
        live=True,
    ),
    "2bw": Policy(
        "every micro-batch of a batch uses the same version, delay 1 at every stage",
        version=lambda micro_batch, lag, gas: max(0, micro_batch // gas - 1),
        slots=lambda lag, gas: 2,
        fault=_no_version_before,
    ),
}

# Checked against the table where a name comes in; type checkers see a word.
if TYPE_CHECKING:
    PolicyName = str
else:
    PolicyName = Literal[tuple(POLICIES)]
