"""Recommendations and embeddings.

- POST /v1/recommend: ranked items for a user or a history
- POST /v1/embed/users: vectors of histories
- POST /v1/embed/items: vectors of texts
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

import numpy as np
from fastapi import FastAPI, Request, Response
from torch import Tensor

from l2rec.service import schemas
from l2rec.service.follow import Shadow
from l2rec.service.ranking import Query, User
from l2rec.service.routes.answers import ANY, CANNOT, NOT_FOUND, as_json
from l2rec.service.security import Refused, current_key
from l2rec.service.serving import Service
from l2rec.service.settings import Settings
from l2rec.service.version import Version
from l2rec.studies.arms import arm


def rank_routes(app: FastAPI, service: Service, shadow: Shadow) -> None:
    """Add the routes that rank and embed."""
    settings, live, log, metrics = service.settings, service.live, service.log, service.metrics

    @app.post(
        "/v1/recommend",
        response_model=schemas.Recommended,
        responses=ANY | NOT_FOUND,
        tags=["recommend"],
    )
    async def recommend(body: schemas.Recommend, request: Request) -> Response:
        """Recommend the k best next items for a user or a history, best first."""
        started = time.perf_counter()
        arm = _arm(settings, body)
        version = live.of_arm(arm)
        history = body.history or await _history_of(str(body.user), version)
        version.attributes.check(body.filters)
        user = await service.user(version, history)
        query = _query(version, user, history, body)
        ranked = await service.ranking.submit(query, of=current_key())
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
        return as_json(
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
        stored = await service.stored("history", log.history, user, schemas.MAX_HISTORY)
        known = [item for item in stored if version.predictor.row_of(item) is not None]
        if not known:
            raise Refused(
                404, f"user {user!r} has no events yet: send some to /v1/events, or give a history"
            )
        return known

    @app.post(
        "/v1/embed/users", response_model=schemas.Embedded, responses=ANY | CANNOT, tags=["embed"]
    )
    async def embed_users(body: schemas.EmbedUsers) -> Response:
        """Embed histories: the vectors whose inner products with items' are the scores."""
        version = live.current()
        if version.matrix is None:
            raise Refused(409, f"{version.name} has no vectors: its method only ranks")
        users = await service.users(version, body.histories)
        return await _embedded([user.vector for user in users], version)

    @app.post(
        "/v1/embed/items", response_model=schemas.Embedded, responses=ANY | CANNOT, tags=["embed"]
    )
    async def embed_items(body: schemas.EmbedItems) -> Response:
        """Embed raw texts as vectors of items."""
        version = live.current()
        if version.matrix is None or not version.takes_new_items:
            raise Refused(409, f"{version.name} has no vectors of texts")
        vectors = await service.vectors(version, body.texts)
        return await _embedded(vectors, version)


async def _embedded(vectors: Sequence[Tensor], version: Version) -> Response:
    """Answer with vectors, which are written in a thread: they are many digits."""
    return await asyncio.to_thread(
        lambda: as_json(
            {"vectors": [vector.tolist() for vector in vectors], "version": version.version}
        )
    )


def _arm(settings: Settings, body: schemas.Recommend) -> str | None:
    """Return the arm of a user in the running experiment; None without an experiment or a user."""
    running = settings.experiment
    if body.experiment is not None:
        if running is None or body.experiment != running.name:
            known = "none runs" if running is None else f"{running.name!r} runs"
            raise Refused(404, f"no experiment {body.experiment!r} ({known})")
        if body.user is None:
            raise Refused(422, "experiment: arms are assigned to users, give a user")
    if running is None or body.user is None:
        return None
    return arm(body.user, running.name, salt=running.salt, treatment=running.treatment)


def _query(version: Version, user: User, history: Sequence[str], body: schemas.Recommend) -> Query:
    """Translate what may be listed into rows of the version."""
    row_of = version.predictor.row_of
    left_out = (*body.deny, *history) if body.exclude_seen else body.deny
    without = {row for item in left_out if (row := row_of(item)) is not None}
    only = version.attributes.mask(body.filters) if body.filters else None
    if body.allow is not None:
        allowed = np.zeros(len(version), dtype=np.bool_)
        allowed[[row for item in body.allow if (row := row_of(item)) is not None]] = True
        only = allowed if only is None else only & allowed
    rows = np.fromiter(without, dtype=np.int64, count=len(without))
    return Query(version, user, body.k, rows, only)
