"""Megatron-LM's parser, read from source: against argparse itself, and against the table of options."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import textwrap
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest

from noflush.launch.arguments.options import Option, options, rows
from noflush.patches.megatron_core.releases import TESTED
from tests.hosts.megatron_parser import Declared, TreeError, read_tree
from tests.hosts.refresh_options import ROWS, compare, rows_after, text_of

TREE = {
    "arguments.py": """
        import argparse
        from megatron.training.factory import ArgumentGroupFactory

        def add_megatron_arguments(parser):
            parser = _add_sizes(parser)
            parser = _add_more(parser)
            return parser

        def some_type(word):
            return tuple(word)

        def _add_more(parser):
            group = parser.add_argument_group(title="more")
            group.add_argument("--lr", type=float, default=2**-10, help="help")
            group.add_argument("--pattern", "-p", type=some_type, nargs="+", default=[])
            group.add_argument("--no-bias", action="store_false", dest="bias")
            if True:
                group.add_argument("--colour", action=argparse.BooleanOptionalAction, default=False)
            group.add_argument("--buffer", default=2 * 1024, type=int, choices=[1024, 2048])
            return parser

        def _add_sizes(parser):
            from megatron.training.config import Run
            left_out = ["callable"]
            factory = ArgumentGroupFactory(Run, exclude=left_out)
            factory.build_group(parser, "run")
            return parser
    """,
    "config/__init__.py": "from megatron.training.config.run import (Run,)",
    "config/run.py": """
        from dataclasses import dataclass, field
        from typing import Callable, List, Literal, Optional
        from .kinds import Base, Kind

        @dataclass(kw_only=True)
        class Run(Base):
            width: Optional[int] = field(default=0, metadata={"argparse_meta": {"default": None}})
            sizes: list[int] | None = field(default=None, metadata={"argparse_meta": {"nargs": 3}})
            names: List[str] = field(default_factory=list)
            kind: Kind = Kind.wide
            level: Literal[0, 1] = 0
            mask: bool = False
            fused: bool = True
            renamed: bool = field(default=True, metadata={"argparse_meta": {"arg_names": ["--off"], "dest": "on"}})
            callable: Callable | None = None
            made: int = field(init=False, default=3)
    """,
    "config/kinds.py": """
        import enum
        from dataclasses import dataclass

        class Kind(enum.Enum):
            narrow = 1
            wide = 2

        @dataclass
        class Base:
            seed: int = 1234
            width: float = 1.0
    """,
    "factory.py": "",
}
DECLARED = [
    Declared(("--seed",), "seed", "value", "int", default=1234),
    Declared(("--width",), "width", "value", "int"),
    Declared(("--sizes",), "sizes", "value", "int", nargs=3),
    Declared(("--names",), "names", "value", "str", nargs="+", default=[]),
    Declared(("--kind",), "kind", "value", "str", default="wide", choices=("narrow", "wide")),
    Declared(("--level",), "level", "value", "int", default=0, choices=("0", "1")),
    Declared(("--mask",), "mask", "true"),
    Declared(("--no-fused", "--disable-fused"), "fused", "false"),
    Declared(("--off",), "on", "false"),
    Declared(("--lr",), "lr", "value", "float", default=2**-10),
    Declared(("--pattern", "-p"), "pattern", "value", "str", nargs="+", default=[]),
    Declared(("--no-bias",), "bias", "false"),
    Declared(("--colour", "--no-colour"), "colour", "boolean", default=False),
    Declared(("--buffer",), "buffer", "value", "int", default=2048, choices=("1024", "2048")),
]


def write_tree(folder, **changed):
    for name, text in (TREE | changed).items():
        file = folder / "megatron" / "training" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(textwrap.dedent(text))
    return folder


def test_reads_calls_and_dataclasses(tmp_path):
    assert read_tree(write_tree(tmp_path)) == DECLARED


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("group.add_argument('--x', action='append')", "--x has the action append, which is not read here"),
        ("group.add_argument(name, type=int)", "arguments.py:3: group.add_argument(name, type=int) is not read"),
        ("made(group).build_group(parser)", "arguments.py:3: made(group).build_group(parser) is not read"),
        ("_add_elsewhere(parser)", "there is no function _add_elsewhere"),
        ("ArgumentGroupFactory(Gone).build_group(parser)", "where the class Gone comes from is not found"),
        ("pass", "add_megatron_arguments declares nothing"),
        ("def :", "a newer Python may read it"),
    ],
)
def test_what_is_not_read_is_said_and_where(line, said, tmp_path):
    arguments = f"\ndef add_megatron_arguments(parser):\n    {line}\n"
    with pytest.raises(TreeError) as error:
        read_tree(write_tree(tmp_path, **{"arguments.py": arguments}))
    assert said in str(error.value)


def test_a_folder_without_a_parser_is_refused(tmp_path):
    with pytest.raises(TreeError, match="give a checkout of Megatron-LM"):
        read_tree(tmp_path)


def test_the_table_knows_every_release_it_names():
    for row in options():
        assert set(row.releases) < set(TESTED), row
        assert not row.releases or "lm" in row.parsers, row
    assert text_of(json.loads(ROWS.read_text())) == ROWS.read_text()


def test_what_is_new_gone_and_changed_is_found_and_written():
    new, old = TESTED[-1], TESTED[0]
    lm = {"parsers": ("lm",), "meaning": "used"}
    table = [
        Option(("--kept",), "kept", "value", type="int", default=1, **lm),
        Option(("--kept-too", "--too"), "kept_too", "true", **lm),
        Option(("--left",), "left", "true", **lm),
        Option(("--returned",), "returned", "true", releases=(old,), **lm),
        Option(("--chosen",), "chosen", "value", choices=("a",), **lm),
        Option(("--deepspeed-only",), "deepspeed_only", "true", parsers=("deepspeed",), meaning="used"),
        Option(("--ours",), "ours", "true", parsers=("noflush",), meaning="used"),
    ]
    declared = [
        Declared(("--kept",), "kept", "value", "int", default=2),
        Declared(("--kept-too", "--three"), "kept_too", "true"),
        Declared(("--returned",), "returned", "true"),
        Declared(("--chosen",), "chosen", "value", choices=("a", "b")),
        Declared(("--added",), "added", "value", "float", default=0.5),
    ]
    found = compare(declared, table, new)
    assert [d.dest for d in found.new] == ["added"]
    assert [d.dest for d in found.spelled] == ["kept_too"]
    assert [row.dest for row in found.gone] == ["left"]
    assert found.changed == (
        ("--kept", "default", 1, 2),
        ("--returned", "releases", (old,), new),
        ("--chosen", "choices", ("a",), ("a", "b")),
    )
    written = [{"options": list(row.options), **({"releases": [old]} if row.releases else {})} for row in table]
    written[4]["choices"] = ["a"]
    after = {row["options"][0]: row for row in rows_after(written, found, new)}
    assert after["--kept-too"]["options"] == ["--kept-too", "--too", "--three"]
    assert after["--left"]["releases"] == [old]
    assert "releases" not in after["--returned"]
    assert after["--chosen"]["choices"] == ["a", "b"]
    assert after["--added"] == {
        "options": ["--added"], "dest": "added", "kind": "value", "type": "float", "default": 0.5,
        "parsers": ["lm"], "releases": [new], "meaning": "undecided",
    }  # fmt: skip


def test_a_changed_default_of_what_is_not_used_changes_nothing():
    row = Option(("--x",), "x", "value", parsers=("lm",), meaning="ignored", why="y", default="a")
    declared = Declared(("--x",), "z", "value", default="b")
    assert compare([declared], [row], TESTED[-1]).changed == ()
    assert compare([declared], [replace(row, meaning="used")], TESTED[-1]).changed != ()


INSTALLED = metadata.version("megatron-core")
PACKAGE = Path(importlib.util.find_spec("megatron").submodule_search_locations[0])
with_parser = pytest.mark.skipif(
    not (PACKAGE / "training" / "arguments.py").is_file(), reason=f"megatron-core {INSTALLED} brings no parser"
)
KITCHEN = {"kitchen_config_file", "kitchen_recipe_number"}
"""Declared only where a package of NVIDIA's is installed."""

DUMP = """
import argparse, json, os, sys
from megatron.training.arguments import add_megatron_arguments
parser = argparse.ArgumentParser()
add_megatron_arguments(parser)
kinds = {"_StoreAction": "value", "_StoreTrueAction": "true", "_StoreFalseAction": "false"}
of = lambda a: (a.option_strings, a.dest, kinds.get(type(a).__name__, "boolean"), a.nargs,
                a.type in (int, float, bool) and a.type.__name__,
                [str(getattr(c, "name", c)) for c in a.choices or ()], repr(a.default))
print(json.dumps([of(a) for a in parser._actions[1:]]), file=open(sys.argv[1], "w"))
"""


@with_parser
def test_the_installed_parser_is_read_as_argparse_has_it(tmp_path):
    dumped = tmp_path / "actions.json"
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-W", "ignore", "-c", DUMP, str(dumped)]
    subprocess.run(command, timeout=200, check=True, env=environment, capture_output=True)
    found = [d for d in read_tree(PACKAGE.parent) if d.dest not in KITCHEN]
    actions = json.loads(dumped.read_text())
    assert len(found) == len(actions) > 700
    for declared, (strings, dest, kind, nargs, type_, choices, default) in zip(found, actions, strict=True):
        assert (declared.options, declared.dest, declared.kind) == (tuple(strings), dest, kind)
        if kind == "value":
            assert (declared.nargs, declared.type) == (nargs, type_ or "str"), declared
            # Signals and enums by name; what the environment or a list of an enum's members makes is not read.
            assert list(declared.choices or choices) == choices, declared
            of_enum = default.startswith("<") and f".{declared.default}:" in default
            assert repr(declared.default) == default or of_enum or declared.default is None, declared


@with_parser
def test_the_table_knows_the_installed_parser():
    found = compare(read_tree(PACKAGE.parent), rows(), INSTALLED)
    assert not any((found.new, found.spelled, found.gone, found.changed)), found
