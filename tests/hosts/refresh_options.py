"""What a release's parser has that ``options.json`` does not know, or knows otherwise; with ``--write``, made its rows.

``python -m tests.hosts.refresh_options 0.19.2 TREE``. A new release: add it to ``TESTED`` in
``patches/megatron_core/releases.py``, run this with ``--write``, and give each row whose meaning is ``undecided`` one
(`noflush.launch.arguments.options` says which there are); what changed is a person's to mend. Tests fail until then.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from noflush.launch.arguments import options as table
from noflush.launch.arguments.options import Option
from noflush.patches.megatron_core.releases import TESTED
from tests.hosts.megatron_parser import Declared, read_tree

ROWS = Path(table.__file__).with_name("options.json")
OURS = {
    **{dest: {"default"} for dest in ("eval_interval", "split", "transformer_impl", "recompute_num_layers")},
    **{dest: {"default"} for dest in ("wandb_project", "wandb_exp_name", "wandb_save_dir")},
    **{dest: {"nargs"} for dest in ("rampup_batch_size", "num_experts")},
    "profile": {"kind", "nargs"},
    "lazy_mpu_init": {"kind", "nargs"},
    "high_priority_stream_groups": {"nargs"},
    "muon_use_nesterov": {"dest"},
    "disable_chunked_prefill": {"kind"},
    "enable_msc": {"kind"},
}
"""Where rows differ on purpose: Megatron-DeepSpeed's parser is another, two releases differ, or noflush does."""


@dataclass(frozen=True)
class Findings:
    """What a parser and the table do not agree on.

    Attributes:
        new: declared, and no row knows one of its spellings.
        spelled: declared, with a row that lacks some of its spellings.
        gone: rows said to be this release's, which its parser does not have.
        changed: ``(option, what, the row's, the parser's)``.
    """

    new: tuple[Declared, ...]
    spelled: tuple[Declared, ...]
    gone: tuple[Option, ...]
    changed: tuple[tuple[str, str, Any, Any], ...]


def compare(declared: Iterable[Declared], rows: Iterable[Option], release: str) -> Findings:
    """Compares what ``release``'s parser declares with the rows of the table.

    How an option is written, its kind, type and count always matter; its default and attribute where it is used.
    """
    declared = list(declared)
    of_megatron = [row for row in rows if row.kind != "gone" and row.parsers != ("noflush",)]
    known = {string: row for row in of_megatron for string in row.options}
    new = tuple(d for d in declared if not known.keys() & {*d.options})
    spelled = tuple(d for d in declared if d not in new and {*d.options} - known.keys())
    strings = {string for d in declared for string in d.options}
    gone = tuple(row for row in of_megatron if _is_of(row, release) and not strings & {*row.options})
    changed = []
    for d in declared:
        for row in {id(known[s]): known[s] for s in d.options if s in known}.values():
            if not _is_of(row, release):
                changed.append((d.options[0], "releases", row.releases, release))
            changed += [(d.options[0], what, *pair) for what, pair in _differences(d, row).items()]
    return Findings(new, spelled, gone, tuple(changed))


def _is_of(row: Option, release: str) -> bool:
    return "lm" in row.parsers and (not row.releases or release in row.releases)


def _differences(declared: Declared, row: Option) -> dict[str, tuple[Any, Any]]:
    names = ["kind"]
    if declared.kind == row.kind == "value":
        names += ["type", "nargs"]
    if row.meaning == "used":
        names += ["dest", *(["default"] if declared.kind == "value" else [])]
    pairs = {name: (getattr(row, name), getattr(declared, name)) for name in names}
    if row.choices and not {*(declared.choices or ())} <= {*row.choices}:
        pairs["choices"] = row.choices, declared.choices
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1] and name not in OURS.get(row.dest, ())}


def rows_after(written: list[dict[str, Any]], found: Findings, release: str) -> list[dict[str, Any]]:
    """The table's rows with ``found`` worked in, but for what changed otherwise than by a further choice."""
    gone = {row.options for row in found.gone}
    added = {d.options: d.choices for d in found.spelled}
    choices = {option: theirs for option, what, _, theirs in found.changed if what == "choices" and theirs}
    back = {option for option, what, *_ in found.changed if what == "releases"}
    made = []
    for row in written:
        row = dict(row)
        for strings in added:
            if {*strings} & {*row["options"]}:
                row["options"] = [*row["options"], *(s for s in strings if s not in row["options"])]
        for option in row["options"]:
            if option in choices:
                row["choices"] = [*row["choices"], *(c for c in choices[option] if c not in row["choices"])]
            if option in back:
                row["releases"] = [r for r in TESTED if r == release or r in row["releases"]]
                if row["releases"] == list(TESTED):
                    del row["releases"]
        if tuple(row["options"]) in gone:
            row["releases"] = [r for r in row.get("releases", TESTED) if r != release]
        made.append(row)
    return made + [_row(declared, release) for declared in found.new]


def _row(declared: Declared, release: str) -> dict[str, Any]:
    row: dict[str, Any] = {"options": list(declared.options), "dest": declared.dest, "kind": declared.kind}
    if declared.kind == "value":
        row["type"] = declared.type
    for field in fields(Declared):
        value = getattr(declared, field.name)
        if field.name in ("nargs", "default", "choices") and value is not None:
            row[field.name] = list(value) if isinstance(value, tuple) else value
    return row | {"parsers": ["lm"], "releases": [release], "meaning": "undecided"}


def text_of(rows: list[dict[str, Any]]) -> str:
    """``rows`` as the file has them, a line each."""
    return "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n"


def main() -> int:
    """Prints the findings; exit status 1 if there are any and they were not written."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("release", choices=TESTED, help="the tree's release")
    parser.add_argument("tree", type=Path, help="a checkout of Megatron-LM, or an unpacked sdist of megatron-core")
    parser.add_argument("--write", action="store_true", help=f"change {ROWS.name}")
    args = parser.parse_args()
    declared = read_tree(args.tree)
    found = compare(declared, table.rows(), args.release)
    print(f"{args.tree}: {len(declared)} options of Megatron-LM {args.release}")
    for title, lines in (
        ("new", [f"{' '.join(d.options)} ({d.kind} {d.type if d.kind == 'value' else ''})" for d in found.new]),
        ("with further spellings", [" ".join(d.options) for d in found.spelled]),
        ("gone", [f"{' '.join(row.options)} ({row.meaning})" for row in found.gone]),
        ("changed", [f"{option}: {what} {ours!r}, now {theirs!r}" for option, what, ours, theirs in found.changed]),
    ):
        print(f"{len(lines)} {title}" + "".join(f"\n  {line}" for line in lines))
    if args.write:
        ROWS.write_text(text_of(rows_after(json.loads(ROWS.read_text()), found, args.release)))
        print(f"written: {ROWS}")
    return 0 if args.write or not any((found.new, found.spelled, found.gone, found.changed)) else 1


if __name__ == "__main__":
    raise SystemExit(main())
