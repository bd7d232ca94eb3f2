"""For the Triton part of a method's file: the language, and what methods share there.

Without the package triton its functions stay plain Python, and nobody calls them: `kernels.choice` asks first.
"""

# mypy: disable-error-code="no-untyped-def,attr-defined,untyped-decorator,no-redef"
# Triton reads annotations as kernel types, so only constants carry one.

import math
from typing import Any

try:
    import triton
    import triton.language as tl
except ImportError:
    tl: Any = None

    def jit(function: Any) -> Any:
        """Nothing, without Triton."""
        return function

    def constant(value: float) -> Any:
        """As it is, without Triton."""
        return value

else:
    jit = triton.jit
    constant = tl.constexpr

LOG2_OF_096 = constant(math.log2(0.96))


@jit
def power(base, exponent):
    """base ** exponent for base > 0 (and 0 for base 0), in float64."""
    safe = tl.where(base > 0, base, 1.0)
    return tl.where(base > 0, tl.exp2(exponent * tl.log2(safe)), 0.0)


@jit
def discounted(lr, discount_steps, delay, step):
    """`scalars.learning_rate`."""
    rho = 1.0 - tl.minimum(step / tl.where(discount_steps > 0, discount_steps, 1.0), 1.0)
    slows = (discount_steps > 0) & (delay > 1)
    return tl.where(slows, lr / power(tl.where(delay > 1, delay, 1.0), rho), lr)


@jit
def moved_moments(g, m, v, average, beta2, one_minus_beta2):
    """`elementwise.move_moments`: both moments after gradient ``g``."""
    # torch.lerp starts from the nearer end.
    first = tl.where(average < 0.5, m + average * (g - m), g - (g - m) * (1.0 - average))
    return first, v * beta2 + g * one_minus_beta2 * g
