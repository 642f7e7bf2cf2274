"""POST /v1/explain: why an item is ranked where it is."""

from __future__ import annotations

__all__ = ["router"]

from collections.abc import Sequence

import numpy as np
from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict

from l2rec.service import explain as reasons
from l2rec.service.ranking import Query, score
from l2rec.service.routes.answers import NOT_FOUND
from l2rec.service.routes.state import (
    ITEM,
    Item,
    Memory,
    current_version,
    example,
    fields_of,
    item_at,
    memory_of,
    rows_of,
    service_of,
)
from l2rec.service.schemas import SOMEBODY, Id, Somebody
from l2rec.service.security import Refused, current_key
from l2rec.service.serving import Service
from l2rec.service.version import Version

router = APIRouter(tags=["page"])

REMEMBERED = 64
"""Histories whose experts are remembered: they are the same for every item of one ranking."""


class Explain(Somebody):
    """A user or a history, and the item to explain; by default the best one."""

    model_config = ConfigDict(
        json_schema_extra={
            **SOMEBODY,
            "examples": [{"history": ["50", "172"], "item": "181"}, {"user": "u42"}],
        },
    )

    item: Id | None = None


class Without(Item):
    """An item of the history. score: score of the explained item if this one had never been; None
    where that was not computed, for the only item and for items older than the newest 50, and where
    the explained item was not found.
    """

    score: float | None


class Experts(BaseModel):
    """Experts that the history's tokens chose. matrices: names of the adapted matrices. labels:
    short names, layer and part. shares: by view, [matrix][expert] share of all choices; those of a
    matrix add up to 1.
    """

    matrices: list[str]
    labels: list[str]
    shares: dict[str, list[list[float]]]


class Reasons(BaseModel):
    """Reasons for the rank of an item. score: null where the method searches among tokens that name
    items, and did not find this one. added: the part of the score that comes from co-occurrence
    and repeats, not from vectors. gate: 1 all behavioural, 0 all semantic. Both, and experts, are
    null for methods that have none. unknown: ids of the history that were skipped.
    """

    model_config = example(
        item=ITEM,
        score=0.71,
        added=None,
        gate=0.55,
        experts={
            "matrices": ["encoder.layer.0.attention.self.query"],
            "labels": ["1 q"],
            "shares": {"semantic": [[0.75, 0.25]], "behavioral": [[0.5, 0.5]]},
        },
        history=[
            {**ITEM, "id": "50", "text": "Star Wars (1977)", "title": "Star Wars", "score": 0.42},
        ],
        unknown=[],
        version="0f3a6d1c2b4e5f60",
    )

    item: Item
    score: float | None
    added: float | None
    gate: float | None
    experts: Experts | None
    history: list[Without]
    unknown: list[str]
    version: str


@router.post("/v1/explain", responses=NOT_FOUND)
async def explain(request: Request, body: Explain) -> Reasons:
    """Explain why an item is ranked where it is: the gate, the experts, and the item's score
    without each item of the history.
    """
    service, version = service_of(request), current_version(request)
    predictor, memory = version.predictor, memory_of(request)
    known = await service.audience.whose(version, version, body)
    history = known.items
    if not history:
        whose = "this history" if body.history is not None else f"user {body.user!r}"
        raise Refused(404, f"nothing is known of {whose}, so there is no rank to explain")
    rows = predictor.rows([history, [] if body.item is None else [body.item]])
    everyone = await service.users(version, reasons.variants(history))
    experts = await _experts(memory, service, version, history)
    if body.item is None:
        query = Query(version, everyone[0], 1, rows_of(version, known.seen))
        best = await service.ranking.submit(query, of=current_key())
        if not len(best.rows):
            raise Refused(
                404, "nothing is left to recommend after this history: name the item to explain"
            )
        row = int(best.rows[0])
    else:
        row = int(rows[1][0])
    one = np.array([row], dtype=np.int64)
    scores = [float(score(version, user, one)[0]) for user in everyone]
    without = reasons.effects(len(history), scores)
    whole = everyone[0]
    return Reasons(
        item=item_at(service, version, row),
        score=reasons.reached(scores[0]),
        added=float(whole.added[whole.rows == row].sum()) if len(whole.rows) else None,
        gate=whole.gate,
        experts=None
        if experts is None
        else Experts(
            matrices=experts.matrices,
            labels=[reasons.label(name) for name in experts.matrices],
            shares=experts.shares,
        ),
        history=[
            Without(**fields_of(service, version, int(n)), score=left)
            for n, left in zip(rows[0], without, strict=True)
        ],
        unknown=list(known.unknown),
        version=version.version,
    )


async def _experts(
    memory: Memory, service: Service, version: Version, history: Sequence[str]
) -> reasons.Experts | None:
    key = (version.serial, tuple(history))
    if key not in memory.experts:
        memory.experts[key] = await service.worker.run(
            reasons.experts, version.predictor, history, later=True
        )
        while len(memory.experts) > REMEMBERED:
            memory.experts.popitem(last=False)
    memory.experts.move_to_end(key)
    return memory.experts[key]
