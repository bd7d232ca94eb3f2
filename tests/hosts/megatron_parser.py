"""The options of Megatron-LM's parser, read from a tree's source: nothing of the tree is imported or run.

A tree is a checkout of Megatron-LM, an unpacked sdist of megatron-core from 0.17 on, or the folder of an installed one:
whatever has ``megatron/training/arguments.py``. Newer releases make most options of dataclasses
(``ArgumentGroupFactory``): a field's annotation, default and ``argparse_meta`` say what ``add_argument`` is given.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

START = "add_megatron_arguments"
_FACTORY = "ArgumentGroupFactory"
_TYPES = ("int", "float", "str", "bool")
_OPERATORS: dict[type, Callable[[Any, Any], Any]] = {ast.Pow: operator.pow, ast.Mult: operator.mul}


class TreeError(ValueError):
    """A tree without a parser, or whose parser is written in a way that is not read here; names file and line."""


@dataclass(frozen=True)
class Declared:
    """An option as the parser declares it; the fields are those of a row of ``options.json``.

    ``default`` is a flag's only where it is of kind ``boolean``; a default that is no plain value is None.
    """

    options: tuple[str, ...]
    dest: str
    kind: Literal["value", "true", "false", "boolean"]
    type: Literal["int", "float", "str", "bool"] = "str"
    nargs: Any = None
    default: Any = None
    choices: tuple[str, ...] | None = None


def read_tree(tree: Path) -> list[Declared]:
    """What ``tree``'s parser declares, in its order.

    Raises TreeError.
    """
    source = _Module(Path(tree), "megatron.training.arguments")
    if not source.file.is_file():
        raise TreeError(f"{tree} has no megatron/training/arguments.py: give a checkout of Megatron-LM, or an unpacked "
                        "sdist of megatron-core from 0.17 on")  # fmt: skip
    found = list(_Reader(source).function(START))
    if not found:
        raise TreeError(f"{source.file}: {START} declares nothing")
    return found


class _Module:
    """One file of the tree: its functions, classes, and where else the names in it come from."""

    def __init__(self, tree: Path, name: str) -> None:
        self.tree, self.name = tree, name
        file = tree.joinpath(*name.split("."))
        self.file = file / "__init__.py" if file.is_dir() else file.with_suffix(".py")

    @cached_property
    def body(self) -> list[ast.stmt]:
        try:
            return ast.parse(self.file.read_text()).body
        except SyntaxError as error:
            raise TreeError(f"{self.file}:{error.lineno}: {error.msg}; a newer Python may read it") from None

    def function(self, name: str) -> ast.FunctionDef | None:
        return next((n for n in self.body if isinstance(n, ast.FunctionDef) and n.name == name), None)

    def class_(self, name: str, inside: ast.AST | None = None) -> tuple[ast.ClassDef, _Module]:
        """The class that ``name`` stands for here, or in the function ``inside``, and the module that defines it."""
        for node in self.body:
            if isinstance(node, ast.ClassDef) and node.name == name:
                return node, self
        places = [node for scope in (inside, ast.Module(self.body, [])) if scope for node in ast.walk(scope)]
        for node in places:
            if isinstance(node, ast.ImportFrom) and any((a.asname or a.name) == name for a in node.names):
                original = next(a.name for a in node.names if (a.asname or a.name) == name)
                module = self._absolute(node)
                if module.startswith("megatron."):
                    return _Module(self.tree, module).class_(original)
        raise TreeError(f"{self.file}: where the class {name} comes from is not found")

    def _absolute(self, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        package = self.name.split(".")
        above = package[: len(package) - node.level + (self.file.name == "__init__.py")]
        return ".".join([*above, *([node.module] if node.module else [])])


class _Reader:
    def __init__(self, module: _Module) -> None:
        self._module = module

    def function(self, name: str) -> Iterator[Declared]:
        function = self._module.function(name)
        if function is None:
            raise TreeError(f"{self._module.file}: there is no function {name}")
        values: dict[str, Any] = {}
        for node in _in_order(function):
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                values[node.targets[0].id] = node.value
            if not isinstance(node, ast.Call):
                continue
            if isinstance(node.func, ast.Name) and node.func.id.startswith("_add_"):
                yield from self.function(node.func.id)
            elif isinstance(node.func, ast.Attribute) and node.func.attr == "add_argument":
                yield self._argument(node)
            elif isinstance(node.func, ast.Attribute) and node.func.attr == "build_group":
                maker = node.func.value
                maker = values.get(maker.id) if isinstance(maker, ast.Name) else maker
                if not isinstance(maker, ast.Call) or ast.unparse(maker.func) != _FACTORY:
                    raise self._unread(node)
                excluded = _keywords(maker).get("exclude", maker.args[1] if len(maker.args) > 1 else ast.List([]))
                excluded = values.get(excluded.id) if isinstance(excluded, ast.Name) else excluded
                if not isinstance(excluded, ast.List):
                    raise self._unread(node)
                cls, home = self._module.class_(maker.args[0].id, inside=function)
                yield from _of_dataclass(cls, home, set(ast.literal_eval(ast.unparse(excluded))))

    def _argument(self, call: ast.Call) -> Declared:
        names = tuple(_plain(name) for name in call.args)
        if not all(isinstance(name, str) for name in names):
            raise self._unread(call)
        return _declared(names, {key: _value(key, node) for key, node in _keywords(call).items()}, self._module)

    def _unread(self, node: ast.expr) -> TreeError:
        return TreeError(f"{self._module.file}:{node.lineno}: {ast.unparse(node)[:80]} is not read here")


def _in_order(function: ast.FunctionDef) -> Iterator[ast.AST]:
    """Every node in the function's body, in the order in which it stands."""

    def inside(node: ast.AST) -> Iterator[ast.AST]:
        yield node
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, (ast.FunctionDef, ast.Lambda)):
                yield from inside(child)

    for statement in function.body:
        yield from inside(statement)


def _of_dataclass(cls: ast.ClassDef, home: _Module, excluded: set[str]) -> Iterator[Declared]:
    for name, (annotation, value, where) in _fields(cls, home).items():
        made = _keywords(value) if isinstance(value, ast.Call) and ast.unparse(value.func).endswith("field") else None
        if name in excluded or (made and _plain(made.get("init", ast.Constant(True))) is False):
            continue
        default = value if made is None else made.get("default")
        words = {"dest": name, **_inferred(annotation, where), "default": _default(default, made)}
        if words["type"] == "bool" and "nargs" not in words:
            off = isinstance(default, ast.Constant) and default.value == False  # noqa: E712, as the factory compares
            words["action"] = "store_true" if off else "store_false"
        bare = name.replace("_", "-")
        names = (f"--no-{bare}", f"--disable-{bare}") if words.get("action") == "store_false" else (f"--{bare}",)
        meta = _keywords_of_dict((made or {}).get("metadata"), "argparse_meta")
        names = tuple(_plain(meta.pop("arg_names"))) if "arg_names" in meta else names
        yield _declared(names, words | {key: _value(key, node) for key, node in meta.items()}, where)


def _fields(cls: ast.ClassDef, home: _Module) -> dict[str, tuple[ast.expr, ast.expr | None, _Module]]:
    """Annotation, default and defining module of each field, those of the classes it derives from first."""
    found: dict[str, tuple[ast.expr, ast.expr | None, _Module]] = {}
    for base in cls.bases:
        if isinstance(base, ast.Name):
            found |= _fields(*home.class_(base.id))
    for node in cls.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found[node.target.id] = (node.annotation, node.value, home)
    return found


def _inferred(annotation: ast.expr, where: _Module) -> dict[str, Any]:
    """Type, nargs and choices, as the factory infers them; a type it cannot infer is left to ``argparse_meta``."""
    if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
        annotation = ast.parse(annotation.value, mode="eval").body
    if isinstance(annotation, ast.BinOp):  # X | None
        return _inferred(annotation.left, where)
    if isinstance(annotation, ast.Subscript):
        of, inner = ast.unparse(annotation.value).split(".")[-1], annotation.slice
        inner = inner.elts[0] if isinstance(inner, ast.Tuple) and of == "Union" else inner
        if of in ("Optional", "Union"):
            return _inferred(inner, where)
        if of in ("list", "List"):
            return {**_inferred(inner, where), "nargs": "+"}
        if of == "Literal":
            choices = [_plain(choice) for choice in (inner.elts if isinstance(inner, ast.Tuple) else [inner])]
            return {"type": type(choices[0]).__name__, "choices": choices}
    name = ast.unparse(annotation)
    if name in _TYPES:
        return {"type": name}
    return {"type": "str", **_choices_of_enum(name, where)}


def _choices_of_enum(name: str, where: _Module) -> dict[str, Any]:
    try:
        cls, _ = where.class_(name)
    except TreeError:
        return {}
    members = [n.targets[0].id for n in cls.body if isinstance(n, ast.Assign) and isinstance(n.targets[0], ast.Name)]
    return {"choices": members} if members and "Enum" in ast.unparse(ast.Tuple(cls.bases)) else {}


def _default(value: ast.expr | None, made: dict[str, ast.expr] | None) -> Any:
    factory = (made or {}).get("default_factory")
    if isinstance(factory, ast.Lambda):
        return _plain(factory.body)
    return [] if factory is not None and ast.unparse(factory) in ("list", "tuple") else _plain(value)


def _declared(names: tuple[str, ...], words: dict[str, Any], module: _Module) -> Declared:
    action, default = words.get("action", "store"), words.get("default")
    longest = next((name for name in names if name.startswith("--")), names[0])
    dest = words.get("dest") or longest.lstrip("-").replace("-", "_")
    if action in ("store_true", "store_false"):
        return Declared(names, dest, "true" if action == "store_true" else "false")
    if action == "BooleanOptionalAction":
        return Declared((*names, *(f"--no-{n.removeprefix('--')}" for n in names)), dest, "boolean", default=default)
    if action != "store":
        raise TreeError(f"{module.file}: {longest} has the action {action}, which is not read here")
    choices = words.get("choices")
    written = None if choices is None else tuple(str(choice) for choice in choices)
    return Declared(names, dest, "value", words.get("type") or "str", words.get("nargs"), default, written)


def _value(key: str, node: ast.expr) -> Any:
    if key == "type":
        return node.id if isinstance(node, ast.Name) and node.id in _TYPES else "str"
    if key == "action":
        return _plain(node) if isinstance(node, ast.Constant) else ast.unparse(node).split(".")[-1]
    return _plain(node)


def _plain(node: ast.expr | None) -> Any:
    """The value of a constant expression (an enum's member is its name); None of any other."""
    if isinstance(node, ast.Attribute):
        return node.attr
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        return _OPERATORS[type(node.op)](_plain(node.left), _plain(node.right))
    try:
        return None if node is None else ast.literal_eval(node)
    except ValueError:
        return None


def _keywords(call: ast.expr) -> dict[str, ast.expr]:
    return {word.arg: word.value for word in call.keywords if word.arg} if isinstance(call, ast.Call) else {}


def _keywords_of_dict(node: ast.expr | None, key: str) -> dict[str, ast.expr]:
    """The expressions of ``{key: {name: expression, ...}}``."""
    for name, value in zip(node.keys, node.values, strict=True) if isinstance(node, ast.Dict) else ():
        if name is not None and _plain(name) == key and isinstance(value, ast.Dict):
            return {_plain(inner): what for inner, what in zip(value.keys, value.values, strict=True) if inner}
    return {}
