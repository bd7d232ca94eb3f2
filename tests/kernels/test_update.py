"""Triton's kernels (interpreted) and `torch.compile` against the reference, the reference against float64 and torch."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from noflush.kernels.choice import cpu_compiler
from noflush.kernels.eager import CompiledKernel, EagerKernel
from noflush.kernels.launch import TritonKernel
from noflush.methods import adamw, nadamw, nag
from noflush.methods.elementwise import noise, round_stochastically
from noflush.methods.flat import Flat
from noflush.methods.matrices import Piece
from noflush.methods.table import METHODS, load

pytestmark = pytest.mark.kernels
needs_compiler = pytest.mark.skipif(not cpu_compiler(), reason="torch.compile needs a C++ compiler")

ULP = 2.0**-23
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


METHODS_OF_ELEMENTS = [name for name in METHODS if METHODS[name].unit == "element"]
RULES = {load(name).__module__.split(".")[-1]: load(name).METHOD for name in METHODS_OF_ELEMENTS}


def hyper(rule, decay=0.01, delay=3.0):
    return {
        "nag": nag.Hyper(3e-2, 0.9, decay, 1.0, discount_steps=4.0, delay=delay),
        "adamw": adamw.Hyper(3e-3, 0.99, 0.999, 1e-8, decay),
        "nadamw": nadamw.Hyper(3e-3, 0.99, 0.999, 1e-8, decay, 4e-3, 0.0, 4.0, delay),
    }[rule]


class Run:
    """The tensors of one kernel's run: groups of given lengths, from one seed."""

    def __init__(self, kernel, rule, lengths, gradient, model, moments, seed=0, first=0, ahead=0.0):
        self.kernel = kernel
        draw = torch.Generator().manual_seed(seed)
        self.draw = draw
        self.clocks = torch.tensor([[0.0, 1.0]] * len(lengths))
        self.flats = []
        for i, n in enumerate(lengths):
            # From element `first` on: pointers that are not aligned.
            new = lambda dtype=torch.float32, n=n: torch.empty(n + first, dtype=dtype)[first:]  # noqa: E731
            weights = new().copy_(torch.randn(n, generator=draw))
            state = (new().copy_(weights),) if rule == "nag" else (new(moments).zero_(), new(moments).zero_())
            target = new(model).fill_(math.nan)
            self.flats.append(
                Flat(
                    RULES[rule],
                    *(new(gradient), weights, target, state, self.clocks[i], hyper(rule, 0.01 * i)),
                    model != torch.float32 or ahead > 0,
                    ahead=ahead,
                )
            )

    def step(self, spoil=False, max_norm=0.0, scale=1.0, swap=False, whole=0.0):
        for flat in self.flats:
            flat.gradient.copy_(torch.randn(flat.gradient.shape, generator=self.draw) * scale)
        if spoil and self.flats[-1].gradient.numel():
            self.flats[-1].gradient[-1] = math.inf
        norm = self.kernel.norm([f.gradient for f in self.flats])
        outcome = self.kernel.update(self.flats, norm, max_norm, scale, whole)
        if swap:  # full precision: the next version becomes the newest
            for flat in self.flats:
                flat.weights.copy_(flat.target)
        return outcome.norm.item(), outcome.skipped.item()


def close(a, b, ulps, floor):
    """Within ``ulps`` units in the last place of b's dtype, or of ``floor`` where b is smaller."""
    unit = {torch.float32: ULP, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}[b.dtype]
    bound = ulps * unit * b.double().abs().clamp_min(floor)
    return bool(((a.double() - b.double()).abs() <= bound).all())


def assert_alike(one, other, ulps=4):
    for a, b in zip(one.flats, other.flats, strict=True):
        assert torch.equal(a.clock, b.clock)
        assert close(a.weights, b.weights, ulps, 1e-2)
        # Rounding to 16 bits may tip the other way.
        assert close(a.target, b.target, ulps if b.target.dtype == torch.float32 else 1, 1e-2)
        assert not a.gradient.any()
        assert not b.gradient.any()
        for s, r in zip(a.state, b.state, strict=True):
            # The first moment is a sum of terms of either sign: what is left may be smaller than their rounding.
            floor = 3e-2 if s is a.state[0] else 1e-9
            assert close(s, r, ulps if r.dtype == torch.float32 else 1, floor)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    rule=st.sampled_from(["nadamw", "adamw", "nag"]),
    lengths=st.lists(st.sampled_from([1, 2, 7, 1023, 1024, 1025, 2047, 2049, 2500]), min_size=1, max_size=3),
    gradient=st.sampled_from(DTYPES),
    model=st.sampled_from(DTYPES),
    moments=st.sampled_from([torch.float32, torch.bfloat16]),
    first=st.sampled_from([0, 1, 3]),
    spoil=st.sampled_from([None, 0, 1]),
    max_norm=st.sampled_from([0.0, 0.5]),
    scale=st.sampled_from([1.0, 1024.0]),
    seed=st.integers(0, 10**6),
    ahead=st.sampled_from([0.0, 2.5]),
    whole=st.sampled_from([0.0, 1.5, 900.0]),
)
def test_triton_is_the_reference(
    rule, lengths, gradient, model, moments, first, spoil, max_norm, scale, seed, ahead, whole
):
    """Lengths around a block's edge, alignments, dtypes, groups, an update that is skipped, clipping and scales."""
    arguments = (rule, lengths, gradient, model, moments, seed, first, ahead)
    swap = model == torch.float32 and not ahead
    ours, reference = Run(TritonKernel(torch.device("cpu")), *arguments), Run(EagerKernel(), *arguments)
    for step in range(2):
        found = ours.step(step == spoil, max_norm, scale, swap, whole)
        wanted = reference.step(step == spoil, max_norm, scale, swap, whole)
        assert found[1] == wanted[1] == float(step == spoil)
        assert found[0] == pytest.approx(wanted[0], rel=1e-5) or not math.isfinite(wanted[0])
    # Two norms summed in different orders clip by factors a few units apart; squares double that.
    assert_alike(ours, reference, ulps=16 if max_norm or ahead else 4)


@needs_compiler
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("model", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ahead", [0.0, 2.5])
def test_compile_is_the_reference(rule, model, ahead):
    kernel, swap = CompiledKernel(), model == torch.float32 and not ahead
    for lengths in ([2049, 7], [130_001]):
        arguments = (rule, lengths, model, model, torch.float32, 0, 0, ahead)
        ours, reference = Run(kernel, *arguments), Run(EagerKernel(), *arguments)
        for step in range(3):
            assert ours.step(step == 1, 0.5, 1.0, swap) == reference.step(step == 1, 0.5, 1.0, swap)
        assert_alike(ours, reference, ulps=16 if ahead else 4)  # a step's rounding comes 2.5 times more


@needs_compiler
def test_compile_takes_bf16_moments():
    arguments = ("nadamw", [2049], torch.bfloat16, torch.bfloat16, torch.bfloat16)
    ours, reference = Run(CompiledKernel(), *arguments), Run(EagerKernel(), *arguments)
    for _ in range(3):
        ours.step()
        reference.step()
    assert_alike(ours, reference)


@needs_compiler
def test_compiles_once_for_all_lengths_and_rates():
    kernel = CompiledKernel()
    torch._dynamo.utils.counters.clear()
    for seed, lengths in enumerate(([300], [5000], [64], [777])):
        run = Run(kernel, "nadamw", lengths, torch.float32, torch.bfloat16, torch.float32, seed)
        run.step(max_norm=0.1 * (seed + 1))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("rule", RULES)
def test_reference_is_float64_to_rounding(rule):
    """The very formulas in float64, from the same float32 gradients, over 20 steps."""
    h, n = hyper(rule), 4099
    draw = torch.Generator().manual_seed(3)
    w32 = torch.randn(n, generator=draw)
    w64 = w32.double()
    s32 = (w32.clone(),) if rule == "nag" else (torch.zeros(n), torch.zeros(n))
    s64 = tuple(s.double() for s in s32)
    product = 1.0
    for step in range(1, 21):
        g = torch.randn(n, generator=draw)
        product *= RULES[rule].factor(h, step) if RULES[rule].factor else 1.0
        c = RULES[rule].coefficients(h, step, product, 0.5)
        RULES[rule].rule(g.clone(), w32, w32, s32, c, False)
        RULES[rule].rule(g.double(), w64, w64, s64, c, False)
    # Nesterov's drift carries a rounding on for 1 / (1 - momentum) steps.
    assert close(w32, w64.float(), 200 if rule == "nag" else 20, 1e-1)


@pytest.mark.parametrize(
    "kernel",
    ["torch", pytest.param("compile", marks=needs_compiler), pytest.param("triton", marks=pytest.mark.slow)],
)
def test_500_steps_are_torchs_nadam(kernel):
    """``torch`` bit for bit; the others within 32 units in the last place (of 0.1 where a weight is smaller)."""
    n, steps = (300, 500)
    made = {"torch": EagerKernel, "compile": CompiledKernel, "triton": lambda: TritonKernel(torch.device("cpu"))}
    run = Run(made[kernel](), "nadamw", [n], torch.float32, torch.float32, torch.float32)
    flat = run.flats[0]
    object.__setattr__(flat, "hyper", hyper("nadamw")._replace(discount_steps=0.0, delay=0.0))
    p = torch.nn.Parameter(flat.weights.clone())
    theirs = torch.optim.NAdam([p], 3e-3, (0.99, 0.999), weight_decay=0.01, decoupled_weight_decay=True)
    again = torch.Generator().manual_seed(0)
    torch.randn(n, generator=again)
    for _ in range(steps):
        run.step(swap=True)
        p.grad = torch.randn(n, generator=again)
        theirs.step()
    if kernel == "torch":
        assert torch.equal(flat.weights, p)
    else:
        assert close(flat.weights, p.detach(), 32, 0.1)


@pytest.mark.parametrize("kernel", [EagerKernel(), TritonKernel(torch.device("cpu"))], ids=["torch", "triton"])
def test_nothing_to_update_is_no_update(kernel):
    outcome = kernel.update([], kernel.norm([]), 1.0, 1.0)
    assert (outcome.norm.item(), outcome.skipped.item()) == (0.0, 0.0)


def test_stochastic_rounding_is_unbiased_and_exact_values_stay():
    value = torch.full((200_000,), 1.0 + 0.3 * 2.0**-7)
    bits = noise(torch.arange(value.numel()), 7) & 0xFFFF
    rounded = round_stochastically(value, bits).float()
    assert set(rounded.tolist()) == {1.0, 1.0 + 2.0**-7}
    up = (rounded > 1).double().mean().item()
    assert up == pytest.approx(0.3, abs=5 * math.sqrt(0.3 * 0.7 / value.numel()))
    exact = torch.randn(10_000).bfloat16()
    assert torch.equal(round_stochastically(exact.float(), noise(torch.arange(10_000), 3) >> 16), exact)


def test_noise_of_two_steps_and_two_moments_is_unrelated():
    index = torch.arange(100_000)
    one, two = noise(index, 1), noise(index, 2)
    for a, b in ((one, two), (one & 0xFFFF, one >> 16), (one[:-1], one[1:])):
        assert abs(torch.corrcoef(torch.stack([a.double(), b.double()]))[0, 1].item()) < 0.02


def test_triton_hands_a_method_that_it_lacks_to_torch(monkeypatch):
    """One group of Triton's, one that sees matrices, one of Triton's again; the last update is skipped."""
    from tests.multiproc.matrix_rule import ROW, Hyper, MatrixRule

    monkeypatch.setitem(METHODS, "MatrixRule", ROW)
    pieces = (Piece(0, (4, 8)), Piece(32, (5,)))
    states = tuple((piece, Piece(i, (1,))) for i, piece in enumerate(pieces))

    def groups(kernel):
        run = Run(kernel, "nadamw", [37, 37, 37], torch.float32, torch.float32, torch.float32)
        matrix = run.flats[1]
        run.flats[1] = Flat(
            MatrixRule.METHOD,
            *(matrix.gradient, matrix.weights, matrix.target, (torch.zeros(37), torch.zeros(2)), matrix.clock),
            *(Hyper(1e-2, 0.9), False, pieces, states),
        )
        return run

    ours, reference = groups(TritonKernel(torch.device("cpu"))), groups(EagerKernel())
    for spoil in (False, False, True):
        found, wanted = ours.step(spoil, 0.5, 1.0, True), reference.step(spoil, 0.5, 1.0, True)
        assert found[1] == wanted[1] == float(spoil)
    assert_alike(ours, reference, ulps=16)
    assert ours.flats[1].clock.tolist() == [2.0, 1.0]


@pytest.mark.parametrize("model", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ahead", [0.0, 2.5])
def test_triton_runs_muon_without_waiting(model, ahead):
    """One group of Muon's between two of Triton's; the second update is skipped, and moves nothing."""
    from noflush.methods.muon import Hyper

    method, pieces = load("DelayAwareMuon").METHOD, (Piece(0, (4, 8)), Piece(32, (8, 2)))

    def groups(kernel):
        run = Run(kernel, "nadamw", [48, 48, 48], model, model, torch.float32, ahead=ahead)
        between = run.flats[1]
        tensors = (between.gradient, between.weights, between.target, (torch.zeros(48),), between.clock)
        h = Hyper(1e-2, 0.9, 0.01, True, 5, "spectral", 0.2, None, 1)
        run.flats[1] = Flat(method, *tensors, h, between.master, pieces, tuple((p,) for p in pieces), ahead)
        return run

    kernel = TritonKernel(torch.device("cpu"))
    ours, reference = groups(kernel), groups(EagerKernel())
    assert kernel.clock_device(torch.device("cpu")) == torch.device("cpu")
    for spoil in (False, True, False):
        found, wanted = ours.step(spoil, 0.5, 64.0), reference.step(spoil, 0.5, 64.0)
        assert found[1] == wanted[1] == float(spoil)
    assert ours.flats[1].state[0].any()
    assert_alike(ours, reference, ulps=64)
    assert ours.flats[1].clock.tolist() == [2.0, 1.0]
