"""The page at ``/``, and the routes that it alone needs: search, neighbours, users, reasons."""

from __future__ import annotations

__all__ = ["router", "static"]

from pathlib import Path
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Query, Request
from fastapi import Path as InPath
from pydantic import BaseModel, ConfigDict
from starlette.responses import FileResponse
from starlette.staticfiles import StaticFiles

from l2rec.service import schemas as s
from l2rec.service.explain import explain
from l2rec.service.live import Live
from l2rec.service.security import Refused
from l2rec.service.version import Query as Ranking
from l2rec.service.version import User, Version, rank

FILES = Path(__file__).parent / "static"
SCORES = ("recall@10", "ndcg@10", "mrr", "recall@10_masked", "ndcg@10_masked")

router = APIRouter(tags=["page"])
static = StaticFiles(directory=FILES)


class Item(BaseModel):
    """One catalog item."""

    id: str
    text: str
    attributes: dict[str, str] = {}


class Found(BaseModel):
    """Some of what matches, and how many match in all."""

    items: list[Item]
    total: int


class Near(BaseModel):
    """An item close to another, and the cosine of their vectors."""

    id: str
    text: str
    score: float


class Neighbours(BaseModel):
    items: list[Near]
    version: str


class Users(BaseModel):
    """Ids of users that have a history."""

    users: list[str]


class History(BaseModel):
    user: str
    items: list[Item]


class Explain(BaseModel):
    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        json_schema_extra={"examples": [{"history": ["50", "172"], "item": "181"}]},
    )

    history: s.History
    item: s.Id


class Without(BaseModel):
    id: str
    text: str
    score: float | None


class Reasons(BaseModel):
    """See `l2rec.service.explain`."""

    item: str
    score: float
    gate: float | None
    without: list[Without]
    matrices: list[str]
    experts: dict[str, list[list[float]]]
    version: str


class State(BaseModel):
    """What is served, and what it scored when it was trained."""

    name: str
    version: str
    loaded_at: float
    method: str | None
    recipe: str | None
    data: str | None
    fingerprint: str | None
    scores: dict[str, float]
    items: int
    index: str | None
    gate: bool
    experiment: str | None
    control: str | None
    shadow: str | None
    refused: dict[str, Any] | None


@router.get("/", include_in_schema=False)
async def page() -> FileResponse:
    """The page."""
    return FileResponse(FILES / "index.html", headers={"cache-control": "no-cache"})


@router.get("/v1/live")
async def live(request: Request) -> State:
    """The live version, its scores on its test data, and what is held beside it."""
    held: Live = request.app.state.live
    version, running = held.current(), request.app.state.settings.experiment
    report = version.report
    scores = report.get("scores", {}).get(report.get("method"), {})
    data = report.get("dataset", {})
    return State(
        name=version.name,
        version=version.version,
        loaded_at=version.loaded_at,
        method=report.get("method"),
        recipe=report.get("recipe"),
        data=data.get("name"),
        fingerprint=data.get("fingerprint"),
        scores={name: scores[name] for name in SCORES if name in scores},
        items=int((~version.hidden).sum()),
        index=None if version.index is None else version.index.kind,
        gate=hasattr(version.predictor.model, "fusion"),
        experiment=None if running is None else running.name,
        control=None if held.control is None else held.control.name,
        shadow=None if held.shadow is None else held.shadow.name,
        refused=held.refused,
    )


class _Search:
    """Ids and texts of one version in lower case; made when it is first searched."""

    def __init__(self) -> None:
        self.key: tuple[int, int, int] | None = None
        self.lines: list[str] = []
        self.rows: list[int] = []

    def find(self, version: Version, words: str) -> list[int]:
        """Rows that have all the words, those whose id or text begins with them first."""
        key = (version.serial, len(version), len(version.deleted))
        if key != self.key:
            self.rows = np.flatnonzero(~version.hidden).tolist()
            self.lines = [f"{version.ids[r]}\0{version.texts[r]}".lower() for r in self.rows]
            self.key = key
        wanted = words.lower().split()
        if not wanted:
            return self.rows
        first = wanted[0]
        hits = [n for n, line in enumerate(self.lines) if all(word in line for word in wanted)]
        hits.sort(
            key=lambda n: not (self.lines[n].startswith(first) or f"\0{first}" in self.lines[n])
        )
        return [self.rows[n] for n in hits]


_search = _Search()


@router.get("/v1/items")
async def items(
    request: Request,
    q: Annotated[str, Query(max_length=200, pattern=r"^[^\x00]*$")] = "",
    limit: Annotated[int, Query(ge=1, le=100)] = 10,
    offset: Annotated[int, Query(ge=0, le=10_000_000)] = 0,
) -> Found:
    """Items that have all the words of ``q`` in their id or text."""
    version = request.app.state.live.current()
    rows = _search.find(version, q)
    return Found(
        items=[_item(version, row) for row in rows[offset : offset + limit]], total=len(rows)
    )


def _item(version: Version, row: int) -> Item:
    return Item(id=version.ids[row], text=version.texts[row], attributes=version.attributes_of(row))


def _row(version: Version, item: str) -> int:
    row = version.predictor.row_of(item)
    if row is None or version.hidden[row]:
        raise Refused(404, f"unknown item id: {item!r}")
    return row


@router.get("/v1/items/{id}", responses={404: {"model": s.Error}})
async def item(request: Request, id: Annotated[s.Id, InPath()]) -> Item:
    """One item."""
    version = request.app.state.live.current()
    return _item(version, _row(version, id))


@router.get(
    "/v1/items/{id}/neighbours", responses={404: {"model": s.Error}, 409: {"model": s.Error}}
)
async def neighbours(
    request: Request,
    id: Annotated[s.Id, InPath()],
    k: Annotated[int, Query(ge=1, le=s.MAX_K)] = 10,
) -> Neighbours:
    """Items whose vectors are closest to that of an item."""
    version = request.app.state.live.current()
    row = _row(version, id)
    if version.matrix is None:
        raise Refused(409, f"{version.name} has no vectors: its method only ranks")
    asked = User(version.matrix[row])
    found = rank([Ranking(version, asked, k, np.array([row], dtype=np.int64))])[0]
    near = [
        Near(id=version.ids[r], text=version.texts[r], score=float(score))
        for r, score in zip(found.rows.tolist(), found.scores.tolist(), strict=True)
    ]
    return Neighbours(items=near, version=version.version)


@router.get("/v1/users", responses={503: {"model": s.Error}})
async def users(
    request: Request,
    q: Annotated[str, Query(max_length=256, pattern=r"^[^\x00]*$")] = "",
    limit: Annotated[int, Query(ge=1, le=100)] = 10,
) -> Users:
    """Users of the event log with a history, whose id begins with ``q``."""
    state = request.app.state
    return Users(users=await state.service.stored("users", state.log.users, q, limit))


@router.get("/v1/users/{id}", responses={404: {"model": s.Error}, 503: {"model": s.Error}})
async def user(request: Request, id: Annotated[s.Id, InPath()]) -> History:
    """The history of a user of the event log, oldest first."""
    state = request.app.state
    version = state.live.current()
    found = await state.service.stored("history", state.log.history, id, s.MAX_HISTORY)
    rows = [row for i in found if (row := version.predictor.row_of(i)) is not None]
    if not rows:
        raise Refused(404, f"user {id!r} has no events yet")
    return History(user=id, items=[_item(version, row) for row in rows])


@router.post("/v1/explain", responses={503: {"model": s.Error}})
async def reasons(request: Request, body: Explain) -> Reasons:
    """Why an item is ranked where it is, for a user who is this history."""
    state = request.app.state
    version = state.live.current()
    found = await state.service.worker.run(explain, version, body.history, body.item)
    return Reasons(**found, version=version.version)
