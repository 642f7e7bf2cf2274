"""Nested and marked-up catalog fields as plain text."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from typing import Any

import polars as pl


def separator_of(field: str) -> str:
    """Return what stands between the parts of a field."""
    return ", " if field == "category" else " "


def flat(value: Any, joint: str = " ") -> str | None:
    """Turn a scalar or nested lists into one text without repeats; None stays None."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, (list, tuple)):
        parts = [flat(v, joint) for v in _leaves(value)]
        return joint.join(dict.fromkeys(p for p in parts if p))
    return str(value)


def _leaves(value: Sequence[Any]) -> Iterator[Any]:
    for part in value:
        if isinstance(part, (list, tuple)):
            yield from _leaves(part)
        else:
            yield part


def joined(column: pl.Series, joint: str) -> pl.Series:
    """Join the parts of every value of a column, as `flat` does for one."""
    while isinstance(column.dtype, pl.List) and isinstance(column.dtype.inner, pl.List):
        column = column.list.eval(pl.element().explode())
    if isinstance(column.dtype, pl.List):
        parts = column.list.eval(pl.element().filter(pl.element().fill_null("") != ""))
        return parts.list.unique(maintain_order=True).list.join(joint)
    return column


_ENTITY = r"&[#a-zA-Z0-9]+;"
_TAG = r"</?[a-zA-Z][^<>]*>"


def clean(texts: pl.Series, name: str) -> pl.Series:
    """Make texts plain: entities resolved, tags and scraped scripts removed, single spaces."""
    texts = texts.fill_null("")
    escaped = texts.str.contains(_ENTITY).arg_true()
    if len(escaped):
        texts = texts.scatter(escaped, [html.unescape(t) for t in texts.gather(escaped)])
    texts = texts.str.replace_all(_TAG, " ").str.replace_all(r"\s+", " ").str.strip_chars()
    if name == "title":
        # Some 2018 pages were scraped before their script had run; the title is JavaScript.
        script = texts.str.contains("getTime", literal=True).arg_true()
        texts = texts.scatter(script, "") if len(script) else texts
    return texts
