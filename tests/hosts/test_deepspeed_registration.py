"""Registration with DeepSpeed: by import in any order, once or twice, undone, and refused where it does not fit."""

from __future__ import annotations

import base64
import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from unittest import mock

import pytest
from packaging.specifiers import SpecifierSet

from noflush.commands import tested

pytestmark = pytest.mark.multiproc
CLASS_SEEN = "deepspeed.PipelineEngine.__wrapped__.__name__"


def python(code, timeout=120):
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=timeout, env=_environment()
    )
    return done.returncode, done.stdout.strip().splitlines()[-1:] or [""], done.stderr


def _environment():
    return os.environ | {"DS_ACCELERATOR": "cpu"}


@pytest.mark.parametrize(
    "order",
    [
        "import noflush, deepspeed",
        "import deepspeed, noflush",
        pytest.param("from deepspeed import initialize\nimport noflush, deepspeed", marks=pytest.mark.slow),
        pytest.param(
            "import noflush\nnoflush.register()\nnoflush.register()\nimport deepspeed\nnoflush.register()",
            marks=pytest.mark.slow,
        ),
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
        pytest.param(
            *("del BF16.update_hp_grads", "bf16_optimizer.BF16_Optimizer.update_hp_grads. Install a tested version"),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            *("deepspeed.initialize = lambda: None", "deepspeed.initialize looking up PipelineEngine"),
            marks=pytest.mark.slow,
        ),
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


def doctor(config, capsys, *words):
    """(exit status, what was printed on one line)."""
    from noflush.__main__ import main

    status = main(["doctor", "--config", str(config), *words])
    return status, " ".join(capsys.readouterr().out.split())


def test_doctor(capsys, tmp_path):
    from noflush.__main__ import main

    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "seams in DeepSpeed 0.19" in out
    assert "seams in megatron-core: all found" in out
    for name in tested.NAMED:
        version = platform.python_version() if name == "Python" else metadata.version(name)
        assert f"{name}: {version} ({tested.verdict(name, version, tested.rows(), tested.requirements())[1]})" in out
    assert "these together: " in out
    assert "update kernel of a stage" in out
    assert out.count("all found") == 2
    assert "registered: yes" in out
    config = tmp_path / "ds.json"
    config.write_text(json.dumps({"async_pipeline": {"wieghts": 1}, "optimizer": {"type": "AdamW"}}))
    status, said = doctor(config, capsys)
    assert (status, "did you mean 'weights'" in said) == (1, True)
    config.write_text(json.dumps({"async_pipeline": {}, "optimizer": {"type": "AdamW"}}))
    assert doctor(config, capsys, "--stages", "4")[0] == 0
    two_versions = {"async_pipeline": {"weights": "2bw"}, "optimizer": {"type": "AdamW"}}
    config.write_text(json.dumps(two_versions | {"gradient_accumulation_steps": 3}))
    assert doctor(config, capsys, "--stages", "4")[0] == 0
    config.write_text(json.dumps(two_versions | {"gradient_accumulation_steps": 2}))
    assert doctor(config, capsys, "--stages", "4")[0] == 1


def test_doctor_refuses_what_noflush_does_not_take(capsys):
    from noflush.__main__ import main

    with mock.patch("noflush.commands.doctor.requirements", return_value={"torch": SpecifierSet(">=99")}):
        assert main(["doctor"]) == 1
    assert "(refused: noflush takes >=99)" in " ".join(capsys.readouterr().out.split())


def test_doctor_reads_what_deepspeed_reads(capsys, tmp_path):
    config = tmp_path / "ds.json"
    config.write_text('{\n  # a comment\n  "async_pipeline": {"weights": "2bw"},\n  "train_batch_size": 24,\n'
                      '  "train_micro_batch_size_per_gpu": 4\n}')  # fmt: skip
    # No optimizer section is no fault: a script may pass its own. K follows from the sizes: 6, or 3, or 2.
    status, said = doctor(config, capsys, "--stages", "4")
    assert status == 0
    assert "K = 6 with 1 data-parallel replicas" in said
    assert "the script must pass an optimizer" in said
    assert doctor(config, capsys, "--stages", "4", "--replicas", "2")[0] == 0
    status, said = doctor(config, capsys, "--stages", "4", "--replicas", "3")
    assert (status, "raise gradient_accumulation_steps to 3" in said) == (1, True)
    status, said = doctor(config, capsys, "--stages", "4", "--replicas", "5")
    assert (status, "must be the product of all the others" in said) == (1, True)
    word = base64.urlsafe_b64encode(json.dumps({"async_pipeline": {"weights": "none"}} | {"x": "y" * 300}).encode())
    status, said = doctor(word.decode(), capsys)
    assert (status, "weights is 'none'" in said) == (1, True)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("{", "is no JSON"),
        ("[1]", "holds a list: it must be a JSON object"),
        (None, "no such file"),
        (b"\xff", "codec"),
    ],
)
def test_doctor_refuses_what_is_no_config(content, said, tmp_path, capsys):
    from noflush.__main__ import main

    config = tmp_path / "ds.json"
    if content is not None:
        config.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert main(["doctor", "--config", str(config)]) == 2
    assert said in capsys.readouterr().err


AN_OLD_ONE = "__version__ = '0.14.5'\ndef initialize(): PipelineEngine"


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (AN_OLD_ONE, "- version 0.19.3 or newer"),
        pytest.param(AN_OLD_ONE, "- deepspeed.runtime.bf16_optimizer (No module", marks=pytest.mark.slow),
        pytest.param(
            *("__version__ = '0.19.8'", "- deepspeed.initialize looking up PipelineEngine when called"),
            marks=pytest.mark.slow,
        ),
        ("import torch.no_such_thing", "deepspeed cannot be imported: ModuleNotFoundError"),
    ],
)
def test_doctor_explains_a_deepspeed_that_does_not_fit(source, said, tmp_path):
    package = tmp_path / "deepspeed"
    package.mkdir()
    (package / "__init__.py").write_text(source)
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-m", "noflush", "doctor"],
        capture_output=True, text=True, timeout=120, env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert said in done.stdout
    assert "seams in megatron-core: all found" in done.stdout
    assert "Traceback" not in done.stderr
    assert "UserWarning" not in done.stderr


def test_a_config_in_base64_is_checked_before_the_script_starts():
    word = base64.urlsafe_b64encode(json.dumps({"async_pipeline": {"weights": "none"}, "x": "y" * 300}).encode())
    done = subprocess.run(
        [sys.executable, "-m", "noflush.run", __file__, f"--deepspeed_config={word.decode()}"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1
    assert "weights is 'none'" in done.stderr
    assert "Traceback" not in done.stderr


def test_init_distributed_compiles_nothing_on_a_cpu():
    """Not DeepSpeed's shared-memory collective, which training never calls: with it this waits minutes, or for ever."""
    code = (
        "import os, noflush, deepspeed\n"
        "from deepspeed.ops.op_builder.builder import OpBuilder\n"
        "def load(self, verbose=True): raise SystemExit(f'compiles {self.name}')\n"
        "OpBuilder.load = OpBuilder.jit_load = load\n"
        "os.environ.update(RANK='0', WORLD_SIZE='1', LOCAL_RANK='0', MASTER_ADDR='127.0.0.1', MASTER_PORT='0')\n"
        "from torch.distributed import TCPStore\n"
        "store = TCPStore('127.0.0.1', 0, is_master=True)\n"
        "os.environ['MASTER_PORT'] = str(store.port)\n"
        "os.environ['TORCHELASTIC_USE_AGENT_STORE'] = 'True'\n"
        "deepspeed.init_distributed('gloo')\n"
        "noflush.unregister(); print(deepspeed.ops.__compatible_ops__['deepspeed_shm_comm'])\n"
    )
    status, out, errors = python(code)
    assert status == 0, errors
    assert out == ["True"]  # as DeepSpeed had it
