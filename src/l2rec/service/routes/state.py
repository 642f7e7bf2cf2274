"""What the routes of the page share, and what they keep between requests."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import Request
from pydantic import BaseModel, ConfigDict

from l2rec.service import explain as x
from l2rec.service.search import Items, People
from l2rec.service.security import Refused
from l2rec.service.serving import Service
from l2rec.service.version import Version


def example(**value: Any) -> ConfigDict:
    """Give a schema its example."""
    return ConfigDict(json_schema_extra={"examples": [value]})


ITEM = {"id": "7", "text": "Solaris (1972), Sci-Fi"}
SCORES = {"recall@10": 0.0965, "ndcg@10": 0.0425, "mrr": 0.0422}


class Item(BaseModel):
    """One item of the catalog."""

    model_config = example(**ITEM)

    id: str
    text: str


@dataclass
class Kept:
    """What the routes of one app keep between requests."""

    items: Items | None = None
    people: dict[Path | None, People] = field(default_factory=dict)
    experts: OrderedDict[tuple[int, tuple[str, ...]], x.Experts | None] = field(
        default_factory=OrderedDict
    )
    preparing: asyncio.Lock = field(default_factory=asyncio.Lock)
    explaining: asyncio.Lock = field(default_factory=asyncio.Lock)


def service_of(request: Request) -> Service:
    """Return the service behind a request."""
    found: Service = request.app.state.service
    return found


def kept_of(request: Request) -> Kept:
    """Return what the routes of this app keep."""
    state = request.app.state
    if not hasattr(state, "page"):
        state.page = Kept()
    found: Kept = state.page
    return found


def current_version(request: Request) -> Version:
    """Return the live version."""
    return service_of(request).live.current()


def item_at(version: Version, row: int) -> Item:
    """Return the item of a row."""
    return Item(id=version.ids[row], text=version.texts[row])


def row_of(version: Version, item: str) -> int:
    """Return the row of an item that can be recommended; Refused, 404, for any other."""
    row = version.predictor.row_of(item)
    if row is None or version.hidden[row]:
        raise Refused(404, f"no item {item!r} in {version.name}")
    return row
