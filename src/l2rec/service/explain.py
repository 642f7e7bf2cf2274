"""Why an item is ranked where it is: the gate, the experts, what each item of the history did."""

from __future__ import annotations

__all__ = ["explain"]

from collections.abc import Sequence
from typing import Any

import numpy as np

from l2rec.data.ragged import Ragged
from l2rec.diagnostics import expert_load
from l2rec.errors import DataError
from l2rec.service.version import Version, encode, score

MOST = 50
"""Newest items of a history that are left out one by one."""


def explain(version: Version, history: Sequence[str], item: str) -> dict[str, Any]:
    """What speaks for ``item``, for a user who is this history. In the thread of the models.

    score: of the item. gate: mean delta of Eq. 7, 1 all behavioural, None without one.
    without: for each of the newest items of the history, the item's score if it had never been
    (None for the only one there is). experts: share of the history's tokens that each expert of
    each view was chosen for, by adapted matrix; empty for a method without experts.

    Raises:
        DataError: an unknown item.
    """
    row = version.predictor.row_of(item)
    if row is None:
        raise DataError(f"unknown item id: {item!r}")
    whole = version.predictor.rows([history])[0]
    places = list(range(max(0, len(whole) - MOST), len(whole))) if len(whole) > 1 else []
    rows = Ragged.from_rows([whole, *(np.delete(whole, place) for place in places)])
    users = encode(version, rows)
    wanted = np.array([row], dtype=np.int64)
    scores = [float(score(version, user, wanted)[0]) for user in users]
    load = {}
    if hasattr(version.predictor.model, "experts"):
        load = expert_load(version.predictor.model, rows.take(np.array([0])))
    alone = [None] if len(whole) == 1 else scores[1:]
    shown = places or [0]
    return {
        "item": item,
        "score": scores[0],
        "gate": users[0].gate,
        "without": [
            {
                "id": version.ids[int(whole[place])],
                "text": version.texts[int(whole[place])],
                "score": s,
            }
            for place, s in zip(shown, alone, strict=True)
        ],
        "matrices": load.get("matrices", []),
        "experts": load.get("experts", {}),
    }
