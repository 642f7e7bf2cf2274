"""Why an item is ranked where it is: pure functions of a model, a history and an item.

- the gate: delta of Eq. 7, how far this user is read by behaviour (1) or by texts (0)
- the experts: the share of the history's tokens that went to each expert of each view
- what is left out: the item's score if one item of the history had never been

What is left out needs the score of the item for many histories, which differ by one item each:
`variants` makes them, `effects` reads their scores. `explain` does it all in one batch; a server
encodes the variants beside other requests, and keeps them for the next item that is asked for.
"""

from __future__ import annotations

__all__ = [
    "MOST",
    "Experts",
    "Explanation",
    "effects",
    "experts",
    "explain",
    "label",
    "reached",
    "variants",
]

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from l2rec.errors import DataError
from l2rec.modules.adapters import part_of
from l2rec.protocols import Inspectable
from l2rec.runs.predictor import Predictor

T = TypeVar("T")

MOST = 50
"""Newest items of a history that are left out, one by one."""


@dataclass(frozen=True)
class Experts:
    """Experts that the tokens of a history chose. matrices: [J] names of the adapted matrices.
    shares: by view, [J][E] share of the choices that fell on each expert of each matrix; the shares
    of a matrix add up to 1.
    """

    matrices: list[str]
    shares: dict[str, list[list[float]]]


@dataclass(frozen=True)
class Explanation:
    """Reasons for the rank of an item. score: its score; None where a search among tokens that name
    items did not find it. added: the part that no inner product
    gives, such as co-occurrence; None where nothing is added. gate: mean delta, None without one.
    experts: None without any. without: its score without each item of the history, oldest first;
    None where it was not computed, for items older than `MOST` and for the only one, and where the
    item was not found.
    """

    item: str
    score: float | None
    added: float | None
    gate: float | None
    experts: Experts | None
    without: list[float | None]


def variants(history: Sequence[T], most: int = MOST) -> list[list[T]]:
    """Return the history, and then the history without each of its newest ``most`` items, oldest of
    them first; of a history of one, nothing else.
    """
    first = max(0, len(history) - most) if len(history) > 1 else len(history)
    left = [[*history[:i], *history[i + 1 :]] for i in range(first, len(history))]
    return [list(history), *left]


def reached(score: float) -> float | None:
    """Return a score; None for -inf, that of an item which a search did not find."""
    return None if score == -math.inf else float(score)


def effects(length: int, scores: Sequence[float]) -> list[float | None]:
    """Turn scores of the `variants` of a history of ``length`` into the score without each item."""
    left = [reached(score) for score in scores[1:]]
    return [*[None] * (length - len(left)), *left]


def experts(predictor: Predictor, history: Sequence[str]) -> Experts | None:
    """Return where the tokens of a history went, by view; None for a method without experts.

    Raises:
        DataError: unknown ids, all of them named.
    """
    model = predictor.model
    load = model.expert_load(predictor.rows([history])) if isinstance(model, Inspectable) else None
    if load is None:
        return None
    shares = {
        view: [[round(share, 4) for share in shares] for shares in by_matrix]
        for view, by_matrix in load.experts.items()
    }
    return Experts(load.matrices, shares)


def label(matrix: str) -> str:
    """Shorten the name of an adapted matrix: ``encoder.layer.3.attention.self.query`` is ``4 q``,
    the query matrix of the fourth layer.
    """
    layer = re.search(r"\.(\d+)\.", matrix)
    part = part_of(matrix) or matrix.rpartition(".")[2]
    return part if layer is None else f"{int(layer[1]) + 1} {part}"


def explain(predictor: Predictor, history: Sequence[str], item: str | None = None) -> Explanation:
    """Explain the rank of ``item`` (by default of the best one that is not in the history) for a
    user who is this history, oldest first.

    Raises:
        DataError: an empty history, unknown ids.
    """
    if not history:
        raise DataError("an empty history: give at least one item id")
    if item is None:
        best = predictor.recommend(history, 1).items
        if not best:
            raise DataError(
                "nothing is left to recommend after this history: name the item to explain"
            )
        item = best[0]["id"]
    row = int(predictor.rows([[item]])[0][0])
    rows = predictor.rows(variants(history))
    encoded = predictor.encode(rows)
    scores = predictor.scores(encoded)[:, row].float().cpu().tolist()
    prior = encoded.prior
    return Explanation(
        item=item,
        score=reached(scores[0]),
        added=None if prior is None else float(prior[0, row]),
        gate=encoded.gates[0],
        experts=experts(predictor, history),
        without=effects(len(history), scores),
    )
