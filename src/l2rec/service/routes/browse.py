"""Items, neighbours and users, for the page."""

from __future__ import annotations

__all__ = ["router"]

import asyncio
from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
from fastapi import APIRouter, Query, Request
from fastapi import Path as InPath
from pydantic import BaseModel

from l2rec.errors import StorageError
from l2rec.service import schemas as s
from l2rec.service.routes.answers import CANNOT, NOT_FOUND, described
from l2rec.service.routes.state import (
    ITEM,
    Item,
    Kept,
    current_version,
    example,
    item_at,
    kept_of,
    row_of,
    service_of,
)
from l2rec.service.search import Items, People
from l2rec.service.security import Refused
from l2rec.service.version import Version

router = APIRouter(tags=["page"])

MAX_FOUND, MAX_OFFSET, MAX_QUERY = 100, 10_000_000, 200


SHOWN = 100
"""Newest items of a user's history that are handed out."""


class Whole(Item):
    """One item, and all that is known of it."""

    model_config = example(**ITEM, attributes={"genres": "Sci-Fi|Drama"})

    attributes: dict[str, str]


class Found(BaseModel):
    """Some of the items that were asked for, and how many there are in all."""

    model_config = example(items=[ITEM], total=1)

    items: list[Item]
    total: int


class Near(Item):
    """An item, and the cosine of its vector with that of another."""

    model_config = example(**ITEM, score=0.83)

    score: float


class Neighbours(BaseModel):
    """Nearest first."""

    model_config = example(items=[{**ITEM, "score": 0.83}], version="0f3a6d1c2b4e5f60")

    items: list[Near]
    version: str


Source = Literal["events", "data"]


class User(BaseModel):
    """Somebody with a history. source: the event log, or the data set of the run. events: how many
    there are of a user of the data set.
    """

    model_config = example(id="42", source="data", events=57)

    id: str
    source: Source
    events: int | None


class Users(BaseModel):
    """Those of the event log first. ``incomplete``: why users may be missing."""

    model_config = example(users=[{"id": "42", "source": "data", "events": 57}], incomplete=None)

    users: list[User]
    incomplete: str | None


class History(BaseModel):
    """Oldest first. ``next``: the newest event of a user of the data set. It is not among
    ``items``, and the model was not trained on it: it shows how good a ranking is.
    """

    model_config = example(user="42", source="data", items=[ITEM], next=ITEM)

    user: str
    source: Source
    items: list[Item]
    next: Item | None


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
    version = current_version(request)
    if id:
        known = [row for i in id if (row := version.predictor.row_of(i)) is not None]
        some = [item_at(version, row) for row in known if not version.hidden[row]]
        return Found(items=some, total=len(some))
    index = await _items_of(kept_of(request), version)
    rows = await asyncio.to_thread(index.find, version, q)
    some = [item_at(version, int(row)) for row in rows[offset : offset + limit]]
    return Found(items=some, total=len(rows))


async def _items_of(kept: Kept, version: Version) -> Items:
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
    version = current_version(request)
    row = row_of(version, id)
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
    version = current_version(request)
    row = row_of(version, id)
    return Whole(
        id=version.ids[row], text=version.texts[row], attributes=version.attributes_of(row)
    )


def _people(request: Request, version: Version) -> People:
    kept = kept_of(request)
    if version.run not in kept.people:
        kept.people = {version.run: People(version.run)}  # of one run at a time
    return kept.people[version.run]


@router.get("/v1/users", responses=described(_503="Storage is away: see Retry-After"))
async def users(
    request: Request,
    q: Annotated[str, Query(max_length=MAX_QUERY, description="Of the id")] = "",
    limit: Annotated[int, Query(ge=1, le=MAX_FOUND)] = 10,
) -> Users:
    """Users with a history: those of the event log whose id begins with ``q``, then those of the
    data set that the run was made on whose id has it.
    """
    service, version = service_of(request), current_version(request)
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
    service, version = service_of(request), current_version(request)
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
    return [item_at(version, row) for row in rows if not version.hidden[row]]
