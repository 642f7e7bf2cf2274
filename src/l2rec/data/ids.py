"""Lists of ids and of texts as people give them: told from a lone string, which is one of them."""

from __future__ import annotations

__all__ = ["as_ids", "as_list"]

from collections.abc import Iterable
from typing import Any

from l2rec.errors import DataError, shown


def as_list(given: Iterable[Any], name: str, of: str) -> list[Any]:
    """Return what was given as a list of ``of``; ``name``: of the argument.

    Raises:
        DataError: it is one string, whose characters would be taken, or nothing like a list.
    """
    if not isinstance(given, str | bytes):
        try:
            return list(given)
        except TypeError:  # a number, None, an array without dimensions
            pass
    raise DataError(f"{name}={shown(given)}: give a list of {of}")


def as_ids(given: Iterable[Any], name: str, of: str) -> list[str]:
    """Return ids that were given as texts, which numbers stand for, as in a log.

    Raises:
        DataError: as `as_list`.
    """
    return [str(one) for one in as_list(given, name, of)]
