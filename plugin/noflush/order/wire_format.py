"""Which form activations and gradients travel in, and how many bytes that is. Pure: `stage.codecs` does it.

A coded tensor is cut into tiles of `TILE` numbers, the last one filled up with zeros. Its bytes are first one float32
scale a tile, then the codes: a byte a number (``int8``), or two numbers a byte (``int4``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

WireName = Literal["model", "bf16", "int8", "int4"]
WIRES: tuple[str, ...] = get_args(WireName)

TILE = 128
"""Numbers that share a scale. A power of two, for the rotation."""
_SCALE_BYTES = 4
_CODE_BITS = {"int8": 8, "int4": 4}


@dataclass(frozen=True)
class Wire:
    """The form of each direction: ``activations`` down, ``gradients`` up. ``model``: as the model has them."""

    activations: WireName = "model"
    gradients: WireName = "model"

    @classmethod
    def read(cls, value: Any) -> Wire:
        """What a user wrote: a name for both directions, or ``{"activations": ..., "gradients": ...}``.

        Raises ValueError, whose message says the rule, for anything else.
        """
        named = value if isinstance(value, Mapping) else {"activations": value, "gradients": value}
        if unknown := sorted(map(str, named.keys() - {"activations", "gradients"})):
            raise ValueError(f"{unknown[0]} is no direction: the directions are activations, gradients")
        for direction, name in named.items():
            if not isinstance(name, str) or name not in WIRES:
                where = f"{direction} are {name!r}; " if isinstance(value, Mapping) else ""
                raise ValueError(f"{where}it must be one of {', '.join(WIRES)}")
        return cls(**cast("dict[str, WireName]", dict(named)))

    def __str__(self) -> str:
        return f"activations {self.activations}, gradients {self.gradients}"


AS_IN_MODEL = Wire()
"""Nothing is coded."""


def wire_bytes(name: WireName, numbers: int, width: int) -> int:
    """Bytes that travel of ``numbers`` floating-point numbers that train, ``width`` bytes each.

    Never more than its own: a tensor that would not shrink travels as it is.
    """
    return numbers * width if name == "model" else min(numbers * width, coded_bytes(name, numbers))


def coded_bytes(name: WireName, numbers: int) -> int:
    """Bytes of ``numbers`` coded numbers."""
    if name == "bf16":
        return 2 * numbers
    return tile_count(numbers) * (_SCALE_BYTES + TILE * _CODE_BITS[name] // 8)


def tile_count(numbers: int) -> int:
    """Tiles of a tensor of so many numbers."""
    return -(-numbers // TILE)
