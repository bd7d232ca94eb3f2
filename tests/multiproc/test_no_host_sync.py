"""Between a call's first action and its last no host waits for its device: nothing is read back from it."""

from __future__ import annotations

import sys
from unittest import mock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from noflush.stage.prefetch import Prefetch
from tests.multiproc import training as t
from tests.multiproc.ranks import run_ranks

pytestmark = pytest.mark.multiproc

# What reads a device's memory: item(), bool(), float(), int() are the first.
READS = {"aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select", "aten::is_nonzero"}
METHODS = ("cpu", "tolist", "numpy", "item")
COPIES = ("clone", "to", "copy_", "cuda")


def who():
    """The module nearest to what was just called that is noflush's, DeepSpeed's, or Triton's interpreter."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_globals.get("__name__", "").split(".")[0]
        if name in ("noflush", "deepspeed", "triton"):
            return f"{frame.f_globals['__name__']}:{frame.f_lineno}" if name != "triton" else None
        frame = frame.f_back
    return None


class Reads(TorchDispatchMode):
    """Notes every read of a tensor's memory by the host, whoever asks for it."""

    def __init__(self, found):
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._schema.name in READS and (where := who()):
            self.found.append((function._schema.name, where))
        return function(*args, **(kwargs or {}))


class Arrived(Prefetch):
    """As on a device: what is handed on is another tensor than the loader's."""

    def start(self, batch):
        return tuple(part.clone() for part in batch), None


def of_the_loader(batches):
    """Batches whose tensors are known as the host's own."""
    for batch in batches:
        for tensor in batch:
            tensor.is_of_the_loader = True
        yield batch


def train(rank, optimizer, block, more, prefetch=Arrived):
    with (
        mock.patch("noflush.stage.stage.dist.get_backend", return_value="nccl"),
        mock.patch("noflush.stage.stage.Prefetch", prefetch),
    ):
        engine = t.build(4, t.ds_config(2, optimizer, block, **more))
    from deepspeed.accelerator import get_accelerator

    runner, found = engine.pipeline_stage.runner, []
    run_call = runner.run_call

    def watched():
        patches = []
        for name in METHODS:
            real = getattr(torch.Tensor, name)

            def read(tensor, *args, name=name, real=real, **kwargs):
                if where := who():
                    found.append((name, where))
                return real(tensor, *args, **kwargs)

            patches.append(mock.patch.object(torch.Tensor, name, read))
        for name in COPIES:
            real = getattr(torch.Tensor, name)

            def copied(tensor, *args, name=name, real=real, **kwargs):
                if any(getattr(t, "is_of_the_loader", False) for t in (tensor, *args)):
                    found.append((name, who()))
                return real(tensor, *args, **kwargs)

            patches.append(mock.patch.object(torch.Tensor, name, copied))

        def waits(*args):
            found.append(("synchronize", who()))

        patches.append(mock.patch.object(get_accelerator(), "synchronize", waits))
        for patch in patches:
            patch.start()
        try:
            with Reads(found):
                run_call()
        finally:
            for patch in patches:
                patch.stop()

    stream = of_the_loader(t.data(16))
    for call in range(8):
        runner.run_call = watched if call >= 5 else run_call
        engine.train_batch(stream)
    engine.drain()
    return found


TRITON = {"kernel": "triton"}


@pytest.mark.parametrize(("clip", "by"), [(0.0, "stage"), (1.0, "stage"), (1.0, "lagged_global")])
def test_nothing_is_read_in_the_steady_state(clip, by):
    block, more = TRITON | {"clip": by}, {"gradient_clipping": clip}
    for found in run_ranks(train, 4, timeout=200, optimizer=t.NADAMW, block=block, more=more):
        assert found == []


def test_a_copy_of_the_loaders_batch_is_found():
    """What DeepSpeed does by itself: a micro-batch goes over while the call runs."""
    found = run_ranks(train, 4, timeout=200, optimizer=t.NADAMW, block=TRITON, more={}, prefetch=Prefetch)
    assert {name for name, _ in found[0]} & {"clone", "to"}
    assert {name for name, _ in found[3]} & {"clone", "to"}
    assert found[1] == found[2] == []


def test_what_reads_is_found():
    """DeepSpeed's own optimizers read the norm on the host: the test above can fail."""
    for found in run_ranks(train, 4, optimizer=t.ADAMW, block={}, more={"gradient_clipping": 1.0}):
        assert any("noflush.stage.update" in where for _, where in found)
