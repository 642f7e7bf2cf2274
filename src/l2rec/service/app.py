"""The app of a server: its routes, its errors as problem details, and its OpenAPI schema.

The routes are in routes/, one file for each kind; `Guard` stands before all of them.
"""

from __future__ import annotations

__all__ = ["create_app"]

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from starlette.exceptions import HTTPException

from l2rec._version import __version__
from l2rec.errors import L2RecError, nearest
from l2rec.service.batching import Busy
from l2rec.service.events import EventLog
from l2rec.service.follow import Follower, Shadow, keep_in_sync
from l2rec.service.live import Live
from l2rec.service.routes import browse, explain, operate, page
from l2rec.service.routes import live as live_routes
from l2rec.service.routes.answers import ANY, as_refused
from l2rec.service.routes.events import write_routes
from l2rec.service.routes.probes import probe_routes
from l2rec.service.routes.recommend import rank_routes
from l2rec.service.security import PROBLEM, Guard, Refused, is_public, problem
from l2rec.service.serving import Service
from l2rec.service.settings import Settings


def create_app(
    settings: Settings,
    live: Live,
    log: EventLog,
    *,
    follow: tuple[Path, Path, Path | None] | None = None,
) -> FastAPI:
    """Create the app over the live versions and an event log; it closes the log when it ends.

    ``app.state`` has ``settings``, ``live``, ``log``, ``service``, ``metrics``, ``shadow``,
    ``follower`` (None without ``follow``), and ``worker``, the thread that runs the models.

    Args:
        follow: folder whose live.json is followed, and the current and the shadow run of it that
            are loaded already.
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
    rank_routes(app, service, shadow)
    write_routes(app, service)
    probe_routes(app, service)
    app.include_router(page.router)
    for routes in (live_routes, browse, explain, operate):
        app.include_router(routes.router, responses=ANY)
    app.mount("/static", page.static, name="static")
    _errors(app, service)
    _schema(app, settings)
    app.add_middleware(Guard, settings=settings, metrics=service.metrics)
    return app


async def _known_query(request: Request) -> None:
    """Refuse a query parameter that the route does not have, as bodies refuse unknown fields.

    The page and the probes are exempt: links are shared with parameters of trackers, and load
    balancers add some of their own.
    """
    if not request.query_params or is_public(request.method, request.url.path):
        return
    known = [field.alias for field in request.scope["route"].dependant.query_params]
    for name in request.query_params:
        if name not in known:
            raise Refused(422, f"{name[:64]!r}: no such parameter{nearest(name, known)}")


# -- errors and schema ---------------------------------------------------------------------------


def _errors(app: FastAPI, service: Service) -> None:
    """Answer every error with problem details; the guard answers those that are not named here."""
    metrics = service.metrics

    def answer(
        request: Request, status: int, error: str, retry_after: float | None = None
    ) -> Response:
        headers = {} if retry_after is None else {"Retry-After": str(math.ceil(retry_after))}
        body = problem(status, error, request.scope["l2rec.request"])
        return Response(body, status, headers, media_type=PROBLEM)

    @app.exception_handler(RequestValidationError)
    async def _invalid(request: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return answer(request, 400, f"not JSON: {first.get('ctx', {}).get('error', '')}")
        where = ".".join(str(part) for part in first["loc"] if part not in ("body", "query"))
        text = first["msg"].removeprefix("Value error, ")
        return answer(request, 422, f"{where}: {text}" if where else text)

    @app.exception_handler(HTTPException)
    async def _http(request: Request, error: HTTPException) -> Response:
        response = answer(request, error.status_code, str(error.detail))
        response.headers.update(error.headers or {})
        return response

    async def _known(request: Request, error: Exception) -> Response:
        if isinstance(error, Busy):
            metrics.refused.labels("queue").inc()
        refused = as_refused(error)
        return answer(request, refused.status, refused.error, refused.retry_after)

    for known in (Refused, Busy, L2RecError):
        app.exception_handler(known)(_known)


def _schema(app: FastAPI, settings: Settings) -> None:
    """Describe the app in OpenAPI, with the key of each route where the server has keys."""

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
            for methods in schema["paths"].values():
                for operation in methods.values():
                    _as_problems(operation["responses"])
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]


def _as_problems(responses: dict[str, Any]) -> None:
    """Describe errors with their own media type."""
    for status, response in responses.items():
        if status >= "400" and "application/json" in response.get("content", {}):
            response["content"] = {PROBLEM: response["content"].pop("application/json")}
