"""A function's docstring opens with a verb."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

SOURCES = sorted((Path(__file__).parents[2] / "src").rglob("*.py"))
NO_VERBS = frozenset(
    [
        "a",
        "all",
        "an",
        "another",
        "any",
        "as",
        "at",
        "by",
        "each",
        "every",
        "everything",
        "for",
        "from",
        "how",
        "if",
        "in",
        "it",
        "its",
        "no",
        "not",
        "of",
        "on",
        "one",
        "several",
        "some",
        "that",
        "the",
        "their",
        "this",
        "those",
        "to",
        "what",
        "when",
        "where",
        "whether",
        "which",
        "who",
        "with",
        "without",
    ]
)
"""Words that docstrings opened with, and that the linter (D401) takes for verbs."""


def docstrings(tree: ast.Module) -> Iterator[tuple[ast.FunctionDef | ast.AsyncFunctionDef, str]]:
    """Yield the functions of a module with their docstrings; properties are things."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            decorators = {getattr(d, "id", "") for d in node.decorator_list}
            text = ast.get_docstring(node)
            if text and not decorators & {"property", "cached_property"}:
                yield node, text


def opens_with_a_verb(text: str) -> bool:
    first = text.split()[0].strip("`*,.:;")
    return first[:1].isupper() and first.lower() not in NO_VERBS


def test_every_function_says_what_it_does() -> None:
    trees = {path: ast.parse(path.read_text()) for path in SOURCES}
    checked = [(p, node, text) for p, tree in trees.items() for node, text in docstrings(tree)]
    assert len(checked) > 1000
    wrong = [
        f"{p}:{node.lineno}: {text}" for p, node, text in checked if not opens_with_a_verb(text)
    ]
    assert not wrong, wrong[:5]


def test_the_rule_tells_them_apart() -> None:
    assert opens_with_a_verb("Return item vectors [N, D].")
    for text in ("[N, D] of the items.", "What a kill left.", "Of a scalar.", "``x`` as it is."):
        assert not opens_with_a_verb(text)
