"""What `doctor` says of versions is what was seen, and so is the table of docs/support.md."""

from __future__ import annotations

import pytest
from packaging.specifiers import SpecifierSet

from noflush.commands.tested import FILE, NAMED, Row, requirements, rows, together, verdict
from noflush.patches.deepspeed.faults import OLDEST_DEEPSPEED
from noflush.patches.megatron_core import releases
from tests.hosts import matrix

VERSIONS = {"Python": "3.12.1", "torch": "2.13.0", "megatron-core": "0.19.2"}
PARTS = ("unit", "hosts")
SEEN = [
    Row("good", VERSIONS, PARTS, 3, 0, 0, 1, "2026-01-02", "abc"),
    Row("bad", VERSIONS | {"torch": "2.12.0"}, PARTS, 3, 0, 1, 0, "2026-01-02", "abc", ("test_x::test_y",)),
    Row("empty", VERSIONS | {"torch": "2.11.0"}, PARTS, 0, 0, 0, 0, "2026-01-02", "abc"),
]
TAKES = {"Python": SpecifierSet(">=3.10"), "torch": SpecifierSet(">=2.6"), "megatron-core": SpecifierSet("<=0.19.2")}


@pytest.mark.parametrize(
    ("name", "version", "found"),
    [
        ("torch", "2.13.0", "tested"),
        ("torch", "2.13.0+cpu", "tested"),
        ("torch", "2.13.1", "not tested"),
        ("torch", "2.13.0rc1", "not tested"),
        ("torch", "2.12.0", "not tested"),  # a test failed there
        ("torch", "2.11.0", "not tested"),  # none ran there
        ("torch", "2.5.1", "refused"),
        ("Python", "3.12.9", "tested"),
        ("Python", "3.13.1", "not tested"),
        ("Python", "3.9.1", "refused"),
        ("megatron-core", "0.19.2+local", "tested"),
        ("megatron-core", "0.19.3", "refused"),
        ("numpy", "1.0", "not tested"),
    ],
)
def test_a_version_was_tested_is_accepted_or_is_refused(name, version, found):
    assert verdict(name, version, SEEN, TAKES)[0] == found


def test_the_words_name_what_is_taken_and_what_was_tested():
    assert verdict("torch", "2.5.1", SEEN, TAKES)[1] == "refused: noflush takes >=2.6"
    assert verdict("Python", "3.13.1", SEEN, TAKES)[1] == "accepted, not tested; tested: 3.12"
    assert verdict("torch", "2.14.0", [], TAKES)[1] == "accepted, not tested; tested: none"


def test_versions_tested_apart_were_not_tested_together():
    other = Row("other", VERSIONS | {"Python": "3.13.0", "torch": "2.15.0"}, PARTS, 3, 0, 0, 0, "2026-01-02", "abc")
    assert together(VERSIONS | {"triton": None, "numpy": "2.0"}, [*SEEN, other]) == SEEN[0]
    assert together(VERSIONS | {"torch": "2.15.0"}, [*SEEN, other]) is None
    assert together(VERSIONS | {"triton": "3.7.1"}, SEEN) is None


def test_the_ranges_are_those_that_a_run_is_refused_by():
    takes = requirements()
    assert {"Python", "torch", "deepspeed", "megatron-core", "transformers"} <= set(takes)
    oldest = ".".join(map(str, OLDEST_DEEPSPEED))
    assert oldest in takes["deepspeed"]
    taken = f"megatron-core>={releases.TESTED[0]},<={releases.TESTED[-1]}"
    assert f'"{taken}"' in (matrix.ROOT / "pyproject.toml").read_text()


def test_the_document_says_what_was_seen():
    text = matrix.DOCUMENT.read_text()
    written = text[text.index(matrix.START) + len(matrix.START) : text.index(matrix.END)].strip()
    assert written == matrix.table(list(rows(FILE))).strip()
    for row in rows(FILE):
        assert row.name in matrix.ENVIRONMENTS
        assert set(row.versions) <= set(NAMED)


def test_releases_said_to_be_tested_were():
    seen = [row.versions.get("megatron-core") for row in rows(FILE) if row.good]
    assert set(releases.TESTED) <= set(seen)


def test_a_report_is_counted(tmp_path):
    report = tmp_path / "junit.xml"
    report.write_text(
        '<testsuites><testsuite><testcase classname="a" name="one"/><testcase classname="a" name="two"><failure/>'
        '</testcase><testcase classname="a" name="three"><skipped/></testcase><testcase classname="b.c" name="four">'
        "<error/></testcase></testsuite></testsuites>"
    )
    assert matrix.counts(report) == {"passed": 1, "failed": 2, "skipped": 1, "failures": ["a.py::two", "b/c.py::four"]}


def test_what_passes_alone_is_counted_as_that():
    first = {"passed": 5, "failed": 2, "skipped": 1, "failures": ["a.py::two", "b.py::four"]}
    second = {"passed": 1, "failed": 1, "skipped": 0, "failures": ["b.py::four"]}
    sums = {"passed": 6, "alone": 1, "failed": 1, "skipped": 1, "failures": ["b.py::four"]}
    assert matrix.after_second_try(first, second) == sums
    third = {"passed": 1, "failed": 0, "skipped": 0, "failures": []}
    last = {"passed": 7, "alone": 2, "failed": 0, "skipped": 1, "failures": []}
    assert matrix.after_second_try(sums, third) == last
    nothing = {"passed": 0, "failed": 1, "skipped": 0, "failures": ["unit: pytest could not start"]}
    assert matrix.after_second_try(sums, nothing) == sums


def test_the_table_names_what_failed():
    text = matrix.table(SEEN)
    assert (
        "| good | 3.12.1 | 2.13.0 | none | 0.19.2 | none | none | unit hosts | 3 | 0 | 0 | 1 | 2026-01-02 | abc |"
        in text
    )
    assert "- bad: test_x::test_y" in text


def test_an_environment_seen_elsewhere_keeps_its_row():
    first, second = (Row(name, VERSIONS, PARTS, 1, 0, 0, 0, "2026-01-02", "abc") for name in ("oldest", "newest"))
    newer = Row("newest", VERSIONS, PARTS, 2, 0, 0, 0, "2026-01-03", "def")
    assert matrix.merged([second, first], [newer]) == [first, newer]
