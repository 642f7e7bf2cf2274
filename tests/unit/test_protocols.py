"""`protocols.py` is the whole contract: nothing else of a method is read outside of methods."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from l2rec import protocols

SOURCE = Path(inspect.getfile(protocols)).parent
FILES = [p for f in ("evaluation", "runs", "service") for p in sorted((SOURCE / f).rglob("*.py"))]
METHODS = ("model", "recommender", "validated")
"""What variables and attributes that hold a method are called."""


def members() -> set[str]:
    """Return the names that the protocols give to methods."""
    names: set[str] = set()
    for value in vars(protocols).values():
        if inspect.isclass(value) and getattr(value, "_is_protocol", False):
            names |= {n for n in {**vars(value), **inspect.get_annotations(value)} if n[0] != "_"}
    return names


def test_the_head_lists_every_protocol_of_a_method() -> None:
    listed = dict(re.findall(r"^    (\w+) +(\S.*)$", protocols.__doc__ or "", re.MULTILINE))
    for name, value in vars(protocols).items():
        if getattr(value, "_is_runtime_protocol", False) and value.__module__ == protocols.__name__:
            own = {member for member in vars(value) if member[0] != "_"}
            assert name in listed and all(member in listed[name] for member in own), name


def read_of_methods(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield line and name of each attribute that is read of a method, and each use of hasattr."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            holder = node.value
            name = holder.id if isinstance(holder, ast.Name) else getattr(holder, "attr", "")
            of_config = isinstance(holder, ast.Attribute) and "config" in ast.unparse(holder.value)
            if name in METHODS and not of_config:
                yield node.lineno, node.attr
        guesses = isinstance(node, ast.Call) and ast.unparse(node.func) in ("hasattr", "getattr")
        if guesses and ast.unparse(node.args[0]).rpartition(".")[2] in METHODS:
            yield node.lineno, ast.unparse(node)


def found() -> dict[str, list[str]]:
    reads: dict[str, list[str]] = {}
    for path in FILES:
        for line, name in read_of_methods(ast.parse(path.read_text())):
            reads.setdefault(name, []).append(f"{path.relative_to(SOURCE)}:{line}")
    return reads


def test_nothing_of_a_method_is_read_that_no_protocol_has() -> None:
    reads = found()
    assert {"scorer", "n_items", "stages", "encode_items", "add_items"} <= reads.keys()
    of_torch = set(dir(nn.Module))
    unknown = {n: at for n, at in reads.items() if n not in members() and n not in of_torch}
    assert not unknown, unknown


def test_every_member_has_a_docstring() -> None:
    silent: list[str] = []
    for value in vars(protocols).values():
        if inspect.isclass(value) and getattr(value, "_is_protocol", False):
            functions: list[tuple[str, Any]] = inspect.getmembers(value, inspect.isfunction)
            properties = inspect.getmembers(value, lambda v: isinstance(v, property))
            silent += [
                f"{value.__name__}.{name}"
                for name, member in (*functions, *properties)
                if name[0] != "_" and name in vars(value) and not inspect.getdoc(member)
            ]
    assert not silent, silent
