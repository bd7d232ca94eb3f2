"""The Triton kernels: gradient norm, the update's scalars, and the update itself in one pass.

    sum_of_squares  x N flats   each program's share of the squares             -> partials
    finish_norm     x 1         their sum, in float64 and in a fixed order      -> norm
    prepare         x groups    clock, hyper-parameters, norm, loss scale       -> coefficients, clock, outcome
    step            x groups    gradient, weights, state                        -> weights, state, next version

Nothing here waits for the device or is compiled anew when a number changes: all that changes lies in device memory.
Formulas: `scalars` and `reference`, which these are tested against.
"""

# mypy: disable-error-code="no-untyped-def,attr-defined,untyped-decorator"
# Triton reads annotations as kernel types, so only constants carry one.

import math

import triton
import triton.language as tl

# Positions in the vector `prepare` writes; fields of scalars.Coefficients, then the skip flag and the noise's seed.
GRADIENT: tl.constexpr = tl.constexpr(0)
DECAY: tl.constexpr = tl.constexpr(1)
AVERAGE: tl.constexpr = tl.constexpr(2)
BETA2: tl.constexpr = tl.constexpr(3)
ONE_MINUS_BETA2: tl.constexpr = tl.constexpr(4)
BIAS2: tl.constexpr = tl.constexpr(5)
EPS: tl.constexpr = tl.constexpr(6)
OF_GRADIENT: tl.constexpr = tl.constexpr(7)
OF_MOMENTUM: tl.constexpr = tl.constexpr(8)
SKIP: tl.constexpr = tl.constexpr(9)
SEED: tl.constexpr = tl.constexpr(10)
WORDS = 12

LOG2_OF_096: tl.constexpr = tl.constexpr(math.log2(0.96))

NADAMW: tl.constexpr = tl.constexpr(0)
ADAMW: tl.constexpr = tl.constexpr(1)
NAG: tl.constexpr = tl.constexpr(2)


@triton.jit(do_not_specialize=["n"])
def sum_of_squares(x, partials, n, BLOCK: tl.constexpr):
    """partials[i] = sum of squares of the blocks i, i + programs, ... of x [n], in float32."""
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    lanes = tl.arange(0, BLOCK)
    full = n // BLOCK
    total = tl.zeros((BLOCK,), tl.float32)
    # Whole blocks carry no mask: a mask of unknown alignment would undo the 128-bit loads.
    start = pid.to(tl.int64) * BLOCK
    for _ in range(pid, full, programs):
        value = tl.load(x + start + lanes).to(tl.float32)
        total += value * value
        start += programs * BLOCK
    if pid == full % programs:
        offsets = full.to(tl.int64) * BLOCK + lanes
        value = tl.load(x + offsets, mask=offsets < n, other=0.0).to(tl.float32)
        total += value * value
    tl.store(partials + pid, tl.sum(total))


@triton.jit(do_not_specialize=["count"])
def finish_norm(partials, norm, count, BLOCK: tl.constexpr):
    """norm[0] = square root of the sum of partials [count], summed in float64."""
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, count, BLOCK):
        total += tl.load(partials + start + lanes, mask=start + lanes < count, other=0.0).to(tl.float64)
    tl.store(norm, tl.sqrt(tl.sum(total)).to(tl.float32))


@triton.jit
def _power(base, exponent):
    """base ** exponent for base > 0 (and 0 for base 0), in float64."""
    safe = tl.where(base > 0, base, 1.0)
    return tl.where(base > 0, tl.exp2(exponent * tl.log2(safe)), 0.0)


@triton.jit
def _momentum(beta1, fixed, momentum_decay, step):
    return tl.where(fixed != 0, beta1, beta1 * (1.0 - 0.5 * tl.exp2(step * momentum_decay * LOG2_OF_096)))


@triton.jit
def prepare(
    hyper, clocks, norm, scale, coefficients, outcome, max_norm, RULE: tl.constexpr, HYPERS: tl.constexpr,
    WORDS: tl.constexpr,
):  # fmt: skip
    """Coefficients of every group's update; program g serves group g.

    hyper: float64 [groups, HYPERS], `scalars.Hyper.words`; clocks: float32 [groups, 2], moved on unless the norm is
    not finite; norm: float32 [1], of the scaled gradients; scale: float32 [1]; max_norm: float32 [1], 0 for none;
    coefficients: float32 [groups, WORDS]; outcome: float32 [2], (unscaled norm, 1 if skipped).
    """
    group = tl.program_id(0)
    h = hyper + group * HYPERS
    lr, beta1, beta2, eps = tl.load(h), tl.load(h + 1), tl.load(h + 2), tl.load(h + 3)
    weight_decay, momentum_decay, fixed = tl.load(h + 4), tl.load(h + 5), tl.load(h + 6)
    discount_steps, delay = tl.load(h + 7), tl.load(h + 8)

    loss_scale = tl.load(scale)
    unscaled = tl.load(norm) / loss_scale
    finite = (unscaled == unscaled) & (tl.abs(unscaled) != float("inf"))
    limit = tl.load(max_norm)
    clip = tl.where(limit > 0, tl.minimum(limit / (unscaled + 1e-6), 1.0), 1.0)

    clock = clocks + group * 2
    done = tl.load(clock)
    product_before = tl.load(clock + 1)
    step = done.to(tl.float64) + 1.0
    mu = _momentum(beta1, fixed, momentum_decay, step)
    product_f32 = product_before * mu.to(tl.float32)  # kept in float32, as torch.optim.NAdam keeps it
    product = product_f32.to(tl.float64)
    rho = 1.0 - tl.minimum(step / tl.where(discount_steps > 0, discount_steps, 1.0), 1.0)
    slows = (discount_steps > 0) & (delay > 1)
    lr = tl.where(slows, lr / _power(tl.where(delay > 1, delay, 1.0), rho), lr)

    bias2 = 1.0 - _power(beta2, step)
    if RULE == NADAMW:
        mu_next = _momentum(beta1, fixed, momentum_decay, step + 1.0)
        of_gradient = -lr * (1.0 - mu) / (1.0 - product)
        of_momentum = -lr * mu_next / (1.0 - product * mu_next)
    elif RULE == ADAMW:
        of_gradient = lr * 0
        of_momentum = -lr / (1.0 - _power(beta1, step))
    else:
        gamma = tl.where(fixed != 0, beta1, tl.maximum((step - 2.0) / step, 0.0))
        of_gradient = -lr * (1.0 - gamma)
        of_momentum = tl.where(fixed != 0, beta1, tl.maximum((step - 1.0) / (step + 1.0), 0.0))

    out = coefficients + group * WORDS
    tl.store(out + GRADIENT, clip / loss_scale)
    tl.store(out + DECAY, (1.0 - lr * weight_decay).to(tl.float32))
    tl.store(out + AVERAGE, (1.0 - beta1).to(tl.float32))
    tl.store(out + BETA2, beta2.to(tl.float32))
    tl.store(out + ONE_MINUS_BETA2, (1.0 - beta2).to(tl.float32))
    tl.store(out + BIAS2, bias2.to(tl.float32))
    tl.store(out + EPS, eps.to(tl.float32))
    tl.store(out + OF_GRADIENT, of_gradient.to(tl.float32))
    tl.store(out + OF_MOMENTUM, of_momentum.to(tl.float32))
    tl.store(out + SKIP, tl.where(finite, 0.0, 1.0))
    tl.store(out + SEED, step.to(tl.float32))
    tl.store(clock, tl.where(finite, step.to(tl.float32), done))
    tl.store(clock + 1, tl.where(finite, product_f32, product_before))
    if group == 0:
        tl.store(outcome, unscaled)
        tl.store(outcome + 1, tl.where(finite, 0.0, 1.0))


@triton.jit
def _noise(index, seed):
    """reference.noise, in uint32."""
    x = index.to(tl.uint32) + seed.to(tl.uint32) * 0x9E3779B9
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _round_stochastically(value, bits):
    """reference.round_stochastically: float32 to bfloat16 with 16 random bits."""
    words = value.to(tl.uint32, bitcast=True) + bits
    return (words & 0xFFFF0000).to(tl.float32, bitcast=True).to(tl.bfloat16)


@triton.jit
def _load(pointer, offsets, n, MASKED: tl.constexpr):
    if MASKED:  # noqa: SIM108 (Triton decides this branch when it compiles)
        value = tl.load(pointer + offsets, mask=offsets < n, other=0.0)
    else:
        value = tl.load(pointer + offsets)
    return value.to(tl.float32)


@triton.jit
def _store(pointer, offsets, value, n, MASKED: tl.constexpr):
    if MASKED:
        tl.store(pointer + offsets, value.to(pointer.dtype.element_ty), mask=offsets < n)
    else:
        tl.store(pointer + offsets, value.to(pointer.dtype.element_ty))


@triton.jit
def _update_block(
    gradient, weights, target, state0, state1, c, offsets, n,
    RULE: tl.constexpr, MASTER: tl.constexpr, ZERO: tl.constexpr, ROUND: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    skip = tl.load(c + SKIP) != 0.0
    raw = _load(gradient, offsets, n, MASKED)
    w = _load(weights, offsets, n, MASKED)
    s0 = _load(state0, offsets, n, MASKED)
    g = raw * tl.load(c + GRADIENT)
    new = w * tl.load(c + DECAY)
    if RULE == NAG:
        new += g * tl.load(c + OF_GRADIENT)
        drift = new - s0
        first = new
        new += drift * tl.load(c + OF_MOMENTUM)
    else:
        s1 = _load(state1, offsets, n, MASKED)
        average = tl.load(c + AVERAGE)
        # torch.lerp starts from the nearer end.
        first = tl.where(average < 0.5, s0 + average * (g - s0), g - (g - s0) * (1.0 - average))
        second = s1 * tl.load(c + BETA2) + g * tl.load(c + ONE_MINUS_BETA2) * g
        # One square root and one division an element: torch's two of each differ in the last place only.
        denominator = tl.sqrt_rn(second * (1.0 / tl.load(c + BIAS2))) + tl.load(c + EPS)
        move = first * tl.load(c + OF_MOMENTUM)
        if RULE == NADAMW:
            move += g * tl.load(c + OF_GRADIENT)
        new += tl.div_rn(move, denominator)
        second = tl.where(skip, s1, second)
    # Every lane writes: a skipped update keeps state and weights, and hands the same weights on as the next version.
    new = tl.where(skip, w, new)
    first = tl.where(skip, s0, first)
    if ROUND:
        bits = _noise(offsets, tl.load(c + SEED))
        # Values already in bfloat16 have no part to round, whatever the noise: a skip keeps them.
        _store(state0, offsets, _round_stochastically(first, bits & 0xFFFF), n, MASKED)
        _store(state1, offsets, _round_stochastically(second, bits >> 16), n, MASKED)
    else:
        _store(state0, offsets, first, n, MASKED)
        if RULE != NAG:
            _store(state1, offsets, second, n, MASKED)
    if MASTER:
        _store(weights, offsets, new, n, MASKED)
    _store(target, offsets, new, n, MASKED)
    if ZERO:
        _store(gradient, offsets, tl.zeros_like(raw), n, MASKED)


@triton.jit(do_not_specialize=["n"])
def step(
    gradient, weights, target, state0, state1, c, n,
    RULE: tl.constexpr, MASTER: tl.constexpr, ZERO: tl.constexpr, ROUND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One update of n elements; tensors as `flat.Flat`, c: one group's coefficients from `prepare`."""
    block = tl.program_id(0).to(tl.int64)
    offsets = block * BLOCK + tl.arange(0, BLOCK)
    if (block + 1) * BLOCK <= n:
        _update_block(
            gradient, weights, target, state0, state1, c, offsets, n, RULE, MASTER, ZERO, ROUND, False
        )  # fmt: skip
    else:
        _update_block(
            gradient, weights, target, state0, state1, c, offsets, n, RULE, MASTER, ZERO, ROUND, True
        )  # fmt: skip
