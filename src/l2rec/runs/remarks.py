"""What must be known to read the scores of a run, as its recipe tells."""

from __future__ import annotations

__all__ = ["remarks_of", "together"]

from collections.abc import Iterable, Mapping, Sequence

from l2rec.config import RunConfig
from l2rec.protocols import Remarked


def remarks_of(configs: Iterable[RunConfig]) -> list[str]:
    """Return the remarks on what was trained with these, each once."""
    found = [c.model.remarks for c in configs if isinstance(c.model, Remarked)]
    return list(dict.fromkeys(remark for remarks in found for remark in remarks))


def together(remarks: Mapping[str, Sequence[str]]) -> list[str]:
    """Write remarks on rows, by their names, each once: ``A, B: ranks ...``."""
    rows: dict[str, list[str]] = {}
    for name, of_row in remarks.items():
        for remark in of_row:
            rows.setdefault(remark, []).append(name)
    return [f"{', '.join(names)}: {remark}" for remark, names in rows.items()]
