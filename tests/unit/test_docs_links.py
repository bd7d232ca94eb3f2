"""What the documents name is there: links and their headings, files, folders; and what any file names is a document.

A path in backticks or in a block of commands is one of the project's if it starts with a folder of the project's; a
bare ``name.py`` in backticks must be the end of some file's path.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = ("plugin", "patches", "launch", "examples", "tests", "docs", ".ci")
TEXT = {".py", ".md", ".toml", ".json", ".args", ".sbatch", ".sh", ""}
OF_USERS = {"train.py", "gpu.jsonl", "trials.jsonl"}
"""A user's own script, what `make bench-gpu` has yet to write, and what a comparison writes."""
ELSEWHERE = "|".join(["DESI" + "GN", "SEA" + "MS", "HOU" + "SE", "METH" + r"ODS(?:: \w+ \w|'s)"])
"""Notes that are not in the project, as sentences call them; the last is the name of a table too."""
LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
NAME = re.compile(r"[\w*]+\.(?:py|sbatch|args|jsonl|md)")
every_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)


def project_files() -> list[Path]:
    inside = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.is_file()]
    return [path for path in [*ROOT.glob("*"), *inside] if path.is_file() and "__pycache__" not in path.parts]


PATHS = [path.relative_to(ROOT).as_posix() for path in project_files()]


def headings(document: Path) -> set[str]:
    """The anchors that a document's headings have, as GitHub makes them."""
    lines = FENCED.sub("", document.read_text()).splitlines()
    titles = [line.lstrip("#").strip().lower() for line in lines if line.startswith("#")]
    return {re.sub(r"[^\w\- ]", "", title).replace(" ", "-") for title in titles}


def words(code: str) -> Iterator[str]:
    for word in code.split():
        yield word.lstrip("@\"'(").rstrip("\"').,;:")


def is_there(path: str) -> bool:
    return (ROOT / path).exists() or bool(fnmatch.filter(PATHS, path))


def ends_some_path(name: str) -> bool:
    return any(fnmatch.fnmatch("/" + path, "*/" + name) for path in PATHS)


def lost_paths(text: str) -> list[str]:
    """The project's paths that ``text`` (Markdown) names and nobody finds."""
    spans = re.findall(r"`([^`]+)`", FENCED.sub("", text))
    named = [word for code in [*FENCED.findall(text), *spans] for word in words(code)]
    lost = [word for word in named if "/" in word and word.split("/")[0] in FOLDERS and not is_there(word)]
    bare = [word for span in spans for word in words(span) if NAME.fullmatch(word)]
    return lost + [word for word in bare if word not in OF_USERS and not ends_some_path(word)]


def test_readme_is_for_a_user():
    assert len((ROOT / "README.md").read_text().splitlines()) < 150


@every_document
def test_links_lead_somewhere(document):
    for target in LINK.findall(FENCED.sub("", document.read_text())):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = document.parent / path if path else document
        assert file.exists(), f"{document.name} links to {target}"
        assert not anchor or anchor in headings(file), f"{document.name} links to {target}"


@every_document
def test_paths_in_backticks_are_there(document):
    assert lost_paths(document.read_text()) == []


def test_every_document_is_reached_from_the_readme():
    linked = {(ROOT / target.partition("#")[0]).resolve() for target in LINK.findall((ROOT / "README.md").read_text())}
    assert {path.resolve() for path in DOCUMENTS} - linked == {ROOT / "README.md"}


def test_no_file_names_a_document_that_is_not_in_the_project():
    documents = [path for path in PATHS if path.endswith(".md")]
    lost = []
    for path in (ROOT / name for name in PATHS):
        if path.suffix not in TEXT:
            continue
        text = path.read_text()
        named = re.findall(r"[\w./-]*\w\.md\b", text) if path != Path(__file__) else []
        lost += [(path.name, name) for name in named if not any(known.endswith(Path(name).name) for known in documents)]
        lost += [(path.name, found) for found in re.findall(rf"\b(?:{ELSEWHERE})", text)]
    assert lost == []


@pytest.mark.parametrize(
    ("text", "lost"),
    [
        ("`plugin/noflush/order/schedule.py` and `schedule.py`, `of_*.py`, `train.py`", []),
        ("`plugin/noflush/gone.py`", ["plugin/noflush/gone.py"]),
        ("`gone.py`", ["gone.py"]),
        ("```\npython launch/gone.py @launch/configs/gpt-125m.args gone.py\n```\n", ["launch/gone.py"]),
        ("`tests/unit/gone/`", ["tests/unit/gone/"]),
    ],
)
def test_a_path_that_is_gone_is_found(text, lost):
    assert lost_paths(text) == lost


def test_every_module_of_core_and_hosts_wing_stands_in_the_newcomers_table():
    table = (ROOT / "CONTRIBUTING.md").read_text()
    for wing in (ROOT / "plugin" / "noflush", ROOT / "patches"):
        for file in wing.rglob("*.py"):
            path = file.relative_to(ROOT)
            named = f"`{file.name}`" in table or f"`{path}`" in table or f"`{path.parent}/`" in table
            assert named or file.name == "__init__.py", path
