"""What must be known to read the scores of a run, as its recipe tells."""

from __future__ import annotations

__all__ = ["LEAKY", "is_leaky", "of_report", "remarks_of", "together"]

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from l2rec.config import RunConfig
from l2rec.protocols import MayLeak, Remarked

LEAKY = " (leaky)"
"""Behind the name of what was given held-out items."""


def is_leaky(configs: Iterable[RunConfig]) -> bool:
    """Say whether any of what was trained with these was given held-out items."""
    return any(map(_leak, configs))


def _leak(config: RunConfig) -> str:
    return config.model.leaks if isinstance(config.model, MayLeak) else ""


def remarks_of(configs: Iterable[RunConfig]) -> list[str]:
    """Return the remarks on what was trained with these, each once; a leak comes first."""
    known = list(configs)
    leaks = [f"leaky, not to be compared: {leak}" for leak in map(_leak, known) if leak]
    found = [c.model.remarks for c in known if isinstance(c.model, Remarked)]
    return list(dict.fromkeys([*leaks, *(remark for remarks in found for remark in remarks)]))


def of_report(configs: Iterable[RunConfig]) -> dict[str, Any]:
    """Return what the report of a run that was made with these says: ``leaky`` and ``remarks``."""
    known = list(configs)
    return {"leaky": is_leaky(known), "remarks": remarks_of(known)}


def together(remarks: Mapping[str, Sequence[str]]) -> list[str]:
    """Write remarks on rows, by their names, each once: ``A, B: ranks ...``."""
    rows: dict[str, list[str]] = {}
    for name, of_row in remarks.items():
        for remark in of_row:
            rows.setdefault(remark, []).append(name)
    return [f"{', '.join(names)}: {remark}" for remark, names in rows.items()]
