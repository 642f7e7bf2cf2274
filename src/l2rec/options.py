"""What a recipe can say: every key with its value, its default, what it may be and what it means.

All of it stands in the classes of the configuration already: types and limits of the fields, and
the strings under them.
"""

from __future__ import annotations

__all__ = ["Option", "as_recipe", "options_of"]

import ast
import inspect
import textwrap
import types
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from l2rec.config import RunConfig, as_trained

WIDTH = 96
"""Columns of a comment."""
KINDS = {
    bool: "true or false",
    int: "whole number",
    float: "number",
    str: "any text",
    type(None): "null",
}
"""Words for the types of values."""
LIMITS = {"ge": "from {}", "gt": "above {}", "le": "up to {}", "lt": "below {}"}
"""Words for the limits of numbers."""


@dataclass(frozen=True)
class Option:
    """A key of a recipe, as ``training.lr``. value: what the recipe makes it. allowed: in words."""

    key: str
    value: Any
    default: Any
    allowed: str
    meaning: str

    @property
    def changed(self) -> bool:
        """Whether the value differs from the default."""
        return bool(self.value != self.default)


def options_of(config: RunConfig) -> list[Option]:
    """List the options of a recipe, group by group; the backbone's only where it is read."""
    values = as_trained(config.model_dump(mode="json"))
    options = []
    for name, value in values.items():
        group = getattr(config, name)
        if isinstance(group, BaseModel):
            options += _options(group, f"{name}.")
            continue
        field, meaning = RunConfig.model_fields[name], _meanings(RunConfig)[name]
        default = value if name == "method" else field.default  # each method has its own defaults
        options.append(Option(name, value, default, _allowed(field), meaning))
    return options


def _options(group: BaseModel, prefix: str) -> list[Option]:
    """List the options of one group."""
    kind = type(group)
    values, defaults = group.model_dump(mode="json"), kind().model_dump(mode="json")
    meanings = _meanings(kind)
    return [
        Option(prefix + name, values[name], defaults[name], _allowed(field), meanings.get(name, ""))
        for name, field in kind.model_fields.items()
    ]


@cache
def _meanings(kind: type[BaseModel]) -> dict[str, str]:
    """Read the strings under the fields of a class and of those that it extends."""
    found: dict[str, str] = {}
    for owner in reversed(kind.__mro__):
        if not issubclass(owner, BaseModel) or owner is BaseModel:
            continue
        try:
            (tree,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
        except (OSError, TypeError):  # made where there is no file
            continue
        assert isinstance(tree, ast.ClassDef)
        for field, below in pairwise(tree.body):
            if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                match below:
                    case ast.Expr(value=ast.Constant(value=str(text))):
                        found[field.target.id] = " ".join(text.replace("``", "`").split())
    return found


def _allowed(field: FieldInfo) -> str:
    """Say in words what a field may be."""
    limits = [
        wording.format(getattr(limit, name))
        for limit in field.metadata
        for name, wording in LIMITS.items()
        if hasattr(limit, name)
    ]
    return _kind(field.annotation, ", ".join(limits))


def _kind(annotation: Any, limits: str = "") -> str:
    """Say in words what a type is; ``limits``: of numbers."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(map(str, parts))
    if origin in (Union, types.UnionType):
        return ", or ".join(_kind(part, limits) for part in parts)
    if origin is tuple:
        return f"list of {_kind(parts[0])}"
    kind = KINDS.get(annotation, str(annotation))
    return f"{kind} {limits}" if limits and annotation in (int, float) else kind


def as_recipe(name: str, options: list[Option]) -> str:
    """Write options as a recipe, each below what it means and beside what it may be."""
    changed = ", ".join(option.key for option in options if option.changed)
    lines = _comment(
        f"Every option of {name}. A recipe need only hold what differs from the defaults; here "
        f"that is: {changed or 'nothing'}."
    )
    lines.append("")
    group = ""
    for option in options:
        before, _, key = option.key.rpartition(".")
        if before != group:
            lines += ["", f"{before}:"]
            group = before
        indent = "  " if before else ""
        beside = option.allowed
        if option.changed:
            beside += f"; default {_as_yaml(option.default)}"
        lines += _comment(option.meaning, indent)
        lines.append(f"{indent}{key}: {_as_yaml(option.value)}  # {beside}")
    return "\n".join(lines) + "\n"


def _comment(text: str, indent: str = "") -> list[str]:
    """Write a text as lines of comments."""
    hash_ = f"{indent}# "
    return textwrap.wrap(
        text, WIDTH, initial_indent=hash_, subsequent_indent=hash_, break_on_hyphens=False
    )


def _as_yaml(value: Any) -> str:
    """Write a value in one line."""
    quoted = '"' if isinstance(value, str) and "\n" in value else None
    text = yaml.safe_dump(
        value, default_flow_style=True, default_style=quoted, allow_unicode=True, width=10**6
    )
    return text.removesuffix("...\n").strip()
