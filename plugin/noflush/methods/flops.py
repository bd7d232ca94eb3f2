"""Floating-point operations of an update of one matrix. Pure.

Rules of elements have none to speak of: they wait for memory.
"""

from __future__ import annotations

GRAM_FROM = 2
"""How much wider than high a matrix is from which on Newton-Schulz in Gram form has fewer products (on a CPU)."""


def newton_schulz(rows: int, columns: int, steps: int = 5) -> float:
    """Of `newton_schulz.orthogonalized` as every device can do it: steps (2 m^2 n + m^3) products for m <= n."""
    m, n = sorted((rows, columns))
    return 2.0 * steps * (2 * m * m * n + m**3)


def basis_rotation(rows: int, columns: int, refresh_every: int = 10) -> float:
    """Of SOAP: covariances and rotations, and two QR factorizations with a product each every so many updates."""
    m, n = rows, columns
    return 8.0 * m * n * (m + n) + (2 + 8 / 3) * (m**3 + n**3) / refresh_every


def forward_and_backward(rows: int, columns: int, tokens: int) -> float:
    """Of what a matrix is for, over ``tokens``: a product forward and two backward."""
    return 6.0 * rows * columns * tokens
