"""Which kernel and which norm a run takes, and that the norms agree."""

from __future__ import annotations

import math
import sys
import types

import pytest
import torch

from noflush.kernels import choice
from noflush.kernels.launch import TritonKernel
from noflush.kernels.norm import apex_norm, gradient_norm

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lengths", [[1], [4096], [4097, 3], [9000, 1, 5000]])
def test_triton_norm(dtype, lengths):
    gradients = [torch.randn(n).to(dtype) for n in lengths]
    wanted = torch.cat([g.double() for g in gradients]).norm().item()
    assert TritonKernel(CPU).norm(gradients).item() == pytest.approx(wanted, rel=1e-6)
    assert gradient_norm(gradients).item() == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_norms_show_what_is_not_finite(bad):
    gradients = [torch.ones(5000), torch.ones(3)]
    gradients[1][2] = bad
    assert not math.isfinite(TritonKernel(CPU).norm(gradients).item())
    assert not math.isfinite(gradient_norm(gradients).item())


def test_norm_is_the_one_torch_clips_by():
    gradients = [torch.randn(n) for n in (5, 1000, 33)]
    assert torch.equal(gradient_norm(gradients), torch.nn.utils.get_total_norm(gradients))


def test_no_gradients_have_no_norm():
    assert gradient_norm([]).item() == TritonKernel(CPU).norm([]).item() == 0.0


def fake(monkeypatch, name, **members):
    module = types.ModuleType(name)
    vars(module).update(members)
    monkeypatch.setitem(sys.modules, name, module)


def test_apex_is_the_real_one_or_none(monkeypatch):
    assert apex_norm() is None
    fake(monkeypatch, "apex")  # PyPI's toolkit for Pyramid
    assert apex_norm() is None
    fake(monkeypatch, "apex.multi_tensor_apply", multi_tensor_applier=lambda kernel, flag, lists, by: kernel(*lists))
    assert apex_norm() is None  # NVIDIA's, built without its CUDA extension
    fake(monkeypatch, "amp_C", multi_tensor_l2norm=lambda tensors: (torch.stack([t.norm() for t in tensors]).norm(),))
    norm = apex_norm()
    assert norm is not None
    assert norm([torch.tensor([3.0]), torch.tensor([4.0])]).item() == 5.0


def test_auto_on_a_cpu(monkeypatch):
    kernel, reason = choice.choose("auto", CPU, 1000)
    assert kernel.name == "torch"
    assert reason == "1,000 weights on a CPU: not worth compiling for"
    monkeypatch.setattr(choice.shutil, "which", lambda name: f"/usr/bin/{name}")
    kernel, reason = choice.choose("auto", CPU, choice.WORTH_COMPILING)
    assert (kernel.name, reason) == ("compile", "4,000,000 weights on a CPU: torch.compile")
    monkeypatch.setattr(choice.shutil, "which", lambda name: None)
    kernel, reason = choice.choose("auto", CPU, choice.WORTH_COMPILING)
    assert (kernel.name, reason) == ("torch", "no C++ compiler found to compile with")
    with pytest.raises(choice.KernelError, match="needs a C\\+\\+ compiler"):
        choice.choose("compile", CPU, 10)


def test_auto_on_a_gpu(monkeypatch):
    made = []
    monkeypatch.setattr(choice, "_triton", lambda device: made.append(device) or TritonKernel(CPU))
    kernel, reason = choice.choose("auto", torch.device("cuda", 0), 10)
    assert (kernel.name, reason, made) == ("triton", "the fused kernel for GPUs", [torch.device("cuda", 0)])
    monkeypatch.setattr(choice.importlib.util, "find_spec", lambda name: None)
    kernel, reason = choice.choose("auto", torch.device("cuda", 0), 10)
    assert (kernel.name, reason) == ("torch", "no Triton: the package triton is not installed")


def test_triton_on_a_cpu_is_for_the_interpreter(monkeypatch):
    assert choice.choose("triton", CPU, 10)[0].name == "triton"
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(choice.KernelError, match="its kernels need a GPU"):
        choice.choose("triton", CPU, 10)
