"""Registration with DeepSpeed: by import in any order, once or twice, undone, and refused where it does not fit."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytestmark = pytest.mark.multiproc
CLASS_SEEN = "deepspeed.PipelineEngine.__wrapped__.__name__"


def python(code, timeout=120):
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout, env=_environment()
    )
    return done.returncode, done.stdout.strip().splitlines()[-1:] or [""], done.stderr


def _environment():
    import os

    return os.environ | {"DS_ACCELERATOR": "cpu"}


@pytest.mark.parametrize(
    "order",
    [
        "import noflush, deepspeed",
        "import deepspeed, noflush",
        "from deepspeed import initialize\nimport noflush, deepspeed",
        "import noflush\nnoflush.register()\nnoflush.register()\nimport deepspeed\nnoflush.register()",
    ],
)
def test_import_registers_once_in_any_order(order):
    code = f"{order}\nprint(type(deepspeed.PipelineEngine).__name__, {CLASS_SEEN})"
    status, out, errors = python(code)
    assert status == 0, errors
    assert out == ["_StandIn PipelineEngine"]


def test_unregister_puts_the_host_back():
    code = (
        "import deepspeed; before = deepspeed.PipelineEngine\n"
        "import noflush; assert deepspeed.PipelineEngine is not before\n"
        "noflush.unregister(); noflush.unregister(); print(deepspeed.PipelineEngine is before)\n"
        "assert type(deepspeed.DeepSpeedEngine) is type\n"
    )
    assert python(code)[1] == ["True"]


def test_unregister_before_the_host_is_imported():
    code = "import noflush; noflush.unregister()\nimport deepspeed\nprint(type(deepspeed.PipelineEngine) is type)"
    assert python(code)[1] == ["True"]


def test_a_subclass_derives_from_the_host_itself():
    code = (
        "import noflush, deepspeed\nfrom deepspeed.runtime.pipe.engine import PipelineEngine as PE\n"
        "class Mine(deepspeed.PipelineEngine): pass\n"
        "print(Mine.__mro__[1] is PE, type(Mine) is type, issubclass(Mine, deepspeed.PipelineEngine))"
    )
    assert python(code)[1] == ["True True True"]


def test_import_alone_is_light():
    code = "import noflush, sys; print(sorted({'torch', 'deepspeed'} & set(sys.modules)))"
    assert python(code)[1] == ["[]"]


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        ("deepspeed.__version__ = '0.18.9'", "cannot register with DeepSpeed 0.18.9 (tested: 0.19.8): missing version"),
        ("del PE._exec_forward_pass", "PipelineEngine._exec_forward_pass. Install a tested version"),
        ("del BF16.update_hp_grads", "bf16_optimizer.BF16_Optimizer.update_hp_grads. Install a tested version"),
        ("deepspeed.initialize = lambda: None", "deepspeed.initialize looking up PipelineEngine"),
    ],
)
def test_another_shape_of_host_is_refused(break_it, message):
    code = (
        "import deepspeed\nfrom deepspeed.runtime.pipe.engine import PipelineEngine as PE\n"
        f"from deepspeed.runtime.bf16_optimizer import BF16_Optimizer as BF16\n{break_it}\nimport noflush"
    )
    status, _, errors = python(code)
    assert status != 0
    assert message in errors.splitlines()[-1]


def test_doctor(capsys, tmp_path):
    from noflush.__main__ import main

    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "all found" in out
    assert "registered: yes" in out
    config = tmp_path / "ds.json"
    config.write_text(json.dumps({"async_pipeline": {"wieghts": 1}, "optimizer": {"type": "AdamW"}}))
    assert main(["doctor", "--config", str(config)]) == 1
    assert "did you mean 'weights'" in " ".join(capsys.readouterr().out.split())
    config.write_text(json.dumps({"async_pipeline": {}, "optimizer": {"type": "AdamW"}}))
    assert main(["doctor", "--config", str(config), "--stages", "4"]) == 0
    two_versions = {"async_pipeline": {"weights": "2bw"}, "optimizer": {"type": "AdamW"}}
    config.write_text(json.dumps(two_versions | {"gradient_accumulation_steps": 3}))
    assert main(["doctor", "--config", str(config), "--stages", "4"]) == 0
    config.write_text(json.dumps(two_versions | {"gradient_accumulation_steps": 2}))
    assert main(["doctor", "--config", str(config), "--stages", "4"]) == 1
