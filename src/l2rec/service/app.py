"""The service: routes over one `Live`, one event log and one thread for the models.

- POST /v1/recommend: ranked items for a user or a history
- POST /v1/embed/users, /v1/embed/items: vectors
- PUT, DELETE /v1/items: add, change, take out; it shows in the next request
- POST /v1/events: exposures, clicks, replies
- GET /v1/experiments/{name}: click and reply rates of both arms
- GET /livez, /readyz, /metrics: alive; a real inference; Prometheus
"""

from __future__ import annotations

__all__ = ["create_app"]

import asyncio
import contextlib
import json
import math
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
from fastapi import Depends, FastAPI, Query, Request, Response
from fastapi import Path as InPath
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from starlette.exceptions import HTTPException

from l2rec import __version__
from l2rec.errors import DataError, L2RecError, StorageError, nearest
from l2rec.service import schemas as s
from l2rec.service import version as v
from l2rec.service.batching import Busy
from l2rec.service.events import Event, EventLog
from l2rec.service.follow import Follower, Shadow, keep_in_sync
from l2rec.service.live import Live
from l2rec.service.routes import page
from l2rec.service.security import Guard, Refused, is_public, problem
from l2rec.service.serving import Service
from l2rec.service.settings import Experiment, Settings
from l2rec.service.version import User, Version
from l2rec.studies import abtest
from l2rec.studies.abtest import SHARE

RETRY_STORAGE = 5
SUMMARY_SECONDS, SUMMARIES = 60.0, 8


def _described(**texts: str) -> dict[int | str, dict[str, Any]]:
    return {int(code[1:]): {"model": s.Error, "description": text} for code, text in texts.items()}


ANY = _described(
    _400="Not JSON, too deep, or a name that this server does not answer to",
    _401="No key, or an unknown one",
    _408="The body came too slowly",
    _413="The body is too large",
    _415="The body is not application/json",
    _422="A value that is not allowed",
    _429="Too many requests: see Retry-After",
    _503="Overloaded, or storage is away: see Retry-After",
)
READING: dict[int | str, dict[str, Any]] = {code: ANY[code] for code in (400, 401, 422, 429, 503)}
NOT_FOUND = _described(_404="Unknown")
WRITING = ANY | _described(_403="A read key: a write key is needed")
CANNOT = _described(_409="The live model cannot do this")


def create_app(
    settings: Settings,
    live: Live,
    log: EventLog,
    *,
    follow: tuple[Path, Path, Path | None] | None = None,
) -> FastAPI:
    """The app over what is live and an event log; it closes the log when it ends.

    ``app.state`` has ``settings``, ``live``, ``log``, ``service``, ``metrics``, and ``worker``, the
    thread that everything of the models runs in.

    Args:
        follow: the folder whose live.json is followed, and the current and shadow runs held now.
    """
    service = Service(settings, live, log)
    shadow = Shadow(service)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(shadow.run())]
        if settings.sync:
            tasks.append(asyncio.create_task(keep_in_sync(service)))
        follower = None if follow is None else Follower(service, *follow)
        app.state.follower = follower
        if follower is not None:
            tasks.append(asyncio.create_task(follower.run()))
        yield
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if follower is not None:
            follower.close()
        await service.close()
        log.close()

    app = FastAPI(
        title="l2rec",
        version=__version__,
        description="Recommendations and embeddings of one live version of a model.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
        dependencies=[Depends(_known_query)],
    )
    app.state.settings, app.state.live, app.state.log = settings, live, log
    app.state.service, app.state.metrics = service, service.metrics
    app.state.worker, app.state.shadow = service.worker, shadow
    _rank_routes(app, service, shadow)
    _write_routes(app, service)
    _probe_routes(app, service)
    app.include_router(page.router, responses=ANY)
    app.mount("/static", page.static, name="static")
    _errors(app, service)
    _schema(app, settings)
    app.add_middleware(Guard, settings=settings, metrics=service.metrics)
    return app


async def _known_query(request: Request) -> None:
    """As bodies, queries have nothing that no route knows: a name with a typo is told."""
    if not request.query_params:
        return
    known = [field.alias for field in request.scope["route"].dependant.query_params]
    for name in request.query_params:
        if name not in known:
            raise Refused(422, f"{name[:64]!r}: no such parameter{nearest(name, known)}")


# -- recommend and embed -------------------------------------------------------------------------


def _rank_routes(app: FastAPI, service: Service, shadow: Shadow) -> None:
    settings, live, log, metrics = service.settings, service.live, service.log, service.metrics

    @app.post(
        "/v1/recommend",
        response_model=s.Recommended,
        responses=ANY | NOT_FOUND,
        tags=["recommend"],
    )
    async def recommend(body: s.Recommend, request: Request) -> Response:
        """The k best next items for a user or a history, best first."""
        started = time.perf_counter()
        arm = _arm(settings, body)
        version = live.of_arm(arm)
        history = body.history or await _history_of(str(body.user), version)
        version.attributes.check(body.filters)
        user = await service.user(version, history)
        query = _query(version, user, history, body)
        ranked = await service.ranking.submit(query)
        items = [
            {"id": version.ids[row], "score": score, "text": version.texts[row]}
            for row, score in zip(ranked.rows.tolist(), ranked.scores.tolist(), strict=True)
        ]
        if version is live.version and query.only is None:
            seen = history if body.exclude_seen else ()
            shadow.offer(history, (*seen, *body.deny), [item["id"] for item in items])
        name = arm or "none"
        metrics.recommendations.labels(name, version.version).inc()
        metrics.recommend_seconds.labels(name).observe(time.perf_counter() - started)
        return _json(
            {
                "items": items,
                "gate": user.gate,
                "version": version.version,
                "experiment": None
                if arm is None or settings.experiment is None
                else {"name": settings.experiment.name, "arm": arm},
                "request": request.scope["l2rec.request"],
            }
        )

    async def _history_of(user: str, version: Version) -> list[str]:
        found = await service.stored("history", log.history, user, s.MAX_HISTORY)
        known = [item for item in found if version.predictor.row_of(item) is not None]
        if not known:
            raise Refused(
                404, f"user {user!r} has no events yet: send some to /v1/events, or give a history"
            )
        return known

    @app.post("/v1/embed/users", response_model=s.Embedded, responses=ANY | CANNOT, tags=["embed"])
    async def embed_users(body: s.EmbedUsers) -> Response:
        """Unit vectors of histories."""
        version = live.current()
        if version.matrix is None:
            raise Refused(409, f"{version.name} has no vectors: its method only ranks")
        users = await service.users(version, body.histories)
        return _json(
            {"vectors": [user.vector.tolist() for user in users], "version": version.version}
        )

    @app.post("/v1/embed/items", response_model=s.Embedded, responses=ANY | CANNOT, tags=["embed"])
    async def embed_items(body: s.EmbedItems) -> Response:
        """Unit vectors of raw texts."""
        version = live.current()
        if version.matrix is None or not version.takes_new_items:
            raise Refused(409, f"{version.name} has no vectors of texts")
        vectors = await service.worker.run(version.embed_texts, body.texts)
        return _json({"vectors": vectors.tolist(), "version": version.version})


def _arm(settings: Settings, body: s.Recommend) -> str | None:
    """The arm of a user in the experiment that runs; None where there is none, or no user."""
    running = settings.experiment
    if body.experiment is not None:
        if running is None or body.experiment != running.name:
            known = "none runs" if running is None else f"{running.name!r} runs"
            raise Refused(404, f"no experiment {body.experiment!r} ({known})")
        if body.user is None:
            raise Refused(422, "experiment: arms are assigned to users, give a user")
    if running is None or body.user is None:
        return None
    return abtest.arm(body.user, running.name, salt=running.salt, treatment=running.treatment)


def _query(version: Version, user: User, history: Sequence[str], body: s.Recommend) -> v.Query:
    """What is listed and what is not, as rows of the version."""
    row_of = version.predictor.row_of
    left_out = (*body.deny, *history) if body.exclude_seen else body.deny
    without = {row for item in left_out if (row := row_of(item)) is not None}
    only = version.attributes.mask(body.filters) if body.filters else None
    if body.allow is not None:
        allowed = np.zeros(len(version), dtype=np.bool_)
        allowed[[row for item in body.allow if (row := row_of(item)) is not None]] = True
        only = allowed if only is None else only & allowed
    rows = np.fromiter(without, dtype=np.int64, count=len(without))
    return v.Query(version, user, body.k, rows, only)


# -- items, events, experiments ------------------------------------------------------------------


def _write_routes(app: FastAPI, service: Service) -> None:
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
        return _json({"items": len(items), "version": service.live.current().version})

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
        return _json({"items": len(id), "version": service.live.current().version})

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
        return _json({"stored": stored, "ignored": len(events) - stored})

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
        return _json(found)


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


# -- probes --------------------------------------------------------------------------------------


def _probe_routes(app: FastAPI, service: Service) -> None:
    @app.get("/livez", tags=["probes"], response_model=s.Status, responses=READING)
    async def livez() -> Response:
        """The event loop turns; nothing else is looked at."""
        return _json({"status": "alive", "version": service.live.current().version})

    @app.get("/readyz", tags=["probes"], response_model=s.Status, responses=READING)
    async def readyz() -> Response:
        """A real inference in the thread of the models, and the event log."""
        problems = await service.problems()
        if problems:
            raise Refused(503, "; ".join(problems), retry_after=1)
        return _json({"status": "ready", "version": service.live.current().version})

    @app.get("/metrics", response_class=Response, responses=READING, tags=["probes"])
    async def metrics() -> Response:
        """Everything that is counted, for Prometheus."""
        text = "text/plain; version=0.0.4; charset=utf-8"
        return Response(service.metrics.text(), media_type=text)


# -- errors and schema ---------------------------------------------------------------------------


def _errors(app: FastAPI, service: Service) -> None:
    """Every error is one line of JSON; what was not foreseen is the guard's."""
    metrics = service.metrics

    def answer(status: int, error: str, retry_after: float | None = None) -> Response:
        headers = {} if retry_after is None else {"Retry-After": str(math.ceil(retry_after))}
        return Response(problem(error), status, headers, media_type="application/json")

    @app.exception_handler(RequestValidationError)
    async def _invalid(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return answer(400, f"not JSON: {first.get('ctx', {}).get('error', '')}")
        where = ".".join(str(part) for part in first["loc"] if part not in ("body", "query"))
        text = first["msg"].removeprefix("Value error, ")
        return answer(422, f"{where}: {text}" if where else text)

    @app.exception_handler(HTTPException)
    async def _http(_: Request, error: HTTPException) -> Response:
        found = answer(error.status_code, str(error.detail))
        found.headers.update(error.headers or {})
        return found

    @app.exception_handler(Refused)
    async def _refused(_: Request, error: Refused) -> Response:
        return answer(error.status, error.error, error.retry_after)

    @app.exception_handler(Busy)
    async def _busy(_: Request, error: Busy) -> Response:
        metrics.refused.labels("queue").inc()
        return answer(503, str(error), error.retry_after)

    @app.exception_handler(L2RecError)
    async def _known(_: Request, error: L2RecError) -> Response:
        if isinstance(error, StorageError):
            return answer(503, str(error), RETRY_STORAGE)
        return answer(422 if isinstance(error, DataError) else 409, str(error))


def _schema(app: FastAPI, settings: Settings) -> None:
    """OpenAPI, with the key that each route needs where keys are."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(
                title=app.title,
                version=app.version,
                description=app.description,
                routes=app.routes,
            )
            if settings.secured:
                key = {"key": {"type": "http", "scheme": "bearer"}}
                schema.setdefault("components", {})["securitySchemes"] = key
                for path, methods in schema["paths"].items():
                    for method, operation in methods.items():
                        if not is_public(method.upper(), path):
                            operation["security"] = [{"key": []}]
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _json(value: Mapping[str, Any]) -> Response:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Response(text.encode("utf-8", "replace"), media_type="application/json")
