"""What tests share is in ``tests/support``; none imports from a test or another conftest."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]


def imported(source: str) -> list[str]:
    """Name the modules that a file imports, and what it takes of them: `a`, `a.b`."""
    names = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            names += [module, *(f"{module}.{alias.name}" for alias in node.names)]
    return names


def misplaced(source: str) -> list[str]:
    """Name imports from a test file, from a conftest, or from elsewhere than ``tests.support``."""
    return [
        name
        for name in imported(source)
        if any(part == "conftest" or part.startswith("test_") for part in name.split("."))
        or name.startswith(".")
        or (name.split(".")[0] == "tests" and name.split(".")[:2] != ["tests", "support"])
    ]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from tests.support import tiny", []),
        ("from tests.unit.test_runs import cut", 2 * ["tests.unit.test_runs"]),
        ("import tests.service.conftest", ["tests.service.conftest"]),
        ("from tests.unit import conftest", 2 * ["tests.unit"]),
        ("from test_app import error", 2 * ["test_app"]),
        ("def f():\n    from .conftest import g", 2 * [".conftest"]),
    ],
)
def test_what_is_misplaced(source: str, expected: list[str]) -> None:
    found = misplaced(source)
    assert len(found) == len(expected)
    assert all(name.startswith(start) for name, start in zip(found, expected, strict=True))


def test_tests_import_from_support_alone() -> None:
    files = sorted(TESTS.rglob("*.py"))
    assert len(files) > 60 and Path(__file__) in files
    assert {
        str(path.relative_to(TESTS)): wrong
        for path in files
        if (wrong := misplaced(path.read_text()))
    } == {}
