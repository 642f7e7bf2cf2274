"""Items, events and experiments: what changes the log, and what is concluded from it."""

from __future__ import annotations

import asyncio
import math
import time
from typing import Annotated, Any

import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
from fastapi import FastAPI, Query, Response
from fastapi import Path as InPath

from l2rec.errors import DataError
from l2rec.service import schemas as s
from l2rec.service.batching import Busy
from l2rec.service.events import Event, EventLog
from l2rec.service.routes.answers import CANNOT, NOT_FOUND, READING, WRITING, as_json
from l2rec.service.security import Refused
from l2rec.service.serving import Service
from l2rec.service.settings import Experiment
from l2rec.studies import abtest
from l2rec.studies.abtest import SHARE

SUMMARY_SECONDS, SUMMARIES = 60.0, 8


def write_routes(app: FastAPI, service: Service) -> None:
    """Add the routes that change items and events, and sum experiments up."""
    settings, log, metrics = service.settings, service.log, service.metrics

    @app.put("/v1/items", response_model=s.Changed, responses=WRITING | CANNOT, tags=["items"])
    async def put_items(body: s.Items) -> Response:
        """Add items, or change those of the same id. They are on disk when this is answered, are
        recommended from the next request on, and survive restarts and deployments.
        """
        items = {
            item.id: (item.text, {name: text for name, text in item.attributes.items() if text})
            for item in body.items
        }
        await service.put(items)
        return as_json({"items": len(items), "version": service.live.current().version})

    @app.delete(
        "/v1/items", response_model=s.Changed, responses=WRITING | NOT_FOUND, tags=["items"]
    )
    async def delete_items(
        id: Annotated[
            list[s.Id],
            Query(min_length=1, max_length=s.MAX_ITEMS, description="`?id=a&id=b`"),
        ],
    ) -> Response:
        """Take items out of all answers, from the next request on."""
        await service.delete(list(dict.fromkeys(id)))
        return as_json({"items": len(id), "version": service.live.current().version})

    @app.post("/v1/events", response_model=s.Stored, responses=WRITING, tags=["events"])
    async def post_events(body: s.Events) -> Response:
        """Store events. They are on disk when this is answered; ids seen before are ignored, so
        that it can be sent again.
        """
        now = time.time()
        events = [
            Event(
                event.id,
                event.user,
                event.item,
                event.type,
                now if event.timestamp is None else event.timestamp,
                event.request,
                event.experiment,
                event.arm,
            )
            for event in body.events
        ]
        stored = await service.stored("append", log.append, events)
        metrics.events.labels("stored").inc(stored)
        metrics.events.labels("ignored").inc(len(events) - stored)
        return as_json({"stored": stored, "ignored": len(events) - stored})

    def share(name: str) -> float:
        """Planned for the treatment: of the experiment that runs here, else the default."""
        running = settings.experiment
        if running is not None and running.name == name:
            return running.treatment
        return SHARE

    # Of each name at most one is computed at a time, and all take turns: they read many events.
    summaries: dict[str, tuple[float, asyncio.Task[dict[str, Any] | None]]] = {}
    turn = asyncio.Lock()

    async def summarise(name: str) -> dict[str, Any] | None:
        async with turn:
            return await service.stored("read", _summary, log, settings.experiment, name)

    @app.get(
        "/v1/experiments/{name}",
        response_model=s.Summary,
        responses=READING | NOT_FOUND,
        tags=["experiments"],
    )
    async def experiment(
        name: Annotated[s.Name, InPath(examples=["exp"])],
    ) -> Response:
        """What both arms of an experiment did, and what may be concluded: `l2rec abtest` on the
        events stored, at most a minute old. ``reason``: why there is no result yet.
        """
        at, task = summaries.get(name, (0.0, None))
        if task is None or (task.done() and time.monotonic() - at > SUMMARY_SECONDS):
            for old in [n for n, (_, other) in summaries.items() if other.done()]:
                del summaries[old]
            if len(summaries) >= SUMMARIES:
                raise Busy(f"{len(summaries)} experiments are being summed up")
            task = asyncio.ensure_future(summarise(name))
            task.add_done_callback(_looked_at)
            summaries[name] = (time.monotonic(), task)
        found = await asyncio.shield(task)  # goes on without us, for who asks again
        if found is None:
            raise Refused(404, f"no experiment {name!r}: none of that name runs or has events")
        return as_json(found)


def _looked_at(task: asyncio.Task[Any]) -> None:
    if not task.cancelled():
        task.exception()


def _summary(log: EventLog, running: Experiment | None, name: str) -> dict[str, Any] | None:
    """The state of an experiment; None where none of that name runs or has events."""
    runs = running is not None and running.name == name
    share = running.treatment if running is not None and runs else abtest.SHARE
    own = list(log.read(experiment=name))
    if not own and not runs:
        return None
    found: dict[str, Any] = {"name": name, "running": runs, "treatment": share}
    found |= {"events": sum(len(batch) for batch in own), "result": None, "reason": None}
    if not own:
        return found | {"reason": "no events of it yet"}
    started = min(float(pc.min(batch["timestamp"]).as_py()) for batch in own)
    batches = log.read(since=started - abtest.PRE_DAYS * abtest.DAY)
    table = pl.from_arrow(pa.Table.from_batches(list(batches)))
    assert isinstance(table, pl.DataFrame)
    try:
        return found | {"result": _finite(abtest.analyze(table, name, treatment=share))}
    except DataError as error:
        return found | {"reason": str(error)}


def _finite(value: Any) -> Any:
    """JSON has no NaN: what is not a number is null."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
