"""The Triton kernels: gradient norm, the update's scalars, and the update itself in one pass.

    sum_of_squares  x N flats   each program's share of the squares             -> partials
    finish_norm     x 1         their sum, in float64 and in a fixed order      -> norm
    prepare         x groups    clock, hyper-parameters, norm, loss scale       -> coefficients, clock, outcome
    step            x groups    gradient, weights, state                        -> weights, state, next version

Nothing here waits for the device or is compiled anew when a number changes: all that changes lies in device memory.
The formulas are the method's, whose file defines them for Triton too (`Method.fused`), as functions that are handed in
and compiled into these kernels:

    factor(hyper, step) -> float64: what the running product is multiplied by
    coefficients(hyper, step, product, own): stores the method's numbers, float32; hyper and own are pointers
    rule(g, w, s0, s1, own) -> (new weights, new s0, new s1): one block; s1 is s0 where a method keeps one tensor
"""

# mypy: disable-error-code="no-untyped-def,attr-defined,untyped-decorator"
# Triton reads annotations as kernel types, so only constants carry one.

import triton
import triton.language as tl

# Positions in a group's numbers, which `prepare` writes: what every rule needs, then the method's own.
GRADIENT: tl.constexpr = tl.constexpr(0)
SKIP: tl.constexpr = tl.constexpr(1)
SEED: tl.constexpr = tl.constexpr(2)
OWN: tl.constexpr = tl.constexpr(3)
COMMON = 3


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
def prepare(
    hyper, clocks, norm, scale, numbers, outcome, max_norm, whole, FACTOR: tl.constexpr, COEFFICIENTS: tl.constexpr,
    HYPERS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Numbers of every group's update; program g serves group g. All groups are of one method.

    hyper: float64 [groups, HYPERS], the method's; clocks: float32 [groups, 2], moved on unless the norm is not finite;
    norm: float32 [1], of the scaled gradients; scale: float32 [1]; max_norm: float32 [1], 0 for none; whole: float32
    [1], a norm to clip by if it is the larger one; numbers: float32 [groups, WORDS]; outcome: float32 [2], (unscaled
    norm, 1 if skipped); FACTOR: a function or None.
    """
    group = tl.program_id(0)
    h = hyper + group * HYPERS

    loss_scale = tl.load(scale)
    unscaled = tl.load(norm) / loss_scale
    finite = (unscaled == unscaled) & (tl.abs(unscaled) != float("inf"))
    limit = tl.load(max_norm)
    by = tl.maximum(unscaled, tl.load(whole))
    clip = tl.where(limit > 0, tl.minimum(limit / (by + 1e-6), 1.0), 1.0)

    clock = clocks + group * 2
    done = tl.load(clock)
    product_before = tl.load(clock + 1)
    step = done.to(tl.float64) + 1.0
    product = product_before
    if FACTOR is not None:
        product = product_before * FACTOR(h, step).to(tl.float32)  # kept in float32, as torch.optim.NAdam keeps it

    out = numbers + group * WORDS
    tl.store(out + GRADIENT, clip / loss_scale)
    tl.store(out + SKIP, tl.where(finite, 0.0, 1.0))
    tl.store(out + SEED, step.to(tl.float32))
    COEFFICIENTS(h, step, product.to(tl.float64), out + OWN)
    tl.store(clock, tl.where(finite, step.to(tl.float32), done))
    tl.store(clock + 1, tl.where(finite, product, product_before))
    if group == 0:
        tl.store(outcome, unscaled)
        tl.store(outcome + 1, tl.where(finite, 0.0, 1.0))


@triton.jit
def _noise(index, seed):
    """`elementwise.noise`, in uint32."""
    x = index.to(tl.uint32) + seed.to(tl.uint32) * 0x9E3779B9
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _round_stochastically(value, bits):
    """`elementwise.round_stochastically`: float32 to bfloat16 with 16 random bits."""
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
    gradient, weights, target, state0, state1, c, ahead, offsets, n,
    RULE: tl.constexpr, STATES: tl.constexpr, MASTER: tl.constexpr, ROUND: tl.constexpr, LOOKS: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    skip = tl.load(c + SKIP) != 0.0
    raw = _load(gradient, offsets, n, MASKED)
    w = _load(weights, offsets, n, MASKED)
    s0 = _load(state0, offsets, n, MASKED)
    s1 = s0
    if STATES == 2:
        s1 = _load(state1, offsets, n, MASKED)
    new, first, second = RULE(raw * tl.load(c + GRADIENT), w, s0, s1, c + OWN)
    # Every lane writes: a skipped update keeps state and weights, and hands the same weights on as the next version.
    new = tl.where(skip, w, new)
    first = tl.where(skip, s0, first)
    second = tl.where(skip, s1, second)
    if ROUND:
        bits = _noise(offsets, tl.load(c + SEED))
        # Values already in bfloat16 have no part to round, whatever the noise: a skip keeps them.
        _store(state0, offsets, _round_stochastically(first, bits & 0xFFFF), n, MASKED)
        if STATES == 2:
            _store(state1, offsets, _round_stochastically(second, bits >> 16), n, MASKED)
    else:
        _store(state0, offsets, first, n, MASKED)
        if STATES == 2:
            _store(state1, offsets, second, n, MASKED)
    published = new
    if LOOKS:
        published = new + (new - w) * ahead
    _store(target, offsets, published, n, MASKED)
    if MASTER:
        _store(weights, offsets, new, n, MASKED)
    _store(gradient, offsets, tl.zeros_like(raw), n, MASKED)


@triton.jit(do_not_specialize=["n"])
def step(
    gradient, weights, target, state0, state1, c, ahead, n,
    RULE: tl.constexpr, STATES: tl.constexpr, MASTER: tl.constexpr, ROUND: tl.constexpr, LOOKS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """One update of n elements; tensors as `flat.Flat`, c: one group's numbers from `prepare`; STATES: 1 or 2.

    LOOKS: whether the target lies ``ahead`` (float32) steps beyond the weights (`look_ahead`); then MASTER holds.
    """
    block = tl.program_id(0).to(tl.int64)
    offsets = block * BLOCK + tl.arange(0, BLOCK)
    if (block + 1) * BLOCK <= n:
        _update_block(
            gradient, weights, target, state0, state1, c, ahead, offsets, n, RULE, STATES, MASTER, ROUND, LOOKS, False
        )  # fmt: skip
    else:
        _update_block(
            gradient, weights, target, state0, state1, c, ahead, offsets, n, RULE, STATES, MASTER, ROUND, LOOKS, True
        )  # fmt: skip
