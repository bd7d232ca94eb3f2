"""A script of launch/ that is run by its path runs the code beside it, or says that it does not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPTS = sorted(
    path.name for path in (ROOT / "launch").glob("*.py") if '\nif __name__ == "__main__":' in path.read_text()
)


def run(*words, path):
    environ = os.environ | {"PYTHONPATH": str(path)}
    return subprocess.run([sys.executable, *words], env=environ, capture_output=True, text=True, timeout=120)


@pytest.fixture
def copy(tmp_path):
    """An installed copy, of which nothing but its being imported matters."""
    folder = tmp_path / "site-packages" / "noflush" / "launch"
    folder.mkdir(parents=True)
    for package in (folder, folder.parent):
        (package / "__init__.py").touch()
    return folder


def test_all_four_are_looked_at():
    assert SCRIPTS == ["convert_checkpoint.py", "generate.py", "preprocess_data.py", "pretrain_gpt.py"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_another_copy_is_not_run_unawares(name, copy):
    script = ROOT / "launch" / name
    done = run(script, "--help", path=copy.parents[1])
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr == (
        f"noflush: {script} would run the code in {copy}, not its own: pip install -e {ROOT} to run this one, or say "
        f"python -m noflush.launch.{script.stem} to run that one\n"
    )
    assert not done.stdout


def test_by_way_of_a_link_it_is_the_same_code(tmp_path):
    package = tmp_path / "noflush"
    package.mkdir()
    for found in (*(ROOT / "plugin" / "noflush").iterdir(), ROOT / "patches", ROOT / "launch"):
        (package / found.name).symlink_to(found)
    for script in (ROOT / "launch" / "preprocess_data.py", package / "launch" / "preprocess_data.py"):
        done = run(script, "--help", path=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "--append-eod" in done.stdout


def test_the_installed_copy_runs_as_a_module(copy):
    (copy / "generate.py").write_text("print(__package__)")
    assert run("-m", "noflush.launch.generate", path=copy.parents[1]).stdout == "noflush.launch\n"
    # By its path too: it is the code beside it.
    (copy / "own_code.py").write_text((ROOT / "launch" / "own_code.py").read_text())
    (copy / "generate.py").write_text((ROOT / "launch" / "generate.py").read_text().split("\nfrom noflush")[0])
    assert run(copy / "generate.py", path=copy.parents[1]).returncode == 0


def test_without_noflush_that_is_what_is_said(tmp_path):
    script = ROOT / "launch" / "pretrain_gpt.py"
    done = run("-S", script, path=tmp_path)  # -S: no site-packages
    assert done.returncode == 2
    assert "needs noflush, which is not installed for" in done.stderr
    assert done.stderr.endswith(f"pip install -e {ROOT}\n")


def test_what_noflush_itself_lacks_is_not_taken_for_it(copy):
    (copy.parent / "__init__.py").write_text("import not_there")
    done = run(ROOT / "launch" / "generate.py", path=copy.parents[1])
    assert "No module named 'not_there'" in done.stderr
