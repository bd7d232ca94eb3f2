"""Each kernel drives a whole run, and all come to the same weights within rounding."""

from __future__ import annotations

import pytest
import torch

from noflush.kernels.choice import cpu_compiler
from tests.multiproc import training as t
from tests.multiproc.ranks import run_ranks

pytestmark = pytest.mark.multiproc

needs_compiler = pytest.mark.skipif(not cpu_compiler(), reason="torch.compile needs a C++ compiler")
CALLS = 5
CASES = {
    "float32": (t.NADAMW, {}),
    "bf16 ZeRO-1": (t.NADAMW, {"bf16": {"enabled": True}, "zero_optimization": {"stage": 1}}),
    "bf16, clipped": (t.NADAMW, {"bf16": {"enabled": True}, "gradient_clipping": 0.05}),
}


def train_with(rank, kernel):
    results = {}
    for name, (optimizer, more) in CASES.items():
        config = t.ds_config(1, optimizer, {"kernel": kernel}, **more)
        used = []
        note = lambda e, _, used=used: used.append(e.pipeline_stage.update.kernel.name)  # noqa: E731
        results[name] = t.train(rank, 2, 1, CALLS, config, between=note)
        assert set(used) == {kernel}
    return results


@pytest.mark.parametrize("kernel", ["triton", pytest.param("compile", marks=needs_compiler)])
def test_every_kernel_trains_as_torch_does(kernel):
    reference = run_ranks(train_with, 2, kernel="torch")
    others = run_ranks(train_with, 2, timeout=280, environment={"TRITON_INTERPRET": "1"}, kernel=kernel)
    for name in CASES:
        for one, other in zip(reference, others, strict=True):
            p, q = (torch.cat([w.flatten() for w in run[name]["weights"]]) for run in (one, other))
            apart = (p.float() - q.float()).abs()
            if p.dtype == torch.float32:  # 0.3 % of a step
                assert (apart <= 1e-5 + 2e-5 * p.abs()).all(), name
            else:
                # A rounding that tips the other way changes later gradients a little; those of the key biases are
                # nothing but rounding, and move by whole steps. On the mean, a tenth of a step.
                assert apart.mean() <= 3e-4, (name, apart.mean())
            assert one[name]["losses"] == pytest.approx(
                other[name]["losses"], rel=1e-5 if p.dtype == torch.float32 else 2**-7
            )


def refuse_kernel_without_use(rank):
    import deepspeed

    module = deepspeed.pipe.PipelineModule(t.layers(), num_stages=1, loss_fn=t.next_token_loss)
    config = t.ds_config(1, block={"kernel": "triton"})
    del config["optimizer"]
    deepspeed.initialize(model=module, config=config, optimizer=torch.optim.AdamW(module.parameters()))


def test_kernel_for_a_clients_own_optimizer_is_one_clear_error():
    ((kind, message),) = run_ranks(refuse_kernel_without_use, 1, expect_errors=True)
    assert kind == "ConfigError"
    assert "async_pipeline.kernel is 'triton', but the optimizer is a AdamW, which updates by itself" in message


def refuse_triton(rank):
    t.build(1, t.ds_config(1, block={"kernel": "triton"}))


def test_triton_without_a_gpu_is_one_clear_error():
    ((kind, message),) = run_ranks(refuse_triton, 1, expect_errors=True, environment={"TRITON_INTERPRET": "0"})
    assert kind == "KernelError"
    assert "kernel 'triton' cannot run here: its kernels need a GPU" in message
    assert "use 'compile', 'torch' or 'auto'" in message
