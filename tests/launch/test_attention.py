"""Attention of grouped heads: torch's plain arithmetic is the oracle, its fused kernels do the work."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from noflush.launch.gpt import attention
from noflush.launch.gpt.attention import CausalAttention
from noflush.launch.gpt.config import transformer_config
from tests.launch.models import LLAMA

HEADS, GROUPS, SEQUENCE, BATCH, WIDTH = 4, 2, 16, 3, 8


def inputs(dtype):
    draw = torch.Generator().manual_seed(5)
    shapes = [(SEQUENCE, BATCH, heads, WIDTH) for heads in (HEADS, GROUPS, GROUPS)]
    return [torch.randn(shape, generator=draw, dtype=dtype).requires_grad_() for shape in shapes]


def documents():
    """A mask, true where a token may not look: causal, and nothing before the document that it is in."""
    mask = torch.ones(SEQUENCE, SEQUENCE, dtype=torch.bool).triu(1)
    mask[6:, :6] = True
    return mask.expand(BATCH, 1, SEQUENCE, SEQUENCE)


@pytest.fixture
def calls(monkeypatch):
    """(key heads, enable_gqa, the kernel that torch chooses) of every call of torch's attention."""
    found, real = [], F.scaled_dot_product_attention

    def attend(q, k, v, **options):
        mask, causal = options.get("attn_mask"), options.get("is_causal", False)
        chosen = SDPBackend(torch._fused_sdp_choice(q, k, v, mask, 0.0, causal, enable_gqa=options["enable_gqa"]))
        found.append((k.shape[1], options["enable_gqa"], chosen))
        return real(q, k, v, **options)

    monkeypatch.setattr(attention.F, "scaled_dot_product_attention", attend)
    return found


def attended(q, k, v, mask):
    module = CausalAttention(transformer_config(LLAMA, 1), 1, None, "self")
    return module(q, k, v, mask)


def plain(q, k, v, mask):
    """By torch's own repeating of heads, which its plain arithmetic alone does everywhere."""
    q, k, v = (t.permute(1, 2, 0, 3) for t in (q, k, v))
    with sdpa_kernel(SDPBackend.MATH):
        options = {"is_causal": True} if mask is None else {"attn_mask": ~mask}
        mixed = F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options)
    return mixed.permute(2, 0, 1, 3).reshape(SEQUENCE, BATCH, -1)


def equal_to_plain(mask):
    ours, theirs = inputs(torch.float64), inputs(torch.float64)
    mixed, expected = attended(*ours, mask), plain(*theirs, mask)
    torch.testing.assert_close(mixed, expected, rtol=1e-12, atol=1e-12)
    weight = torch.randn(mixed.shape, generator=torch.Generator().manual_seed(6), dtype=mixed.dtype)
    (mixed * weight).sum().backward()
    (expected * weight).sum().backward()
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-12, atol=1e-12)


MASKS = pytest.mark.parametrize("mask", [None, documents()], ids=["causal", "documents"])


@MASKS
def test_where_no_fused_kernel_takes_groups_they_are_repeated_with_equal_results(mask, calls, monkeypatch):
    """As on a GPU in float32, or with a mask: torch says that it would fall back to its plain arithmetic."""
    real = torch._fused_sdp_choice

    def choose(q, k, v, *given, enable_gqa=False):
        return SDPBackend.MATH.value if enable_gqa else real(q, k, v, *given)

    monkeypatch.setattr(torch, "_fused_sdp_choice", choose)
    equal_to_plain(mask)
    assert calls[0] == (HEADS, False, SDPBackend.FLASH_ATTENTION)


@MASKS
def test_where_one_does_nothing_is_copied(mask, calls):
    """As on a CPU."""
    equal_to_plain(mask)
    assert calls[0] == (GROUPS, True, SDPBackend.FLASH_ATTENTION)


def test_equal_heads_are_left_alone(calls, monkeypatch):
    monkeypatch.setattr(attention, "takes_groups", lambda *given: pytest.fail("asked"))
    q, _, _ = inputs(torch.float32)
    attended(q, q, q, None)
    assert calls == [(HEADS, False, SDPBackend.FLASH_ATTENTION)]


def test_every_copy_is_its_groups():
    groups = torch.arange(2 * 2 * 3 * 1.0).reshape(2, 2, 3, 1)
    assert torch.equal(attention.repeat_groups(groups, 6), groups.repeat_interleave(3, dim=1))
