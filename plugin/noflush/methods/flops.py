"""Floating-point operations of an update of one matrix. Pure.

Rules of elements have none to speak of: they wait for memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

GRAM_FROM = 2
"""How much wider than high a matrix is from which on Newton-Schulz in Gram form has fewer products (on a CPU)."""


def newton_schulz(rows: int, columns: int, steps: int = 5) -> float:
    """Of `newton_schulz.orthogonalized` as every device can do it: steps (2 m^2 n + m^3) products for m <= n."""
    m, n = sorted((rows, columns))
    return 2.0 * steps * (2 * m * m * n + m**3)


def basis_rotation(rows: int, columns: int, group: Mapping[str, Any]) -> float:
    """Of SOAP: rotations, covariances, and every ``refresh_every`` updates two QR factorizations of two products each.

    Of the first moment covariances are made only then.
    """
    m, n = rows, columns
    covariances = 2.0 * m * n * (m + n)
    refresh = (4 + 8 / 3) * (m**3 + n**3)
    if group["estimate"] == "first":
        covariances, refresh = 0.0, refresh + covariances
    return 6.0 * m * n * (m + n) + covariances + refresh / int(group["refresh_every"])


def forward_and_backward(rows: int, columns: int, tokens: int) -> float:
    """Of what a matrix is for, over ``tokens``: a product forward and two backward."""
    return 6.0 * rows * columns * tokens
