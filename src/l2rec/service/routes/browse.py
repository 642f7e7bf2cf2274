"""Items, neighbours, attributes and users, for the page.

- GET /v1/items: items by words or ids
- GET /v1/items/{id}: one item
- GET /v1/items/{id}/neighbours: the items with the nearest vectors
- GET /v1/attributes: what items can be filtered by
- GET /v1/users: users by id
- GET /v1/users/{id}: the history of one user
"""

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
from l2rec.service import schemas
from l2rec.service.routes.answers import CANNOT, NOT_FOUND, described
from l2rec.service.routes.state import (
    ITEM,
    Item,
    Memory,
    current_version,
    example,
    fields_of,
    item_at,
    memory_of,
    row_of,
    service_of,
)
from l2rec.service.search import Items
from l2rec.service.security import Refused
from l2rec.service.serving import Service
from l2rec.service.shown import facets
from l2rec.service.version import Version

router = APIRouter(tags=["page"])

MAX_LIMIT = 100
"""Items or users of one answer at most."""
MAX_OFFSET = 10_000_000
MAX_QUERY = 200
"""Characters of a query."""
SHOWN = 100
"""Newest items of a user's history that are returned."""

Source = Literal["events", "data"]
"""The event log (and what the data set has from before), or the data set of the run alone."""


class ItemDetails(Item):
    """One item with its attributes."""

    model_config = example(**ITEM, attributes={"genres": "Sci-Fi|Drama"})

    attributes: dict[str, str]


class ItemList(BaseModel):
    """A part of the items that were asked for. total: how many there are in all."""

    model_config = example(items=[ITEM], total=1)

    items: list[Item]
    total: int


class Neighbour(Item):
    """An item near another one. score: cosine of their vectors."""

    model_config = example(**ITEM, score=0.83)

    score: float


class Neighbours(BaseModel):
    """The neighbours of an item, nearest first."""

    model_config = example(items=[{**ITEM, "score": 0.83}], version="0f3a6d1c2b4e5f60")

    items: list[Neighbour]
    version: str


class AttributeValue(BaseModel):
    """A value of an attribute, and the number of items that have it."""

    value: str
    items: int


class Attribute(BaseModel):
    """An attribute that items can be filtered by. values: commonest first, without those too long
    for a label. total: how many values there are.
    """

    name: str
    values: list[AttributeValue]
    total: int


class AttributeList(BaseModel):
    """The attributes of the catalog, without titles, pictures and links."""

    model_config = example(
        attributes=[{"name": "class", "values": [{"value": "Drama", "items": 725}], "total": 19}]
    )

    attributes: list[Attribute]


class User(BaseModel):
    """A user with a history. source: the event log, or the data set of the run. events: their
    number, for a user of the data set.
    """

    model_config = example(id="42", source="data", events=57)

    id: str
    source: Source
    events: int | None


class Users(BaseModel):
    """Users, those of the event log first. ``incomplete``: why users may be missing."""

    model_config = example(users=[{"id": "42", "source": "data", "events": 57}], incomplete=None)

    users: list[User]
    incomplete: str | None


class History(BaseModel):
    """The history of a user, oldest first. ``next``: the newest event of a user of the data set;
    it is not among ``items``, and as the model was not trained on it, it shows how good a ranking
    is.
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
        list[schemas.Id],
        Query(max_length=schemas.MAX_HISTORY, description="These instead: `?id=a&id=b`"),
    ] = [],  # noqa: B006  FastAPI copies it
    limit: Annotated[int, Query(ge=1, le=MAX_LIMIT)] = 10,
    offset: Annotated[int, Query(ge=0, le=MAX_OFFSET)] = 0,
) -> ItemList:
    """List the items that have all the words of ``q`` in their text or id, best matches first;
    without words all items; with ``id`` the known ones of these ids, in that order, whatever the
    limit.
    """
    service, version = service_of(request), current_version(request)
    if id:
        known = [row for i in id if (row := version.predictor.row_of(i)) is not None]
        named = [item_at(service, version, row) for row in known if not version.hidden[row]]
        return ItemList(items=named, total=len(named))
    index = await _items_of(memory_of(request), version)
    rows = await asyncio.to_thread(index.find, version, q)
    part = [item_at(service, version, int(row)) for row in rows[offset : offset + limit]]
    return ItemList(items=part, total=len(rows))


async def _items_of(memory: Memory, version: Version) -> Items:
    """Return the search index: built once for each loading of a run, extended as items come."""
    async with memory.preparing:
        index = memory.items
        if index is None or index.serial != version.serial:
            index = Items(version.serial)
        if len(index) < len(version):
            await asyncio.to_thread(index.extend, version)
        memory.items = index
        return index


@router.get("/v1/items/{id:path}/neighbours", responses=NOT_FOUND | CANNOT)
async def neighbours(
    request: Request,
    id: Annotated[schemas.Id, InPath(examples=["50"])],
    k: Annotated[int, Query(ge=1, le=MAX_LIMIT)] = 10,
) -> Neighbours:
    """List the items whose vectors are nearest to an item's, by cosine."""
    version = current_version(request)
    of = row_of(version, id)
    if version.matrix is None:
        raise Refused(409, f"{version.name} has no item vectors: its method only ranks")
    near = await asyncio.to_thread(_nearest, version, of, k)
    service = service_of(request)
    listed = [Neighbour(**fields_of(service, version, row), score=cosine) for row, cosine in near]
    return Neighbours(items=listed, version=version.version)


def _nearest(version: Version, row: int, k: int) -> list[tuple[int, float]]:
    """Return (row, cosine) of the k nearest items, nearest first.

    Every row is scored: an index ranks by inner products, which are no cosines where vectors are
    not of unit length.
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
async def item(request: Request, id: Annotated[schemas.Id, InPath(examples=["50"])]) -> ItemDetails:
    """Return one item with its attributes."""
    version = current_version(request)
    row = row_of(version, id)
    fields = fields_of(service_of(request), version, row)
    return ItemDetails(**fields, attributes=version.attributes_of(row))


@router.get("/v1/attributes")
async def attributes(
    request: Request, limit: Annotated[int, Query(ge=1, le=MAX_LIMIT)] = 50
) -> AttributeList:
    """List the attributes that items can be filtered by, with their commonest values."""
    version, memory = current_version(request), memory_of(request)
    async with memory.preparing:
        if memory.filters is None or memory.filters[0] is not version:
            found = await asyncio.to_thread(facets, version.attributes, ~version.hidden, MAX_LIMIT)
            memory.filters = (version, found)
        known = memory.filters[1]
    return AttributeList(
        attributes=[
            Attribute(
                name=name,
                values=[AttributeValue(value=v, items=n) for v, n in values[:limit]],
                total=total,
            )
            for name, values, total in known
        ]
    )


@router.get("/v1/users", responses=described(_503="Storage is away: see Retry-After"))
async def users(
    request: Request,
    q: Annotated[str, Query(max_length=MAX_QUERY, description="Part of the id")] = "",
    limit: Annotated[int, Query(ge=1, le=MAX_LIMIT)] = 10,
) -> Users:
    """List users with a history: those of the event log whose id begins with ``q``, then those of
    the run's data set whose id contains it.
    """
    service, version = service_of(request), current_version(request)
    logged: list[str] = []
    incomplete = None
    try:
        logged = await service.stored("users", service.log.users, q, limit)
    except StorageError:
        incomplete = "the event log is away: its users are missing"
    listed = [User(id=user, source="events", events=None) for user in logged]
    for user, events in await asyncio.to_thread(service.audience.people(version).find, q, limit):
        if user not in logged:
            listed.append(User(id=user, source="data", events=events))
    return Users(users=listed[:limit], incomplete=incomplete)


@router.get("/v1/users/{id:path}", responses=NOT_FOUND)
async def user(request: Request, id: Annotated[schemas.Id, InPath(examples=["42"])]) -> History:
    """Return the newest items of a user's history: of the data set, and of the event log."""
    service, version = service_of(request), current_version(request)
    away: StorageError | None = None
    try:
        known = await service.audience.history(version, id, SHOWN)
        if known.logged:
            items = _served(service, version, known.items)
            return History(user=id, source="events", items=items, next=None)
    except StorageError as error:
        away = error
    person = await asyncio.to_thread(service.audience.people(version).get, id, SHOWN)
    if person is None:
        raise away or Refused(404, f"user {id!r} has no history here")
    newest = [] if person.next is None else _served(service, version, [person.next])
    return History(
        user=id,
        source="data",
        items=_served(service, version, person.history),
        next=newest[0] if newest else None,
    )


def _served(service: Service, version: Version, ids: Sequence[str]) -> list[Item]:
    """Return those of the items that the version can recommend."""
    rows = [row for i in ids if (row := version.predictor.row_of(i)) is not None]
    return [item_at(service, version, row) for row in rows if not version.hidden[row]]
