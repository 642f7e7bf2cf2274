"""Parts that the routes of the page share: the service, the live version, and their memory."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from fastapi import Request
from pydantic import BaseModel, ConfigDict

from l2rec.service.attributes import Rows
from l2rec.service.explain import Experts
from l2rec.service.search import Items
from l2rec.service.security import Refused
from l2rec.service.serving import Service
from l2rec.service.shown import shown
from l2rec.service.version import Version


def example(**value: Any) -> ConfigDict:
    """Return the configuration of a schema with this example."""
    return ConfigDict(json_schema_extra={"examples": [value]})


ITEM = {
    "id": "7",
    "text": "Solaris (1972), Sci-Fi",
    "title": "Solaris",
    "labels": [{"name": "release_year", "value": "1972"}, {"name": "class", "value": "Sci-Fi"}],
    "image": None,
    "link": "https://example.com/solaris",
}
SCORES = {"recall@10": 0.0965, "ndcg@10": 0.0425, "mrr": 0.0422}


class Label(BaseModel):
    """One value of an attribute."""

    name: str
    value: str


class Item(BaseModel):
    """One item of the catalog. text: what the model reads. title, labels, image, link: what people
    see, from its attributes; image and link are addresses of the web.
    """

    model_config = example(**ITEM)

    id: str
    text: str
    title: str
    labels: list[Label]
    image: str | None
    link: str | None


@dataclass
class Memory:
    """Memory of the routes of one app between requests.

    items: search index of the live version. filters: what its items can be filtered by, and the
    version that this is of. experts: those of the histories explained last, by
    serial and history. preparing: a lock.
    """

    items: Items | None = None
    filters: tuple[Version, list[Any]] | None = None
    experts: OrderedDict[tuple[int, tuple[str, ...]], Experts | None] = field(
        default_factory=OrderedDict
    )
    preparing: asyncio.Lock = field(default_factory=asyncio.Lock)


def service_of(request: Request) -> Service:
    """Return the service behind a request."""
    service: Service = request.app.state.service
    return service


def memory_of(request: Request) -> Memory:
    """Return the memory of the routes of this app."""
    state = request.app.state
    if not hasattr(state, "page"):
        state.page = Memory()
    memory: Memory = state.page
    return memory


def current_version(request: Request) -> Version:
    """Return the live version."""
    return service_of(request).live.current()


def fields_of(service: Service, version: Version, row: int) -> dict[str, Any]:
    """Return the fields of an `Item`: of that of a row."""
    text = version.texts[row]
    seen = shown(version.attributes, row, text, service.settings.images)
    return {
        "id": version.ids[row],
        "text": text,
        "title": seen.title,
        "labels": [Label(name=name, value=value) for name, value in seen.labels],
        "image": seen.image,
        "link": seen.link,
    }


def item_at(service: Service, version: Version, row: int) -> Item:
    """Return the item of a row."""
    return Item(**fields_of(service, version, row))


def rows_of(version: Version, items: Iterable[str]) -> Rows:
    """Return the rows of ids, [n] int64; unknown ones are ignored."""
    rows = [row for item in items if (row := version.predictor.row_of(item)) is not None]
    return np.array(rows, dtype=np.int64)


def row_of(version: Version, item: str) -> int:
    """Return the row of an item that can be recommended.

    Raises:
        Refused: 404, for any other.
    """
    row = version.predictor.row_of(item)
    if row is None or version.hidden[row]:
        raise Refused(404, f"no item {item!r} in {version.name}")
    return row
