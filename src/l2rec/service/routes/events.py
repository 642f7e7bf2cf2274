"""Items, events, users and experiments.

- PUT /v1/items: add or change items
- DELETE /v1/items: take items out of all answers
- POST /v1/events: store exposures, clicks and replies
- PUT /v1/users: put users into segments
- GET /v1/experiments/{name}: click and reply rates of both arms
"""

from __future__ import annotations

import asyncio
import math
import time
from dataclasses import asdict
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.compute as pc
from fastapi import FastAPI, Query, Response
from fastapi import Path as InPath

from l2rec.errors import DataError
from l2rec.service import schemas
from l2rec.service.batching import Busy
from l2rec.service.events import Event, EventLog
from l2rec.service.routes.answers import CANNOT, NOT_FOUND, READING, WRITING, as_json
from l2rec.service.security import Refused
from l2rec.service.serving import Service
from l2rec.service.settings import Experiment

SUMMARY_SECONDS = 60.0
"""Age at which the summary of an experiment is computed anew."""
AHEAD = 86_400.0
"""Seconds that an event may be ahead of this server's clock; it would be the newest for so long."""
SUMMARIES = 8
"""Experiments that may be summarised at the same time."""


def write_routes(app: FastAPI, service: Service) -> None:
    """Add the routes that change items, store events and summarise experiments."""
    settings, log, metrics = service.settings, service.log, service.metrics

    @app.put("/v1/items", response_model=schemas.Put, responses=WRITING | CANNOT, tags=["items"])
    async def put_items(body: schemas.Items) -> Response:
        """Add items, or change those of the same id. They are on disk when this is answered, are
        recommended from the next request on, and survive restarts and deployments. An item whose
        text stays as it is keeps what the model has learned of it, whatever its attributes do.
        """
        items = {
            item.id: (
                item.text.strip(),
                {name: text for name, text in item.attributes.items() if text},
            )
            for item in body.items
        }
        changes = await service.put(items)
        version = service.live.current().version
        return as_json({"items": len(items), "version": version, "changes": changes})

    @app.delete(
        "/v1/items", response_model=schemas.Changed, responses=WRITING | NOT_FOUND, tags=["items"]
    )
    async def delete_items(
        id: Annotated[
            list[schemas.Id],
            Query(min_length=1, max_length=schemas.MAX_ITEMS, description="`?id=a&id=b`"),
        ],
    ) -> Response:
        """Take items out of all answers, from the next request on."""
        await service.delete(list(dict.fromkeys(id)))
        return as_json({"items": len(id), "version": service.live.current().version})

    @app.post("/v1/events", response_model=schemas.Stored, responses=WRITING, tags=["events"])
    async def post_events(body: schemas.Events) -> Response:
        """Store events. They are on disk when this is answered; ids seen before are ignored, so
        that it can be sent again.
        """
        now = time.time()
        for number, event in enumerate(body.events):
            if event.timestamp is not None and event.timestamp > now + AHEAD:
                raise Refused(
                    422,
                    f"events.{number}.timestamp: {event.timestamp:.0f} is more than a day ahead of "
                    "this server's clock; give seconds since 1970",
                )
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
        stored = await service.append(events)
        metrics.events.labels("stored").inc(stored)
        metrics.events.labels("ignored").inc(len(events) - stored)
        return as_json({"stored": stored, "ignored": len(events) - stored})

    @app.put("/v1/users", response_model=schemas.UsersPut, responses=WRITING, tags=["users"])
    async def put_users(body: schemas.UsersIn) -> Response:
        """Put users into segments: until something else is known of them, they are recommended
        what is popular there. They are on disk when this is answered.
        """
        segments = {user.id: user.segment for user in body.users}
        await service.stored("put_users", log.put_users, segments)
        return as_json({"users": len(segments)})

    # One summary of each name at a time, and one name after the other: each reads many events.
    summaries: dict[str, tuple[float, asyncio.Task[dict[str, Any] | None]]] = {}
    turn = asyncio.Lock()

    async def summarise(name: str) -> dict[str, Any] | None:
        async with turn:
            return await service.stored("read", _summary, log, settings.experiment, name)

    @app.get(
        "/v1/experiments/{name}",
        response_model=schemas.Summary,
        responses=READING | NOT_FOUND,
        tags=["experiments"],
    )
    async def experiment(
        name: Annotated[schemas.Name, InPath(examples=["exp"])],
    ) -> Response:
        """Compare both arms of an experiment: `l2rec abtest` on the stored events, at most a
        minute old. ``reason``: why there is no result yet.
        """
        at, task = summaries.get(name, (0.0, None))
        if task is None or _is_over(task, time.monotonic() - at):
            for old in [n for n, (_, other) in summaries.items() if other.done()]:
                del summaries[old]
            if len(summaries) >= SUMMARIES:
                raise Busy(f"{len(summaries)} experiments are being summed up")
            task = asyncio.ensure_future(summarise(name))
            task.add_done_callback(_retrieve)
            summaries[name] = (time.monotonic(), task)
        summary = await asyncio.shield(task)  # it continues for the next who asks
        if summary is None:
            raise Refused(404, f"no experiment {name!r}: none of that name runs or has events")
        return as_json(summary)


def _is_over(task: asyncio.Task[Any], age: float) -> bool:
    """Tell whether a summary is too old to be shown, or was not made: storage may be back."""
    return task.done() and (
        age > SUMMARY_SECONDS or task.cancelled() or task.exception() is not None
    )


def _retrieve(task: asyncio.Task[Any]) -> None:
    """Take note of an exception, so that asyncio does not warn where nobody awaits it."""
    if not task.cancelled():
        task.exception()


def _summary(log: EventLog, running: Experiment | None, name: str) -> dict[str, Any] | None:
    """Summarise an experiment; None where none of that name runs or has events."""
    runs = running is not None and running.name == name
    import polars as pl  # slow to import, as is what analyses: a server starts without them

    from l2rec.studies.abtest.analysis import analyze
    from l2rec.studies.abtest.users import DAY, PRE_DAYS

    plan = log.plans().get(name)
    batches = list(log.read(experiment=name))
    if not batches and not runs:
        return None
    share = None if plan is None else plan.treatment
    if running is not None and runs:
        share = running.treatment
    summary: dict[str, Any] = {"name": name, "running": runs, "treatment": share}
    summary["served"] = [] if plan is None else [asdict(one) for one in plan.served]
    summary |= {"events": sum(len(batch) for batch in batches), "result": None, "reason": None}
    if not batches:
        return summary | {"reason": "no events of it yet"}
    started = min(float(pc.min(batch["timestamp"]).as_py()) for batch in batches)
    recent = log.read(since=started - PRE_DAYS * DAY)
    table = pl.from_arrow(pa.Table.from_batches(list(recent)))
    assert isinstance(table, pl.DataFrame)
    try:
        return summary | {"result": _finite(analyze(table, name, treatment=share))}
    except DataError as error:
        return summary | {"reason": str(error)}


def _finite(value: Any) -> Any:
    """Replace numbers that are not finite by None, since JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
