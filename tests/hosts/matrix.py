"""Runs the tests on other Pythons, torches and hosts, each in an environment of its own; writes what it saw.

``make test-hosts``, or ``python -m tests.hosts.matrix --only NAME``. An environment lies in ``build/hosts/NAME`` and is
made once; what was seen of it stands beside it, a part of the tests at a time, so that a run that was stopped goes on
where it stood. Then ``tested.json``, which `doctor` reads, and the table of docs/support.md are written: they hold what
was seen, and nothing else. torch comes as the index has it: CUDA builds of several GB, or with UV_TORCH_BACKEND=cpu
those for CPUs.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from noflush.commands import tested

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "build" / "hosts"
DOCUMENT = ROOT / "docs" / "support.md"
START, END = "<!-- make test-hosts writes from here -->", "<!-- to here -->"
_FAST = "not slow and not slurm and not e2e"
_ENGINE = ("exact", "mixed_exact", "plain", "checkpoints", "tied")
PARTS = {
    "unit": ("tests/unit", "-m", _FAST),
    "hosts": ("tests/hosts", "-m", _FAST),
    "launch": ("tests/launch", "-m", f"{_FAST} and not multiproc"),
    "training": ("tests/launch", "-m", f"{_FAST} and multiproc"),
    "engine": (*(f"tests/multiproc/test_{name}.py" for name in _ENGINE), "-m", _FAST),
    "kernels": ("tests/kernels", "-m", _FAST),
}
"""What pytest is given. Of all tests, those that depend on versions; of the engine's, those that an oracle answers."""
NEEDED = {"unit", "hosts"}
"""Without which an environment is no row; which others were run stands in the row."""

_ABOUT_THE_MATRIX = "tests/unit/test_tested.py::test_releases_said_to_be_tested_were"

VERSIONS = """
import json, platform
from importlib import metadata
def version(name):
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
print(json.dumps({"Python": platform.python_version(), **{name: version(name) for name in NAMES}}))
"""


@dataclass(frozen=True)
class Environment:
    """A row of the matrix: a Python, and what is pinned in it. Everything else is the newest that pip finds."""

    python: str
    pins: tuple[str, ...]


ENVIRONMENTS = {
    "oldest": Environment("3.10", ("torch==2.9.0", "megatron-core==0.16.1")),
    "python-3.11": Environment("3.11", ("torch==2.13.0", "megatron-core==0.16.1")),
    "python-3.12": Environment("3.12", ("torch==2.13.0", "megatron-core==0.19.2")),
    "newest": Environment("3.13", ("torch==2.15.0", "megatron-core==0.19.2")),
}


class SetupError(RuntimeError):
    """An environment could not be made; carries what was said."""


def interpreter(series: str) -> str:
    """A Python of ``series`` ("3.12"): pyenv's, else what uv finds (or fetches, unless UV_PYTHON_DOWNLOADS=never)."""
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    found = sorted(pyenv.glob(f"{series}.*/bin/python"))
    return str(found[-1]) if found else series


def make(name: str, environment: Environment) -> Path:
    """The environment's Python. Made anew when its pins or the project's requirements are others. Raises SetupError."""
    folder = FOLDER / name
    wanted = [*environment.pins, (ROOT / "pyproject.toml").read_text()]
    stamp, mark = folder / "made", hashlib.sha256("\n".join(wanted).encode()).hexdigest()
    python = folder / "bin" / "python"
    if stamp.is_file() and stamp.read_text() == mark:
        return python
    uv = shutil.which("uv", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if uv is None:
        raise SetupError("uv is not installed: make setup")
    print(f"== {name}: Python {environment.python}, {', '.join(environment.pins)}", flush=True)
    install = ["pip", "install", "-q", "--python", str(python), *environment.pins, "-e", f"{ROOT}[tests,triton]"]
    for command in (["venv", "-q", "--clear", "--python", interpreter(environment.python), str(folder)], install):
        # The cache lies beside the environments: uv links files from it, so that a package is on the disk once.
        settings = {"UV_CACHE_DIR": str(FOLDER / "cache"), "DS_BUILD_OPS": "0"}
        done = subprocess.run([uv, *command], env=os.environ | settings, capture_output=True, text=True)
        if done.returncode:
            raise SetupError(done.stderr.strip() or done.stdout.strip())
    stamp.write_text(mark)
    return python


def versions_in(python: Path) -> dict[str, str]:
    """What the environment has, by the names of `tested.NAMED`."""
    names = [name for name in tested.NAMED if name != "Python"]
    code = f"NAMES = {names!r}\n{VERSIONS}"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    return {name: version for name, version in json.loads(done.stdout).items() if version is not None}


def run_part(python: Path, words: Sequence[str], workers: int, report: Path, limit: float) -> dict[str, Any]:
    """Counts, and names of failures, of the tests that ``words`` name. Not done in ``limit`` seconds is a failure."""
    report.unlink(missing_ok=True)
    command = [python, "-m", "pytest", *words, "-n", str(workers), "--dist", "loadfile",
               "-p", "no:cacheprovider", "--deselect", _ABOUT_THE_MATRIX, f"--junitxml={report}"]  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    try:
        with report.with_suffix(".log").open("w") as log:
            subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=log, timeout=limit)
    except subprocess.TimeoutExpired:
        return {"passed": 0, "failed": 1, "skipped": 0, "failures": [f"{report.stem}: not done in {limit:.0f} s"]}
    if not report.is_file():
        return {"passed": 0, "failed": 1, "skipped": 0, "failures": [f"{report.stem}: pytest could not start"]}
    return counts(report)


def after_second_try(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """``first``'s counts when what failed there was run again with ``second``'s.

    A second run of other names shows nothing (pytest could not start, or a test was renamed: then ``--again``).
    """
    if not {*second["failures"]} <= {*first["failures"]}:
        return first
    return first | {
        "passed": first["passed"] + second["passed"],
        "alone": first.get("alone", 0) + second["passed"],
        "failed": second["failed"],
        "skipped": first["skipped"] + second["skipped"],
        "failures": second["failures"],
    }


def counts(report: Path) -> dict[str, Any]:
    """Passed, failed (errors too) and skipped tests of a JUnit report, and the names of those that failed."""
    passed, failures, skipped = 0, [], 0
    for case in xml.etree.ElementTree.parse(report).iter("testcase"):
        outcomes = {child.tag for child in case}
        if outcomes & {"failure", "error"}:
            failures.append(f"{case.get('classname', '').replace('.', '/')}.py::{case.get('name')}")
        elif "skipped" in outcomes:
            skipped += 1
        else:
            passed += 1
    return {"passed": passed, "failed": len(failures), "skipped": skipped, "failures": failures}


def commit() -> str:
    """The checkout's commit, "+" behind it if anything that is tested was changed since."""
    said = subprocess.run(
        ["git", "rev-parse", "--short=7", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    folders = ["plugin", "patches", "launch", "tests", "pyproject.toml", f":!{tested.FILE.relative_to(ROOT)}"]
    changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--", *folders], cwd=ROOT).returncode != 0
    return said.stdout.strip() + ("+" if changed else "")


def see(name: str, parts: list[str], again: bool, limit: float) -> None:
    """Runs what has not been seen of an environment since it was made. Raises SetupError.

    What failed is run a second time, by itself: where other work goes on, some tests miss their times. That is counted.
    """
    python = make(name, ENVIRONMENTS[name])
    file = FOLDER / f"{name}.json"
    seen: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    versions = versions_in(python)
    if seen.get("versions") != versions:
        seen = {"versions": versions, "parts": {}}
    for part in parts:
        report = FOLDER / f"{name}.{part}.xml"
        found = None if again else seen["parts"].get(part)
        if found is None or not found["passed"]:
            print(f"== {name}: {part}", flush=True)
            found = run_part(python, PARTS[part], 2, report, limit)
        elif not found["failed"]:
            continue
        if found["passed"] and found["failed"]:
            second = run_part(python, found["failures"], 0, report.with_stem(f"{name}.{part}.alone"), limit)
            found = after_second_try(found, second)
        commits = dict.fromkeys([*found.get("commits", []), commit()])
        seen["parts"][part] = found | {"date": datetime.date.today().isoformat(), "commits": list(commits)}
        file.write_text(json.dumps(seen, indent=1) + "\n")
        print(f"   {found['passed']} passed, {found['failed']} failed, {found['skipped']} skipped", flush=True)


def rows() -> list[tested.Row]:
    """What has been seen of every environment of which the parts in `NEEDED` were run."""
    found = []
    for name in ENVIRONMENTS:
        file = FOLDER / f"{name}.json"
        seen = json.loads(file.read_text()) if file.is_file() else {"parts": {}}
        if not NEEDED.issubset(seen["parts"]):
            continue
        names = tuple(part for part in PARTS if part in seen["parts"])
        parts = [seen["parts"][part] for part in names]
        sums = {key: sum(part.get(key, 0) for part in parts) for key in ("passed", "alone", "failed", "skipped")}
        commits = list(dict.fromkeys(commit for part in parts for commit in part["commits"]))
        failures = tuple(failure for part in parts for failure in part["failures"])
        date = max(part["date"] for part in parts)
        found.append(
            tested.Row(name, seen["versions"], names, **sums, date=date, commit=", ".join(commits), failures=failures)
        )
    return found


def merged(old: list[tested.Row], new: list[tested.Row]) -> list[tested.Row]:
    """``new``, and of ``old`` what was not seen again here: another machine may have seen it."""
    by_name = {row.name: row for row in [*old, *new]}
    return [by_name[name] for name in ENVIRONMENTS if name in by_name]


def table(found: list[tested.Row]) -> str:
    """Markdown: a line an environment, and below it what failed in any of them."""
    head = ["environment", *tested.NAMED, "tests", "passed", "alone", "failed", "skipped", "date", "commit"]
    lines = [head, ["---"] * len(head)]
    for row in found:
        versions = [row.versions.get(name, "none") for name in tested.NAMED]
        counted = map(str, (row.passed, row.alone, row.failed, row.skipped))
        lines.append([row.name, *versions, " ".join(row.parts), *counted, row.date, row.commit])
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
    failed = [f"- {row.name}: {failure}" for row in found for failure in row.failures]
    return text + ("\nFailed:\n\n" + "\n".join(failed) + "\n" if failed else "")


def write(found: list[tested.Row]) -> None:
    """Writes what `doctor` reads, and the table of the document."""
    tested.FILE.write_text(json.dumps([asdict(row) for row in found], indent=1) + "\n")
    before, _, rest = DOCUMENT.read_text().partition(START)
    _, _, after = rest.partition(END)
    DOCUMENT.write_text(f"{before}{START}\n\n{table(found)}\n{END}{after}")


def main() -> int:
    """Exit status 1 if an environment could not be made or a test failed in one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(ENVIRONMENTS), default=list(ENVIRONMENTS))
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="of the tests")
    parser.add_argument("--again", action="store_true", help="run what has been seen already, too")
    parser.add_argument("--limit", type=float, default=3600, help="seconds that a part may take (default: 3600)")
    parser.add_argument("--write-only", action="store_true", help="run nothing; write what has been seen")
    args = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    lacking = []
    for name in () if args.write_only else args.only:
        try:
            see(name, args.parts, args.again, args.limit)
        except SetupError as error:
            lacking.append(name)
            print(f"{name} could not be had: {error}", flush=True)
    found = merged(list(tested.rows()), rows())
    write(found)
    print(table(found))
    return 1 if lacking or not all(row.good for row in found) else 0


if __name__ == "__main__":
    raise SystemExit(main())
