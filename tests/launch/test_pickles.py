"""No file of a checkpoint runs code: what is refused, and that every pickle trick is."""

from __future__ import annotations

import collections
import fractions
import os
import pickle
import random
import zipfile

import numpy as np
import pytest
import torch

from noflush.launch.training.pickles import ALLOWED, allowed, file_fault


class Calls:
    """Pickled, a call of ``function`` when it is unpickled."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def saved(tmp_path, value, **options):
    path = tmp_path / "mp_rank_00_model_states.pt"
    torch.save(value, path, **options)
    return path


def with_pickle(tmp_path, stream):
    """A file of torch.save's whose pickle is ``stream``."""
    plain = saved(tmp_path, {"a": 1})
    path = tmp_path / "other.pt"
    with zipfile.ZipFile(plain) as source, zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as target:
        for item in source.infolist():
            data = stream if item.filename.endswith("data.pkl") else source.read(item)
            target.writestr(item.filename, data)
    return path


def test_what_a_run_saves_is_read(tmp_path):
    state = {
        "module": collections.OrderedDict(weight=torch.nn.Parameter(torch.ones(3)), bias=torch.zeros(2).bfloat16()),
        "random": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "names": ["a", None, True, 1.5, 2**70, b"bytes"],
    }
    assert file_fault(saved(tmp_path, state)) is None
    # Everything allowed is there to be allowed, but for numpy's other name of one.
    assert len(allowed()) >= len(ALLOWED) - 1


@pytest.mark.parametrize(
    ("function", "arguments", "said"),
    [
        (os.system, ("touch {witness}",), "posix.system"),
        (exec, ("open({witness!r}, 'w')",), "builtins.exec"),
        (eval, ("open({witness!r}, 'w')",), "builtins.eval"),
        (os.remove, ("{witness}",), "posix.remove"),
        (open, ("{witness}", "w"), f"{open.__module__}.open"),  # _io, from Python 3.13 on
        (getattr, (os, "name"), "builtins.getattr"),
        (torch.load, ("{witness}",), "torch.serialization.load"),
    ],
)
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_that_calls_is_refused_and_not_run(tmp_path, function, arguments, said, protocol):
    if function is getattr:
        function, arguments = getattr, ("abc", "upper")
    witness = str(tmp_path / "witness")
    call = Calls(function, *(word.format(witness=witness) for word in arguments))
    path = saved(tmp_path, {"module": None, "client": [call]}, pickle_protocol=protocol)
    fault = file_fault(path)
    assert not os.path.exists(witness)
    assert fault is not None
    assert str(path) in fault
    if protocol == 2:
        assert f"would run {said} when it is loaded" in fault
        assert "Give --trust-checkpoint only if you know who that was" in fault
    else:  # torch reads no such opcode
        assert "can be read safely" in fault
    assert file_fault(path, trusted=True) is None


@pytest.mark.parametrize(
    ("stream", "said"),
    [
        (b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x04true\x85R.", "Unsupported operand"),
        (b"\x80\x02(S'true'\niposix\nsystem\n.", "Unsupported operand"),
        (b"\x80\x02(cposix\nsystem\nX\x04\x00\x00\x00trueo.", "Unsupported operand"),
        # Only names that are allowed, but in a call that is not: an attribute of an object made from one.
        (b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.", "can be read safely"),
        (b"\x80\x02ccollections\nOrderedDict\nX\x01\x00\x00\x00aR.", "can be read safely"),
        (b"\x80\x02}", "can be read safely"),
        (b"", "can be read safely"),
    ],
)
def test_streams_that_no_torch_wrote(tmp_path, stream, said):
    fault = file_fault(with_pickle(tmp_path, stream))
    assert fault is not None
    assert said in fault
    assert "weights_only" not in fault  # torch recommends to read it all the same


def test_a_class_of_a_users_own_is_named(tmp_path):
    fault = file_fault(saved(tmp_path, {"rate": fractions.Fraction(1, 2)}))
    assert "would run fractions.Fraction when it is loaded" in fault


def test_what_is_no_file_of_torchs_is_said(tmp_path):
    path = saved(tmp_path, {"weight": torch.ones(1000)})
    whole = path.read_bytes()
    for size in (1, 100, len(whole) // 2, len(whole) - 10):
        path.write_bytes(whole[:size])
        assert "is cut short, or not in torch.save's format since 1.6: copy it again" in file_fault(path)
    path.write_bytes(b"")
    assert "is empty: copy it again" in file_fault(path)
    assert "is empty" in file_fault(path, trusted=True)
    torch.save({"weight": torch.ones(3)}, path, _use_new_zipfile_serialization=False)
    assert "not in torch.save's format since 1.6" in file_fault(path)
    assert file_fault(path, trusted=True) is None
    path.write_bytes(pickle.dumps({"a": 1}))
    assert "not in torch.save's format" in file_fault(path)
    path.unlink()
    assert "cannot be read: No such file" in file_fault(path)
    path.mkdir()
    assert "cannot be read: Is a directory" in file_fault(path)


def test_a_program_of_torchscript_is_no_checkpoint(tmp_path):
    path = tmp_path / "layer_00-model_states.pt"
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    assert "torchscript" in file_fault(path)
