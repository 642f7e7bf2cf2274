"""The page at ``/``, and the routes that it asks: what is live, items, users, neighbours, reasons.

- GET /, /static/...: the page; nothing of it is made here, and nothing of it is built
- GET /v1/live: the live version, its scores, and what is held beside it
- GET /v1/items, /v1/items/{id}, /v1/items/{id}/neighbours
- GET /v1/users, /v1/users/{id}: of the event log, and of the data set that the run was made on
- POST /v1/explain: why an item is ranked where it is
"""

from __future__ import annotations

__all__ = ["router", "static"]

import asyncio
import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Query, Request
from fastapi import Path as InPath
from pydantic import BaseModel, ConfigDict
from starlette.responses import Response
from starlette.staticfiles import StaticFiles

from l2rec.errors import StorageError
from l2rec.service import explain as x
from l2rec.service import schemas as s
from l2rec.service import version as v
from l2rec.service.live import Live
from l2rec.service.search import Items, People
from l2rec.service.security import Refused
from l2rec.service.serving import Service
from l2rec.service.version import Version

FILES = Path(__file__).parents[1] / "static"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
TYPES |= {".svg": "image/svg+xml"}  # by name: what a system takes them for varies

MAX_FOUND, MAX_OFFSET, MAX_QUERY = 100, 10_000_000, 200
SHOWN = 100
"""Newest items of a user's history that are handed out."""
TOGETHER = 16
"""Histories of an explanation that wait for the model at the same time: others come in between."""
KEPT = 64
"""Explanations' experts that are kept: they are the same for every item of one ranking."""


class _Files(StaticFiles):
    """Files of a folder, with types that do not depend on the system, asked for anew each time (and
    answered with 304 where they are the same).
    """

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        found = super().file_response(*args, **kwargs)
        kind = TYPES.get(Path(args[0]).suffix)
        if kind is not None and found.status_code == 200:
            found.headers["content-type"] = f"{kind}; charset=utf-8"
        found.headers["cache-control"] = "no-cache"
        return found


router = APIRouter(tags=["page"])
static = _Files(directory=FILES)


# -- what is answered ----------------------------------------------------------------------------


def _example(**value: Any) -> ConfigDict:
    return ConfigDict(json_schema_extra={"examples": [value]})


_ITEM = {"id": "7", "text": "Solaris (1972), Sci-Fi"}
_SCORES = {"recall@10": 0.0965, "ndcg@10": 0.0425, "mrr": 0.0422}


class Item(BaseModel):
    """One item of the catalog."""

    model_config = _example(**_ITEM)

    id: str
    text: str


class Whole(Item):
    """One item, and all that is known of it."""

    model_config = _example(**_ITEM, attributes={"genres": "Sci-Fi|Drama"})

    attributes: dict[str, str]


class Found(BaseModel):
    """Some of the items that were asked for, and how many there are in all."""

    model_config = _example(items=[_ITEM], total=1)

    items: list[Item]
    total: int


class Near(Item):
    """An item, and the cosine of its vector with that of another."""

    model_config = _example(**_ITEM, score=0.83)

    score: float


class Neighbours(BaseModel):
    """Nearest first."""

    model_config = _example(items=[{**_ITEM, "score": 0.83}], version="0f3a6d1c2b4e5f60")

    items: list[Near]
    version: str


Source = Literal["events", "data"]


class User(BaseModel):
    """Somebody with a history. source: the event log, or the data set of the run. events: how many
    there are of a user of the data set.
    """

    model_config = _example(id="42", source="data", events=57)

    id: str
    source: Source
    events: int | None


class Users(BaseModel):
    """Those of the event log first. ``incomplete``: why users may be missing."""

    model_config = _example(users=[{"id": "42", "source": "data", "events": 57}], incomplete=None)

    users: list[User]
    incomplete: str | None


class History(BaseModel):
    """Oldest first. ``next``: the newest event of a user of the data set. It is not among
    ``items``, and the model was not trained on it: it shows how good a ranking is.
    """

    model_config = _example(user="42", source="data", items=[_ITEM], next=_ITEM)

    user: str
    source: Source
    items: list[Item]
    next: Item | None


class Explain(BaseModel):
    """A history, oldest first, and the item to explain; by default the best one."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        json_schema_extra={"examples": [{"history": ["50", "172"], "item": "181"}]},
    )

    history: s.History
    item: s.Id | None = None


class Without(Item):
    """An item of the history. score: of the explained item if this one had never been; None where
    that was not computed: for the only item, and for items older than the newest 50.
    """

    score: float | None


class Experts(BaseModel):
    """What the history's tokens chose. matrices: names of the adapted matrices. labels: short ones,
    layer and part. shares: view -> [matrix][expert], of all choices; those of a matrix add up to 1.
    """

    matrices: list[str]
    labels: list[str]
    shares: dict[str, list[list[float]]]


class Reasons(BaseModel):
    """Why an item is ranked where it is. added: what of the score comes from counts of what was met
    together, and not from vectors. gate: 1 all behavioural, 0 all semantic. Both, and experts, are
    null for methods that have none.
    """

    model_config = _example(
        item={"id": "181", "text": "Return of the Jedi (1983)"},
        score=0.71,
        added=None,
        gate=0.55,
        experts={
            "matrices": ["encoder.layer.0.attention.self.query"],
            "labels": ["1 q"],
            "shares": {"semantic": [[0.75, 0.25]], "behavioral": [[0.5, 0.5]]},
        },
        history=[
            {"id": "50", "text": "Star Wars (1977)", "score": 0.42},
            {"id": "172", "text": "The Empire Strikes Back (1980)", "score": 0.56},
        ],
        version="0f3a6d1c2b4e5f60",
    )

    item: Item
    score: float
    added: float | None
    gate: float | None
    experts: Experts | None
    history: list[Without]
    version: str


class Held(BaseModel):
    """A version that is held beside the live one."""

    name: str
    version: str


class Data(BaseModel):
    """The data set that a run was made on."""

    name: str
    fingerprint: str
    users: int
    items: int
    events: int


class Running(BaseModel):
    """The experiment that runs, and the share of users that is served the live version."""

    name: str
    treatment: float


class Declined(BaseModel):
    """The last candidate that was not taken."""

    run: str
    reason: str
    at: float


class Can(BaseModel):
    """What this version can tell."""

    gate: bool
    experts: bool
    neighbours: bool


class State(BaseModel):
    """What is live. scores: on the test split, of the model (first) and of the floors beside it.
    items: that can be recommended; added: rows that came since it was loaded.
    """

    model_config = _example(
        name="ml",
        version="0f3a6d1c2b4e5f60",
        loaded_at=1767225600.0,
        method="L2Rec",
        recipe="movielens-100k/l2rec-table",
        data={
            "name": "ml-100k",
            "fingerprint": "ffc605ffa7f72d8a",
            "users": 943,
            "items": 1682,
            "events": 100000,
        },
        scores={"L2Rec": _SCORES},
        items=1682,
        added=0,
        index="exact",
        can={"gate": True, "experts": True, "neighbours": True},
        experiment=None,
        control=None,
        shadow=None,
        refused=None,
    )

    name: str
    version: str
    loaded_at: float
    method: str | None
    recipe: str | None
    data: Data | None
    scores: dict[str, dict[str, float]]
    items: int
    added: int
    index: str | None
    can: Can
    experiment: Running | None
    control: Held | None
    shadow: Held | None
    refused: Declined | None


def _said(**texts: str) -> dict[int | str, dict[str, Any]]:
    return {int(code[1:]): {"model": s.Error, "description": text} for code, text in texts.items()}


NOT_FOUND, CANNOT = _said(_404="Unknown"), _said(_409="The live model cannot do this")


# -- what is kept --------------------------------------------------------------------------------


@dataclass
class _Kept:
    """What the routes of one app keep between requests."""

    items: Items | None = None
    people: dict[Path | None, People] = field(default_factory=dict)
    experts: OrderedDict[tuple[int, tuple[str, ...]], x.Experts | None] = field(
        default_factory=OrderedDict
    )
    preparing: asyncio.Lock = field(default_factory=asyncio.Lock)
    explaining: asyncio.Lock = field(default_factory=asyncio.Lock)


def _service(request: Request) -> Service:
    found: Service = request.app.state.service
    return found


def _kept(request: Request) -> _Kept:
    state = request.app.state
    if not hasattr(state, "page"):
        state.page = _Kept()
    found: _Kept = state.page
    return found


def _current(request: Request) -> Version:
    return _service(request).live.current()


def _item(version: Version, row: int) -> Item:
    return Item(id=version.ids[row], text=version.texts[row])


def _row(version: Version, item: str) -> int:
    """The row of an item that can be recommended; Refused, 404, for any other."""
    row = version.predictor.row_of(item)
    if row is None or version.hidden[row]:
        raise Refused(404, f"no item {item!r} in {version.name}")
    return row


# -- the page ------------------------------------------------------------------------------------


@router.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
async def page(request: Request) -> Response:
    """The page."""
    return await static.get_response("index.html", request.scope)


# -- what is live --------------------------------------------------------------------------------


@router.get("/v1/live")
async def live(request: Request) -> State:
    """The live version, its scores on the test split of its data, and what is held beside it."""
    held: Live = _service(request).live
    version, running = held.current(), _service(request).settings.experiment
    report, model = version.report, version.predictor.model
    config = getattr(model, "config", None)
    refused = held.status()["refused"]
    method, data = report.get("method"), report.get("dataset")
    scores = {
        name: {key: float(value) for key, value in values.items() if _is_number(value)}
        for name, values in report.get("scores", {}).items()
    }
    return State(
        name=version.name,
        version=version.version,
        loaded_at=version.loaded_at,
        method=method,
        recipe=report.get("recipe") or None,
        data=None if data is None else Data.model_validate(data),
        scores=dict(sorted(scores.items(), key=lambda pair: pair[0] != method)),
        items=int((~version.hidden).sum()),
        added=len(version) - version.loaded if version.loaded else 0,
        index=None if version.index is None else version.index.kind,
        can=Can(
            gate=len(getattr(config, "views", ())) > 1 and hasattr(model, "user_states"),
            experts=bool(getattr(config, "adapt", False) and model.linears),
            neighbours=version.matrix is not None,
        ),
        experiment=None
        if running is None
        else Running(name=running.name, treatment=running.treatment),
        control=_held(held.control),
        shadow=_held(held.shadow),
        refused=None if not refused else Declined.model_validate(refused),
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _held(version: Version | None) -> Held | None:
    return None if version is None else Held(name=version.name, version=version.version)


# -- items ---------------------------------------------------------------------------------------


@router.get("/v1/items")
async def items(
    request: Request,
    q: Annotated[str, Query(max_length=MAX_QUERY, description="Words")] = "",
    id: Annotated[
        list[s.Id], Query(max_length=s.MAX_HISTORY, description="These instead: `?id=a&id=b`")
    ] = [],  # noqa: B006  FastAPI copies it
    limit: Annotated[int, Query(ge=1, le=MAX_FOUND)] = 10,
    offset: Annotated[int, Query(ge=0, le=MAX_OFFSET)] = 0,
) -> Found:
    """Items that have all the words of ``q`` in their text or id, best matches first; without words
    all items; with ``id`` those of these ids that are known, in that order, whatever the limit.
    """
    version = _current(request)
    if id:
        known = [row for i in id if (row := version.predictor.row_of(i)) is not None]
        some = [_item(version, row) for row in known if not version.hidden[row]]
        return Found(items=some, total=len(some))
    index = await _items_of(_kept(request), version)
    rows = await asyncio.to_thread(index.find, version, q)
    some = [_item(version, int(row)) for row in rows[offset : offset + limit]]
    return Found(items=some, total=len(rows))


async def _items_of(kept: _Kept, version: Version) -> Items:
    """Prepared once for each loading of a run, and extended as items come."""
    async with kept.preparing:
        index = kept.items
        if index is None or index.serial != version.serial:
            index = Items(version.serial)
        if len(index) < len(version):
            await asyncio.to_thread(index.extend, version)
        kept.items = index
        return index


@router.get("/v1/items/{id:path}/neighbours", responses=NOT_FOUND | CANNOT)
async def neighbours(
    request: Request,
    id: Annotated[s.Id, InPath(examples=["50"])],
    k: Annotated[int, Query(ge=1, le=MAX_FOUND)] = 10,
) -> Neighbours:
    """The items whose vectors are nearest to an item's, by cosine."""
    version = _current(request)
    row = _row(version, id)
    if version.matrix is None:
        raise Refused(409, f"{version.name} has no item vectors: its method only ranks")
    near = await asyncio.to_thread(_nearest, version, row, k)
    some = [Near(id=version.ids[n], text=version.texts[n], score=cosine) for n, cosine in near]
    return Neighbours(items=some, version=version.version)


def _nearest(version: Version, row: int, k: int) -> list[tuple[int, float]]:
    """(row, cosine) of the k nearest, nearest first. Every row is looked at: an index ranks by
    inner products, which are no cosines where vectors are not of unit length.
    """
    assert version.matrix is not None
    matrix = version.matrix.numpy()
    cosines = matrix @ matrix[row]
    lengths = np.sqrt(np.einsum("nd,nd->n", matrix, matrix)) * np.linalg.norm(matrix[row])
    cosines = cosines / np.maximum(lengths, 1e-12)
    cosines[version.hidden] = -np.inf
    cosines[row] = -np.inf
    some = np.argpartition(-cosines, min(k, len(cosines) - 1))[: k + 1]
    best = some[np.lexsort((some, -cosines[some]))][:k]
    return [(int(n), float(cosines[n])) for n in best if np.isfinite(cosines[n])]


@router.get("/v1/items/{id:path}", responses=NOT_FOUND)
async def item(request: Request, id: Annotated[s.Id, InPath(examples=["50"])]) -> Whole:
    """One item, and all that is known of it."""
    version = _current(request)
    row = _row(version, id)
    return Whole(
        id=version.ids[row], text=version.texts[row], attributes=version.attributes_of(row)
    )


# -- users ---------------------------------------------------------------------------------------


def _people(request: Request, version: Version) -> People:
    kept = _kept(request)
    if version.run not in kept.people:
        kept.people = {version.run: People(version.run)}  # of one run at a time
    return kept.people[version.run]


@router.get("/v1/users", responses=_said(_503="Storage is away: see Retry-After"))
async def users(
    request: Request,
    q: Annotated[str, Query(max_length=MAX_QUERY, description="Of the id")] = "",
    limit: Annotated[int, Query(ge=1, le=MAX_FOUND)] = 10,
) -> Users:
    """Users with a history: those of the event log whose id begins with ``q``, then those of the
    data set that the run was made on whose id has it.
    """
    service, version = _service(request), _current(request)
    logged: list[str] = []
    incomplete = None
    try:
        logged = await service.stored("users", service.log.users, q, limit)
    except StorageError:
        incomplete = "the event log is away: its users are missing"
    found = [User(id=user, source="events", events=None) for user in logged]
    for user, events in await asyncio.to_thread(_people(request, version).find, q, limit):
        if user not in logged:
            found.append(User(id=user, source="data", events=events))
    return Users(users=found[:limit], incomplete=incomplete)


@router.get("/v1/users/{id:path}", responses=NOT_FOUND)
async def user(request: Request, id: Annotated[s.Id, InPath(examples=["42"])]) -> History:
    """The newest items of a user's history: of the event log, or else of the data set."""
    service, version = _service(request), _current(request)
    people = _people(request, version)
    away: StorageError | None = None
    try:
        logged = await service.stored("history", service.log.history, id, SHOWN)
        shown = _served(version, logged)
        if shown:
            return History(user=id, source="events", items=shown, next=None)
    except StorageError as error:
        away = error
    person = await asyncio.to_thread(people.get, id, SHOWN)
    if person is None:
        raise away or Refused(404, f"user {id!r} has no history here")
    newest = [] if person.next is None else _served(version, [person.next])
    return History(
        user=id,
        source="data",
        items=_served(version, person.history),
        next=newest[0] if newest else None,
    )


def _served(version: Version, ids: Sequence[str]) -> list[Item]:
    """Those of some items that the version has."""
    rows = [row for i in ids if (row := version.predictor.row_of(i)) is not None]
    return [_item(version, row) for row in rows if not version.hidden[row]]


# -- reasons -------------------------------------------------------------------------------------


@router.post("/v1/explain", responses=NOT_FOUND)
async def explain(request: Request, body: Explain) -> Reasons:
    """Why an item is ranked where it is: the gate, the experts, and the item's score without each
    item of the history.
    """
    service, version = _service(request), _current(request)
    predictor, kept = version.predictor, _kept(request)
    history = body.history
    rows = predictor.rows([history, [] if body.item is None else [body.item]])
    async with kept.explaining:  # one at a time, or a few would fill the model's queue
        everyone: list[v.User] = []
        of = x.variants(history)
        for start in range(0, len(of), TOGETHER):
            everyone += await service.users(version, of[start : start + TOGETHER])
        experts = await _experts(kept, service, version, history)
    if body.item is None:
        query = v.Query(version, everyone[0], 1, np.unique(rows[0]).astype(np.int64))
        best = await service.ranking.submit(query)
        if not len(best.rows):
            raise Refused(404, "every item is in the history: name the one to explain")
        row = int(best.rows[0])
    else:
        row = int(rows[1][0])
    one = np.array([row], dtype=np.int64)
    scores = [float(v.score(version, user, one)[0]) for user in everyone]
    without = x.effects(len(history), scores)
    whole = everyone[0]
    return Reasons(
        item=_item(version, row),
        score=scores[0],
        added=float(whole.added[whole.rows == row].sum()) if len(whole.rows) else None,
        gate=whole.gate,
        experts=None
        if experts is None
        else Experts(
            matrices=experts.matrices,
            labels=[x.label(name) for name in experts.matrices],
            shares=experts.shares,
        ),
        history=[
            Without(id=i, text=version.texts[int(n)], score=left)
            for i, n, left in zip(history, rows[0], without, strict=True)
        ],
        version=version.version,
    )


async def _experts(
    kept: _Kept, service: Service, version: Version, history: Sequence[str]
) -> x.Experts | None:
    key = (version.serial, tuple(history))
    if key not in kept.experts:
        kept.experts[key] = await service.worker.run(x.experts, version.predictor, history)
        while len(kept.experts) > KEPT:
            kept.experts.popitem(last=False)
    kept.experts.move_to_end(key)
    return kept.experts[key]
