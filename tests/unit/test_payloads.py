"""What is no payload, no batch and no loss: one sentence that says what it was and what may be."""

from __future__ import annotations

import pytest
import torch

from noflush.stage.messages import PayloadSpec
from noflush.stage.payloads import PayloadError, check_batch, check_loss, check_outputs

X = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("outputs", "said"),
    [
        (None, "stage 1 returned None:"),
        (3, "stage 1 returned an int:"),
        ({"hidden": X}, r"stage 1 returned a dict \{'hidden': a tensor float32\[2, 3\]\}:"),
        ([X, X], r"stage 1 returned a list \(a tensor float32\[2, 3\], a tensor float32\[2, 3\]\)"),
        ((), "stage 1 returned an empty tuple:"),
        ((X, None), r"a tuple \(a tensor float32\[2, 3\], None\)"),
        ((X, 0.5), "a float"),
        (X.to_sparse(), r"a sparse_coo tensor float32\[2, 3\]"),
        (X.to(torch.float8_e4m3fn), "a tensor float8_e4m3fn"),
        (tuple([X] * 9 + [None]), r"\.\.\.\)"),
    ],
)
def test_outputs_that_cannot_be_sent(outputs, said):
    with pytest.raises(PayloadError, match=said) as caught:
        check_outputs(outputs, 1)
    assert "must return a dense tensor, or a tuple of tensors" in str(caught.value)


def test_outputs_that_can():
    for outputs in (X, (X,), (X, X > 0, torch.arange(3)), X.bfloat16(), torch.zeros(0), torch.tensor(1.0)):
        check_outputs(outputs, 0)
        spec = PayloadSpec.of(outputs)
        assert PayloadSpec.from_words(spec.to_words()) == spec


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (None, "loss is None"),
        ({"lm": X.sum()}, "loss is a dict {'lm': a tensor"),
        ([X.sum(), X.sum()], "loss is a list"),
        (X, r"loss is a tensor float32\[2, 3\]: it must be one tensor of one element"),
        (1.0, "loss is a float"),
        (torch.tensor(3), r"loss is a tensor int64\[\]"),
        (X.sum(), "depends on nothing that trains"),
    ],
)
def test_losses_that_backward_cannot_start_from(loss, said):
    with pytest.raises(PayloadError, match=said):
        check_loss(loss)


def test_losses_that_are_good():
    check_loss(X.clone().requires_grad_().mean())
    check_loss(X.clone().requires_grad_().mean().reshape(1))
    with torch.no_grad():
        check_loss(X.mean())


@pytest.mark.parametrize("stage", [0, 2])
@pytest.mark.parametrize(
    ("batch", "said"),
    [
        ({"input_ids": X}, "was given a dict {'input_ids': "),
        (X, "was given a tensor"),
        (None, "was given None"),
        ("text", "was given a str"),
        ([], "was given an empty list"),
    ],
)
def test_batches_that_are_no_pair(batch, said, stage):
    with pytest.raises(PayloadError, match=f"stage {stage} {said}") as caught:
        check_batch(batch, stage, 3)
    assert "collate_fn" in str(caught.value)


def test_each_end_judges_what_it_reads():
    with pytest.raises(PayloadError, match="a tuple \\(a dict"):
        check_batch(({"ids": X}, X), 0, 2)
    with pytest.raises(PayloadError, match="a tuple \\(a tuple \\(a tensor"):
        check_batch(((X, None), X), 0, 2)
    check_batch(({"ids": X}, X), 1, 2)
    check_batch((X,), 0, 2)
    with pytest.raises(PayloadError):
        check_batch((X,), 1, 2)
    for batch in ((X, {"labels": X}), ((X, X), X), [[X, X], [X]], (X, None)):
        check_batch(batch, 0, 1)


def test_what_is_conjugated_lazily_travels_as_its_values():
    from noflush.stage.channels import as_wire

    x = torch.tensor([1 + 2j, 3 - 1j])
    for lazy in (x.conj(), torch.tensor([1.0, -2.0])._neg_view(), x.conj().imag):
        wire = as_wire(lazy.detach().resolve_conj().resolve_neg().contiguous())
        assert torch.equal(wire.view(lazy.dtype).reshape(lazy.shape), lazy)


def test_what_nccl_cannot_carry_travels_as_bytes():
    from noflush.stage.channels import NATIVE, as_wire

    for dtype in (torch.bool, torch.int16, torch.complex64, torch.complex128):
        for sent in (torch.ones(3, 2, dtype=dtype), torch.ones((), dtype=dtype)):
            received = torch.zeros_like(sent)
            as_wire(received).copy_(as_wire(sent))  # a view of the very tensor, as a receive fills it
            assert as_wire(sent).dtype in NATIVE
            assert torch.equal(received, sent)
    for dtype in NATIVE:
        assert as_wire(torch.ones(2, dtype=dtype)).dtype is dtype
