"""The text of an item: a template over the fields of the catalog, filled."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass, field

import polars as pl

from l2rec.errors import DataError, nearest

BRACKETS = {"(": ")", "[": "]", "{": "}"}


def item_text(template: str | None, fields: Sequence[str], known: Sequence[str]) -> pl.Expr:
    """Return the text of an item: the template filled, or by default its ``fields`` joined.

    known: all fields that a template may name.

    Raises:
        DataError: the template is none, or names another field.
    """
    if template is None:
        return _default_text(fields)
    parts = parse_template(template)
    for _, name in parts:
        if name is not None and name not in known:
            raise DataError(
                f"text={template!r} names the field {name!r}, which the catalog does not "
                f"have{nearest(name, known)}; it has {', '.join(known) or 'only ids'}"
            )
    return _apply(parts)


def parse_template(template: str) -> list[tuple[str, str | None]]:
    """Split a template into pairs of literal text and the field after it (None at the end)."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise DataError(
            f"text={template!r} is not a template ({error}); write fields as {{title}}"
        ) from error
    if not any(name for _, name, _, _ in parts):
        raise DataError(f"text={template!r} names no field; write fields as {{title}}")
    for _, name, spec, conversion in parts:
        if name == "" or spec or conversion:
            raise DataError(
                f"text={template!r} has a field that is not a plain name; write it as {{title}}"
            )
    return [(literal, name) for literal, name, _, _ in parts]


def _apply(template: list[tuple[str, str | None]]) -> pl.Expr:
    """Fill the template without what is empty; an item that has none of the fields has no text."""
    return _filled(_nested(template)).str.strip_chars().fill_null("")


@dataclass
class _Span:
    """A template, or what is between two brackets of it: elements, and the literals around them.

    literals: one more than there are elements, with the brackets.
    """

    literals: list[str]
    elements: list[str | _Span] = field(default_factory=list)

    def add(self, element: str | _Span) -> None:
        """Add a field, or a span of fields."""
        self.elements.append(element)
        self.literals.append("")

    def take(self, other: _Span) -> None:
        """Add what another span has, one by one."""
        self.literals[-1] += other.literals[0]
        self.literals += other.literals[1:]
        self.elements += other.elements


def _nested(template: list[tuple[str, str | None]]) -> _Span:
    """Put fields in brackets together: they are empty as one, brackets included."""
    spans = [_Span([""])]
    for literal, name in template:
        for sign in literal:
            if sign in BRACKETS:
                spans.append(_Span([sign]))
                continue
            spans[-1].literals[-1] += sign
            if len(spans) > 1 and sign == BRACKETS[spans[-1].literals[0][0]]:
                closed = spans.pop()
                if closed.elements:
                    spans[-1].add(closed)
                else:
                    spans[-1].take(closed)
        if name is not None:
            spans[-1].add(name)
    while len(spans) > 1:  # never closed
        left = spans.pop()
        spans[-1].take(left)
    return spans[0]


def _filled(span: _Span) -> pl.Expr:
    """Write the elements that are not empty, each after the literal before it, the first of them
    without; null where all are empty.
    """
    first, *between, last = span.literals
    parts, some = [pl.lit(first)], pl.lit(False)
    for joint, element in zip(["", *between], span.elements, strict=True):
        if isinstance(element, _Span):
            value = _filled(element)
        else:
            value = pl.when(pl.col(element).str.strip_chars() != "").then(pl.col(element))
        parts.append(
            (pl.when(some).then(pl.lit(joint)).otherwise(pl.lit("")) + value).fill_null("")
        )
        some = some | value.is_not_null()
    return pl.when(some).then(pl.concat_str([*parts, pl.lit(last)]))


def _default_text(fields: Sequence[str]) -> pl.Expr:
    if not fields:
        return pl.lit("")
    trimmed = [pl.col(name).str.strip_chars() for name in fields]
    filled = [pl.when(column != "").then(column) for column in trimmed]
    return pl.concat_str(filled, separator=". ", ignore_nulls=True).fill_null("")
