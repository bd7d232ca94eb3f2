"""The laws of structure (CONTRIBUTING.md), and what is installed where."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
WINGS = {"noflush": ROOT / "plugin" / "noflush", "noflush.patches": ROOT / "patches", "noflush.launch": ROOT / "launch"}
CORE = WINGS["noflush"]
HOSTS = ("deepspeed", "megatron", "transformers", "mpi4py")
PURE = [
    "order",
    "commands.tested",
    "compare.agenda",
    "compare.contestants",
    "compare.curves",
    "compare.halving",
    "compare.ledger",
    "compare.noise",
    "compare.result",
    "compare.settings",
    "compare.tables",
    "config",
    "failure.blame",
    "methods.scalars",
    "run",
    "stage.loss_scale",
    "watch.progress",
    "patches.deepspeed.config_file",
    "patches.deepspeed.config_faults",
    "patches.deepspeed.optimizers",
    "patches.megatron_core.releases",
    "launch.ranks",
    "launch.signals",
    "launch.arguments.parser",
    "launch.arguments.options",
    "launch.arguments.pipelining",
    "launch.arguments.settings",
    "launch.arguments.progress",
    "launch.gpt.size",
    "launch.refusal",
    "launch.training.folder_faults",
    "launch.training.folder_lock",
]
"""Modules, and packages with all in them, that are read before training and import no torch."""


def modules_in(wing: str, without: str = "") -> list[str]:
    found = []
    for file in sorted(WINGS[wing].rglob("*.py")):
        dotted = [wing, *file.relative_to(WINGS[wing]).with_suffix("").parts]
        found.append(".".join(dotted[:-1] if dotted[-1] == "__init__" else dotted))
    return [name for name in found if name != "noflush.__main__" and not (without and name.startswith(without))]


def load(modules: list[str], blocked: tuple[str, ...]) -> str:
    """What goes wrong when ``modules`` are imported and none of ``blocked`` can be."""
    code = f"""
import importlib, sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Block())
for name in {modules!r}:
    try:
        importlib.import_module(name)
    except ImportError as error:
        print(name, error)
"""
    return subprocess.run([sys.executable, "-c", code], timeout=120, capture_output=True, text=True, check=True).stdout


def test_no_module_of_the_core_loads_a_host():
    modules = modules_in("noflush")
    assert len(modules) > 50
    assert load(modules, HOSTS) == ""


def test_a_wing_that_loads_a_host_would_be_found():
    assert "is blocked" in load(["noflush.patches.deepspeed.engine"], HOSTS)


def test_pure_modules_load_neither_torch_nor_a_host():
    everything = [name for wing in WINGS for name in modules_in(wing)]
    pure = [
        name for name in everything if any(name == f"noflush.{p}" or name.startswith(f"noflush.{p}.") for p in PURE)
    ]
    assert len(pure) > len(PURE)
    assert load(pure, (*HOSTS, "torch")) == ""


def test_only_versions_moves_parameter_storage():
    movers = []
    for file in CORE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Assign):
                movers += [file.stem for t in node.targets if isinstance(t, ast.Attribute) and t.attr == "data"]
    assert set(movers) == {"versions"}


def test_every_package_folder_is_listed_for_the_wheel():
    listed = (ROOT / "pyproject.toml").read_text()
    for wing, folder in WINGS.items():
        for package in folder.rglob("__init__.py"):
            assert '"' + ".".join([wing, *package.parent.relative_to(folder).parts]) + '"' in listed


OTHERS = (
    *("torch", "os", "sys", "atexit", "multiprocessing", "distributed_c10d", "DeepSpeedEngine"),
    *("Campaign", "function", "generating"),
)
"""Whose private names a test may use: where nothing public tells the same torch's, Python's, DeepSpeed's; its own."""


def test_no_test_reaches_into_private_attributes():
    reached = []
    for file in sorted((ROOT / "tests").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("noflush"):
                reached += [f"{file.name}: {name.name}" for name in node.names if name.name.startswith("_")]
            elif isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                owner = ast.unparse(node.value)
                public = node.attr in ("_replace", "_fields", "_asdict", "_neg_view")  # a NamedTuple's, and torch's
                if owner.split(".")[0].split("(")[0] not in ("self", "cls", *OTHERS) and not public:
                    reached.append(f"{file.name}: {owner}.{node.attr}")
    assert reached == []
