"""DESIGN's laws of structure, and what is installed where."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "plugin" / "noflush"
LAUNCH = ROOT / "launch"
PURE = [
    "schedule",
    "posting",
    "deadlock",
    "config",
    "timing",
    "plan",
    "communicators",
    "progress",
    "loss_scale",
    "kernels.scalars",
    "figures",
    "blame",
    "host_config",
    "host_faults",
    "host_optimizers",
]
PURE_IN_LAUNCH = [
    "ranks",
    "signals",
    "arguments.parser",
    "arguments.meaning",
    "arguments.settings",
    "arguments.progress",
    "gpt.size",
    "refusal",
    "training.checkpoint_faults",
    "training.folder_lock",
]
NO_HOST = [
    *(
        "versions",
        "gradients",
        "slices",
        "checkpoint",
        "optim",
        "simulate",
        "channels",
        "last_words",
        "exit_guard",
        "keeper",
        "runner",
        "intake",
        "guard",
        "skips",
        "reports",
        "trace",
    ),
    *("timeline", "kernels/reference", "kernels/host", "kernels/device", "kernels/fused", "kernels/norm"),
]
HOSTS = {"deepspeed", "megatron"}


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("module", PURE)
def test_pure_modules_import_neither_torch_nor_a_host(module):
    assert not imported(PACKAGE / f"{module.replace('.', '/')}.py") & (HOSTS | {"torch"})
    code = f"import noflush.{module}, sys; sys.exit(bool({{'torch', 'deepspeed'}} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


@pytest.mark.parametrize("module", PURE_IN_LAUNCH)
def test_what_is_read_before_training_imports_neither_torch_nor_a_host(module):
    assert not imported(LAUNCH / f"{module.replace('.', '/')}.py") & (HOSTS | {"torch"})
    code = (
        f"import noflush.launch.{module}, sys; sys.exit(bool({{'torch', 'deepspeed', 'megatron'}} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


@pytest.mark.parametrize("module", NO_HOST)
def test_these_modules_import_no_host(module):
    assert not imported(PACKAGE / f"{module}.py") & HOSTS


def test_megatron_is_imported_by_patches_and_launch_alone():
    assert [f for f in PACKAGE.rglob("*.py") if "megatron" in imported(f)] == []


def test_only_versions_moves_parameter_storage():
    movers = []
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Assign):
                movers += [file.stem for t in node.targets if isinstance(t, ast.Attribute) and t.attr == "data"]
    assert set(movers) == {"versions"}


def test_every_package_folder_is_listed_for_the_wheel():
    listed = (ROOT / "pyproject.toml").read_text()
    for folder in [PACKAGE, *[f.parent for f in PACKAGE.rglob("__init__.py")]]:
        name = "noflush" if folder == PACKAGE else f"noflush.{folder.name}"
        assert f'"{name}"' in listed
    for folder in [f.parent for f in LAUNCH.rglob("__init__.py")]:
        assert '"' + ".".join(["noflush", *folder.relative_to(ROOT).parts]) + '"' in listed
    assert '"noflush.patches"' in listed
