"""Which versions were tried together (``tested.json``, which `make test-hosts` writes), and what is said of another.

Pure but for reading that file and the requirements of the installed noflush.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

FILE = Path(__file__).with_name("tested.json")
NAMED = ("Python", "torch", "deepspeed", "megatron-core", "transformers", "triton")
"""Whose versions a row has; of Python, the series counts."""

Verdict = Literal["tested", "not tested", "refused"]


@dataclass(frozen=True)
class Row:
    """One environment in which the tests were run.

    Attributes:
        name: of the environment.
        versions: by the names of `NAMED`.
        parts: of the tests that were run.
        passed, failed, skipped: tests; ``alone`` of those that passed did so when they were run again by themselves,
            and ``failures`` names those that failed there too.
        date: of the run, ISO 8601; ``commit`` is the commit that was tested.
    """

    name: str
    versions: Mapping[str, str]
    parts: tuple[str, ...]
    passed: int
    alone: int
    failed: int
    skipped: int
    date: str
    commit: str
    failures: tuple[str, ...] = ()

    @property
    def good(self) -> bool:
        """Whether it shows that these versions work: tests ran, and none failed."""
        return self.passed > 0 and self.failed == 0


def rows(file: Path = FILE) -> tuple[Row, ...]:
    """What was seen, in the file's order."""
    read = json.loads(file.read_text())
    return tuple(Row(**{**row, **{key: tuple(row[key]) for key in ("parts", "failures")}}) for row in read)


def same(name: str, one: str, other: str) -> bool:
    """Whether two versions count as the same: builds do (``+cpu``), and a Python's bug-fix releases."""
    parts = 2 if name == "Python" else None
    return Version(one).release[:parts] == Version(other).release[:parts] and Version(one).pre == Version(other).pre


def verdict(name: str, version: str, seen: Iterable[Row], takes: Mapping[str, SpecifierSet]) -> tuple[Verdict, str]:
    """What is to be said of a version of ``name``, and in words: what ``takes`` allows, and what ``seen`` shows."""
    allowed = takes.get(name)
    if allowed is not None and not allowed.contains(Version(version).public, prereleases=True):
        return "refused", f"refused: noflush takes {allowed}"
    tried = [row.versions[name] for row in seen if row.good and name in row.versions]
    if any(same(name, version, other) for other in tried):
        return "tested", "tested"
    return "not tested", f"accepted, not tested; tested: {_listed(name, tried)}"


def together(versions: Mapping[str, str | None], seen: Iterable[Row]) -> Row | None:
    """The row in which all ``versions`` (by name; None: not installed) were tried together, if there is one."""
    there = {name: version for name, version in versions.items() if name in NAMED and version is not None}
    for row in seen:
        if row.good and all(name in row.versions and same(name, v, row.versions[name]) for name, v in there.items()):
            return row
    return None


def requirements() -> dict[str, SpecifierSet]:
    """What the installed noflush takes, by name; what several extras say of a package all applies."""
    try:
        lines, python = metadata.requires("noflush") or [], metadata.metadata("noflush")["Requires-Python"]
    except metadata.PackageNotFoundError:
        return {}
    takes = {"Python": SpecifierSet(python)}
    for line in lines:
        requirement = Requirement(line)
        if requirement.marker is None or "dev" not in str(requirement.marker):
            takes[requirement.name] = takes.get(requirement.name, SpecifierSet()) & requirement.specifier
    return takes


def _listed(name: str, tried: Iterable[str]) -> str:
    parts = 2 if name == "Python" else 3
    found = sorted({Version(version).release[:parts] for version in tried})
    return ", ".join(".".join(map(str, release)) for release in found) or "none"
