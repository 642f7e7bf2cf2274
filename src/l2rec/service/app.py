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
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from torch import Tensor

from l2rec import __version__
from l2rec.data.ragged import Ragged
from l2rec.errors import ConfigError, DataError, L2RecError
from l2rec.service import schemas as s
from l2rec.service import version as v
from l2rec.service.batching import Batcher, Busy, Worker
from l2rec.service.live import Live
from l2rec.service.metrics import Metrics
from l2rec.service.security import Guard, Refused, problem
from l2rec.service.settings import Settings
from l2rec.service.version import Ranked, Version, rank

if TYPE_CHECKING:
    from l2rec.service.events import EventLog

T = TypeVar("T")

ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": s.Error, "description": "Not JSON, too deep, or not for this host"},
    401: {"model": s.Error, "description": "No key, or an unknown one"},
    408: {"model": s.Error, "description": "The body came too slowly"},
    413: {"model": s.Error, "description": "The body is too large"},
    415: {"model": s.Error, "description": "The body is not application/json"},
    422: {"model": s.Error, "description": "A value that is not allowed"},
    429: {"model": s.Error, "description": "Too many requests; see Retry-After"},
    503: {"model": s.Error, "description": "Overloaded, or storage is away; see Retry-After"},
}
NOT_FOUND: dict[int | str, dict[str, Any]] = {404: {"model": s.Error, "description": "Unknown"}}
FORBIDDEN: dict[int | str, dict[str, Any]] = {
    403: {"model": s.Error, "description": "A write key is needed"}
}
CONFLICT: dict[int | str, dict[str, Any]] = {
    409: {"model": s.Error, "description": "The live model cannot do this"}
}


@dataclass(frozen=True)
class _Encode:
    """One history, to be encoded by one version."""

    version: Version
    row: np.ndarray[Any, np.dtype[np.int32]]


@dataclass(frozen=True)
class User:
    """vector: [D], or [N] scores of a method that only ranks. gate: of Eq. 7, if there is one."""

    vector: Tensor
    gate: float | None


def _encode(jobs: Sequence[_Encode]) -> list[User]:
    """Histories -> users, those of one model together."""
    found: list[User | None] = [None] * len(jobs)
    groups: dict[int, list[int]] = {}
    for number, job in enumerate(jobs):
        groups.setdefault(id(job.version), []).append(number)
    for numbers in groups.values():
        predictor = jobs[numbers[0]].version.predictor
        vectors, gates = predictor.users(Ragged.from_rows([jobs[n].row for n in numbers]))
        vectors = vectors.float().cpu()
        for at, number in enumerate(numbers):
            found[number] = User(vectors[at].clone(), gates[at])
    return [user for user in found if user is not None]


class Service:
    """What the routes share: the threads, the batches and the cache.

    ``worker``: the thread of all models that serve; whatever else runs a model, such as an
    explanation, runs there too: ``await service.worker.run(function, ...)``.
    """

    def __init__(self, settings: Settings, live: Live, log: EventLog) -> None:
        self.settings, self.live, self.log = settings, live, log
        self.metrics = Metrics()
        self.worker = Worker("model", limit=settings.queue)
        self.ranker = Worker("ranking", limit=settings.inflight)
        self.storage = ThreadPoolExecutor(4, thread_name_prefix="l2rec-storage")
        self.encoding: Batcher[_Encode, User] = Batcher(
            _encode,
            self.worker,
            max_cost=settings.batch_tokens,
            max_wait=settings.batch_ms / 1000,
            limit=settings.queue,
            observe=self._batched,
        )
        self.ranking: Batcher[v.Query, Ranked] = Batcher(
            rank, self.ranker, max_cost=256, max_wait=0.0, limit=settings.inflight
        )
        self.cache: OrderedDict[tuple[int, bytes], User] = OrderedDict()
        self.changing = asyncio.Lock()
        """Held by whoever makes a version out of the live one and puts it in its place."""
        self.metrics.gauge(
            "l2rec_queue_histories", "Histories that wait.", lambda: len(self.encoding)
        )
        self.metrics.gauge(
            "l2rec_user_cache_entries", "User vectors kept.", lambda: len(self.cache)
        )
        self.metrics.held(live.all())

    def _batched(self, jobs: int, tokens: int, waited: float) -> None:
        self.metrics.batch_jobs.observe(jobs)
        self.metrics.batch_tokens.observe(tokens)
        self.metrics.batch_wait.observe(waited)

    async def user(self, version: Version, history: Sequence[str]) -> User:
        """A history of known ids, encoded now or before.

        Raises:
            DataError: unknown ids, all named. Busy: the queue is full.
        """
        rows = version.predictor.rows([history])
        key = (version.serial, rows.values.tobytes())
        known = self.cache.get(key)
        if known is not None:
            self.cache.move_to_end(key)
            self.metrics.cache.labels("hit").inc()
            return known
        self.metrics.cache.labels("miss").inc()
        cost = int(version.predictor.costs(rows)[0])
        user = await self.encoding.submit(_Encode(version, rows[0].astype(np.int32)), cost)
        if self.settings.cache:
            self.cache[key] = user
            while len(self.cache) > self.settings.cache:
                self.cache.popitem(last=False)
        return user

    async def stored(self, call: str, function: Callable[..., T], *args: Any) -> T:
        """A call of the event log, in a thread of its own; failures are counted."""
        try:
            return await asyncio.get_running_loop().run_in_executor(
                self.storage, lambda: function(*args)
            )
        except Exception:
            self.metrics.storage_failures.labels(call).inc()
            raise

    async def close(self) -> None:
        await self.encoding.close()
        await self.ranking.close()
        self.worker.close()
        self.ranker.close()
        self.storage.shutdown(wait=True)


def create_app(settings: Settings, live: Live, log: EventLog) -> FastAPI:
    """The app over a live version and an event log; it closes the log when it ends.

    ``app.state``: ``settings``, ``live``, ``log``, ``service``, ``metrics``, and ``worker``, the
    thread that everything of the models runs in.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await app.state.service.close()
        log.close()

    app = FastAPI(
        title="l2rec",
        version=__version__,
        description="Recommendations and embeddings of one live version of a model.",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    service = Service(settings, live, log)
    app.state.settings, app.state.live, app.state.log = settings, live, log
    app.state.service, app.state.metrics = service, service.metrics
    app.state.worker = service.worker
    _routes(app, service)
    _errors(app, service.metrics)
    app.add_middleware(Guard, settings=settings, observe=service.metrics.answered)
    return app


def _errors(app: FastAPI, metrics: Metrics) -> None:
    def answer(status: int, error: str, retry_after: int | None = None) -> Response:
        headers = {} if retry_after is None else {"Retry-After": str(retry_after)}
        return Response(problem(error), status, headers, media_type="application/json")

    @app.exception_handler(RequestValidationError)
    async def _invalid(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return answer(400, f"not JSON: {first.get('ctx', {}).get('error', '')}")
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        text = first["msg"].removeprefix("Value error, ")
        return answer(422, f"{where}: {text}" if where else text)

    @app.exception_handler(HTTPException)
    async def _http(_: Request, error: HTTPException) -> Response:
        return answer(error.status_code, str(error.detail))

    @app.exception_handler(Refused)
    async def _refused(_: Request, error: Refused) -> Response:
        wait = None if error.retry_after is None else max(1, round(error.retry_after))
        return answer(error.status, error.error, wait)

    @app.exception_handler(Busy)
    async def _busy(_: Request, error: Busy) -> Response:
        metrics.refused.labels("queue").inc()
        return answer(503, str(error), error.retry_after)

    @app.exception_handler(TimeoutError)
    async def _late(_: Request, error: TimeoutError) -> Response:
        metrics.refused.labels("timeout").inc()
        return answer(503, "it took too long; try again", 1)

    @app.exception_handler(L2RecError)
    async def _known(_: Request, error: L2RecError) -> Response:
        if isinstance(error, DataError):
            return answer(422, str(error))
        if isinstance(error, ConfigError):
            return answer(409, str(error))
        return answer(503, str(error), 5)


def _routes(app: FastAPI, service: Service) -> None:
    settings, live, log, metrics = service.settings, service.live, service.log, service.metrics

    @app.post(
        "/v1/recommend", response_model=s.Recommended, responses=ERRORS | NOT_FOUND, tags=["rank"]
    )
    async def recommend(body: s.Recommend, request: Request) -> Response:
        """The k best next items, best first."""
        started = time.perf_counter()
        arm: str | None = None
        version = live.of_arm(arm)
        async with asyncio.timeout(settings.timeout):
            history = body.history
            if history is None:
                assert body.user is not None
                history = await _history_of(body.user, version)
            version.attributes.check(body.filters)
            user = await service.user(version, history)
            ranked = await service.ranking.submit(_query(version, user, history, body))
        name = arm or "none"
        metrics.recommendations.labels(name, version.version).inc()
        metrics.recommend_seconds.labels(name).observe(time.perf_counter() - started)
        return _json(
            {
                "items": [
                    {"id": version.ids[row], "score": score, "text": version.texts[row]}
                    for row, score in zip(ranked.rows.tolist(), ranked.scores.tolist(), strict=True)
                ],
                "gate": user.gate,
                "version": version.version,
                "experiment": None,
                "request": request.scope.get("l2rec.request", ""),
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

    @app.post(
        "/v1/embed/users", response_model=s.Embedded, responses=ERRORS | CONFLICT, tags=["embed"]
    )
    async def embed_users(body: s.EmbedUsers) -> Response:
        """Unit vectors of histories."""
        version = live.current()
        if version.matrix is None:
            raise Refused(409, f"{version.name} has no vectors: its method only ranks")
        async with asyncio.timeout(settings.timeout):
            users = await asyncio.gather(*(service.user(version, h) for h in body.histories))
        return _json(
            {"vectors": [user.vector.tolist() for user in users], "version": version.version}
        )

    @app.post(
        "/v1/embed/items", response_model=s.Embedded, responses=ERRORS | CONFLICT, tags=["embed"]
    )
    async def embed_items(body: s.EmbedItems) -> Response:
        """Unit vectors of raw texts."""
        version = live.current()
        if version.matrix is None or not version.takes_new_items:
            raise Refused(409, f"{version.name} reads no texts: embed items of its catalog offline")
        async with asyncio.timeout(settings.timeout):
            rows = await service.worker.run(version.predictor.encode_items, body.texts)
        return _json({"vectors": rows.float().cpu().tolist(), "version": version.version})

    @app.get("/livez", tags=["probe"])
    async def livez() -> dict[str, str]:
        """The event loop turns; nothing else is looked at."""
        return {"status": "alive"}

    @app.get("/metrics", response_class=Response, responses={401: ERRORS[401]}, tags=["probe"])
    async def prometheus() -> Response:
        """Everything that is counted, for Prometheus."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _query(version: Version, user: User, history: Sequence[str], body: s.Recommend) -> v.Query:
    """What is listed and what is not, as rows of the version."""
    row_of = version.predictor.row_of
    without = {row for item in body.deny if (row := row_of(item)) is not None}
    if body.exclude_seen:
        without.update(row for item in history if (row := row_of(item)) is not None)
    only = version.attributes.mask(body.filters) if body.filters else None
    if body.allow is not None:
        allowed = np.zeros(len(version), dtype=np.bool_)
        allowed[[row for item in body.allow if (row := row_of(item)) is not None]] = True
        only = allowed if only is None else only & allowed
    rows = np.fromiter(without, dtype=np.int64, count=len(without))
    return v.Query(version, user.vector, body.k, rows, only)


def _json(value: Mapping[str, Any]) -> Response:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    return Response(text.encode("utf-8", "replace"), media_type="application/json")
