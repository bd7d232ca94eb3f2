"""Codecs against a loop that does each number by itself, their bounds, and what is coded at all."""

from __future__ import annotations

import math

import pytest
import torch

from noflush.methods.elementwise import noise
from noflush.order.wire_format import TILE, Wire, wire_bytes
from noflush.stage.codecs import CODECS, rotate
from noflush.stage.messages import TensorSpec
from noflush.stage.wire import Form, LinkForms, noise_seed

SHAPES = [(3, 5, 64), (7,), (2 * TILE,), (1, TILE + 1)]


def spec_of(x, trains=True):
    return TensorSpec(tuple(x.shape), x.dtype, trains)


def there_and_back(name, x, seed=None):
    codec, spec = CODECS[name], spec_of(x)
    coded = codec.encode(x, seed)
    assert spec_of(coded, False) == codec.coded(spec)
    back = codec.decode(coded, spec)
    assert (back.shape, back.dtype) == (x.shape, x.dtype)
    return back


def values(shape, scale=1.0, dtype=torch.float32):
    draw = torch.Generator().manual_seed(math.prod(shape))
    return (torch.randn(shape, generator=draw) * scale).to(dtype)


def one(number):
    """A float32 as Python's float."""
    return torch.tensor(number, dtype=torch.float32).item()


def hadamard():
    """By Sylvester's construction."""
    h = torch.ones(1, 1, dtype=torch.float64)
    while len(h) < TILE:
        h = torch.cat([torch.cat([h, h], 1), torch.cat([h, -h], 1)])
    return h


def by_loop(x, most, rotated, seed):
    """The codec in Python floats, a number at a time."""
    flat = x.flatten().tolist()
    count = len(flat)
    flat += [0.0] * (-count % TILE)
    h = hadamard()
    out = []
    for first in range(0, len(flat), TILE):
        tile = flat[first : first + TILE]
        if rotated:
            tile = (h @ torch.tensor(tile, dtype=torch.float64)).tolist()
        scale = one(max(map(abs, tile)) / most)
        codes = []
        for place, number in enumerate(tile):
            step = one(number / scale) if scale else 0.0
            if seed is None:
                code = round(step)  # halves to even, as torch does
            else:
                bits = noise(torch.tensor(first + place), seed).item() >> 8
                code = math.floor(step) + (bits * 2.0**-24 < step - math.floor(step))
            codes.append(max(-most, min(most, code)))
        tile = [one(code * scale) for code in codes]
        if rotated:
            tile = [number / TILE for number in (h @ torch.tensor(tile, dtype=torch.float64)).tolist()]
        out += tile
    return torch.tensor(out[:count]).view(x.shape)


@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("shape", SHAPES)
def test_int8_is_the_loops_to_the_bit(shape, seed):
    x = values(shape)
    assert torch.equal(there_and_back("int8", x, seed), by_loop(x, 127, False, seed))


@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("shape", SHAPES)
def test_int4_is_the_loops(shape, seed):
    x = values(shape)
    got, want = there_and_back("int4", x, seed), by_loop(x, 7, True, seed)
    # The loop sums in float64: a code may fall on the other side of a half, which moves a whole tile by a step of it.
    assert ((got - want).abs() < 1e-5).float().mean() > 0.9
    assert (got - x).norm() <= 1.1 * (want - x).norm()


def test_the_rotation_is_the_matrix_and_its_own_inverse():
    x = torch.randint(-9, 9, (4, TILE)).float()
    assert torch.equal(rotate(x), x @ hadamard().float())
    assert torch.equal(rotate(rotate(x)), TILE * x)


@pytest.mark.parametrize("seed", [None, 5])
def test_no_number_is_off_by_more_than_a_step(seed):
    """To nearest half a step; stochastically less than one; of a tile's largest number."""
    share = 0.5 if seed is None else 1.0
    x = values((4, TILE)) * torch.tensor([[1e-6], [1.0], [1e6], [1e30]])
    step = x.abs().amax(1, keepdim=True) / 127
    assert ((there_and_back("int8", x, seed) - x).abs() <= share * step * (1 + 1e-5)).all()
    # A rotated step is the tile's norm / 7 at most, and rotating back spreads the tile's errors evenly over it.
    small = x / x.abs().amax(1, keepdim=True)
    error = (there_and_back("int4", small, seed) - small).norm(dim=1)
    step = rotate(small).abs().amax(1) / 7 / TILE**0.5
    assert (error <= share * step * TILE**0.5).all()
    assert ((there_and_back("bf16", x, seed) - x).abs() <= 2 * share * 2.0**-8 * x.abs()).all()


def test_an_outlier_spoils_its_own_tile_less_when_it_is_rotated():
    x = values((TILE,))
    x[17] = 40.0
    others = torch.arange(TILE) != 17
    plain = by_loop(x, 7, False, None)
    assert (there_and_back("int4", x) - x)[others].norm() < 0.8 * (plain - x)[others].norm()


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("scale", [1.0, 1e-4])
def test_stochastic_rounding_is_right_on_average(name, scale):
    x = values((2, TILE), scale)
    count = 2000
    each = torch.stack([there_and_back(name, x, noise_seed(0, 0, batch, 0, 0)) for batch in range(count)])
    off = (each.double().mean(0) - x.double()).abs()
    # Up or down by a step has a standard deviation of half of it at most; of 128 of them, their root.
    largest = x.abs().amax(1, keepdim=True)
    steps = {
        "bf16": 2.0**-7 * x.abs(),
        "int8": largest / 127,
        "int4": rotate(x).abs().amax(1, keepdim=True) / 7 / TILE**0.5,
    }
    bound = 5 * steps[name] / 2 / count**0.5
    assert (off <= bound).all()
    # To nearest is not: the same numbers are off by as much however often they are sent.
    assert ((there_and_back(name, x) - x).abs() > bound).any()


@pytest.mark.parametrize("seed", [None, 3])
def test_what_a_codec_can_state_comes_back_as_it_was(seed):
    whole = torch.randint(-126, 127, (3, TILE)).float()
    whole[:, 0] = 127.0
    for step in (1.0, 2.0**-20, 3.0 * 2.0**7):
        assert torch.equal(there_and_back("int8", whole * step, seed), whole * step)
    few = torch.randint(-6, 7, (3, TILE)).float()
    few[:, 0] = 7.0
    few = rotate(few) / TILE  # whole once it is rotated
    assert torch.equal(there_and_back("int4", few, seed), few)
    upper = values((3, TILE)).bfloat16().float()
    assert torch.equal(there_and_back("bf16", upper, seed), upper)
    for name in CODECS:
        assert torch.equal(there_and_back(name, torch.zeros(300), seed), torch.zeros(300))


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("seed", [None, 3])
def test_what_is_not_finite_stays_so_and_spoils_no_other_tile(bad, seed):
    x = values((3, TILE))
    x[1, 5] = bad
    for name in CODECS:
        back = there_and_back(name, x, seed)
        assert not back[1, 5].isfinite()
        assert back[0].isfinite().all()
        assert back[2].isfinite().all()
    nan = torch.full((TILE,), math.nan).view(torch.int32).fill_(0x7FFFFFFF).view(torch.float32)
    assert there_and_back("bf16", nan, seed).isnan().all()


@pytest.mark.parametrize("scale", [1.0, 2.0**15, 2.0**-14])
@pytest.mark.parametrize("name", ["int8", "int4"])
def test_the_loss_scale_of_fp16_changes_nothing_that_is_large_enough(name, scale):
    """fp16's own range is what limits it, not the scale of a tile; what was finite stays finite."""
    x = values((4, TILE), dtype=torch.float16).clamp(-1.99, 1.99) * 2.0**-1
    plain = there_and_back(name, x, 7).float()
    scaled = there_and_back(name, (x * scale).half(), 7).float() / scale
    assert scaled.isfinite().all()
    # Of subnormals fp16 keeps fewer bits, and a code may then be its neighbour.
    assert (plain - scaled).norm() < (2e-3 if scale >= 1 else 5e-2) * plain.norm()
    largest = torch.full((TILE,), 65504.0, dtype=torch.float16)
    largest[::2] = -65504.0
    assert there_and_back(name, largest, 7).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["model", "bf16", "int8", "int4"])
@pytest.mark.parametrize("shape", [*SHAPES, (), (0,), (1,)])
def test_the_bytes_that_plan_counts_are_those_that_travel(name, dtype, shape):
    form = Form(name, 0, 0, stochastic=True)
    x = values(shape, dtype=dtype) if shape else torch.ones((), dtype=dtype)
    (coded,) = form.encode([x], [spec_of(x)], 0, 0)
    assert spec_of(coded, True).shape == form.specs([spec_of(x)])[0].shape
    assert coded.numel() * coded.element_size() == wire_bytes(name, x.numel(), dtype.itemsize)
    assert coded.numel() * coded.element_size() <= x.numel() * x.element_size()


def test_model_hands_over_the_very_tensors():
    tensors = [values((300,)), torch.arange(3)]
    specs = [spec_of(x) for x in tensors]
    form = Form("model", 0, 0, stochastic=True)
    assert form.encode(tensors, specs, 0, 0) is tensors
    assert form.decode(tensors, specs) is tensors
    assert form.specs(specs) == tuple(specs)


def test_only_numbers_that_train_are_coded():
    kept = [
        (values((300,)), False),  # a mask
        (values((300,), dtype=torch.float64), True),
        (torch.arange(300), False),
        (torch.ones(300, dtype=torch.bool), False),
        (values((10,)), True),  # would not shrink
    ]
    tensors, specs = [x for x, _ in kept], [spec_of(x, trains) for x, trains in kept]
    form = Form("int8", 0, 0, stochastic=False)
    assert form.specs(specs) == tuple(specs)
    for sent, x in zip(form.encode(tensors, specs, 0, 0), tensors, strict=True):
        assert sent is x
    (coded,) = form.encode([values((300,))], [spec_of(values((300,)))], 0, 0)
    assert coded.dtype is torch.uint8


def test_noise_is_the_messages_own_and_moves_no_generator():
    x = values((300,))
    spec = [spec_of(x)]
    before = torch.get_rng_state()

    def sent(link=0, replica=0, batch=0, micro_batch=0):
        return Form("int8", link, replica, stochastic=True).encode([x], spec, batch, micro_batch)[0]

    again = sent()
    assert torch.equal(sent(), again)
    for other in (sent(link=1), sent(replica=1), sent(batch=1), sent(micro_batch=1)):
        assert not torch.equal(other, again)
    first, second = Form("int8", 0, 0, stochastic=True).encode([x, x], spec * 2, 0, 0)
    assert not torch.equal(first, second)
    forms = LinkForms(Wire("int8", "int8"), 0, 0)
    assert torch.equal(*(forms.activations.encode([x], spec, batch, 0)[0] for batch in (0, 1)))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("int2", "^it must be one of model, bf16, int8, int4"),
        ({"activations": "int2"}, "activations are 'int2'; it must be one of"),
        ({"gradients": None}, "gradients are None; it must be one of"),
        ({"down": "int8"}, "down is no direction: the directions are activations, gradients"),
    ],
)
def test_what_is_no_wire(value, message):
    with pytest.raises(ValueError, match=message):
        Wire.read(value)


def test_a_wire_by_direction():
    assert Wire.read("int8") == Wire("int8", "int8")
    assert Wire.read({"gradients": "int4"}) == Wire("model", "int4")
