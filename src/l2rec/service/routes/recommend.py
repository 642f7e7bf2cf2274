"""Recommendations and embeddings.

- POST /v1/recommend: ranked items for a user or a history
- POST /v1/recommend/batch: the same for many
- POST /v1/embed/users: vectors of users or histories
- POST /v1/embed/items: vectors of texts
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from fastapi import FastAPI, Request, Response
from torch import Tensor

from l2rec.errors import DataError
from l2rec.service import schemas
from l2rec.service.attributes import Mask
from l2rec.service.audience import History, known_of
from l2rec.service.follow import Shadow
from l2rec.service.ranking import Query, User
from l2rec.service.routes.answers import ANY, CANNOT, NOT_FOUND, as_json, as_refused
from l2rec.service.routes.state import rows_of
from l2rec.service.security import Refused, current_key, problem
from l2rec.service.serving import Service
from l2rec.service.settings import Settings
from l2rec.service.version import Version
from l2rec.studies.arms import arm


@dataclass(frozen=True, eq=False)
class Asked:
    """A request for recommendations. filtering: the version by whose attributes is filtered.
    history: empty where nothing is known of the user.
    """

    body: schemas.Recommend
    version: Version
    filtering: Version
    arm: str | None
    history: History

    @property
    def ranked(self) -> bool:
        """Whether the version ranks for who asks; otherwise what is popular is listed."""
        return bool(self.history.items) or self.version.same_for_all


def rank_routes(app: FastAPI, service: Service, shadow: Shadow) -> None:
    """Add the routes that rank and embed."""
    settings, live, metrics = service.settings, service.live, service.metrics

    @app.post(
        "/v1/recommend",
        response_model=schemas.Recommended,
        responses=ANY | NOT_FOUND,
        tags=["recommend"],
    )
    async def recommend(body: schemas.Recommend, request: Request) -> Response:
        """Recommend the k best next items for a user or a history, best first; to those of whom
        nothing is known, what is popular.
        """
        started = time.perf_counter()
        asked = await _asked(body)
        user = await service.user(asked.version, asked.history.items) if asked.ranked else None
        answer = await _answer(asked, user, request.scope["l2rec.request"])
        metrics.recommend_seconds.labels(asked.arm or "none").observe(time.perf_counter() - started)
        return as_json(answer)

    @app.post(
        "/v1/recommend/batch",
        response_model=schemas.RecommendedMany,
        responses=ANY,
        tags=["recommend"],
    )
    async def recommend_many(body: schemas.RecommendMany, request: Request) -> Response:
        """Recommend to many users or histories at once: an answer for each, in their order, or what
        was wrong with it. When the server is busy, or storage is away, all are refused.
        """
        name = request.scope["l2rec.request"]
        asked = await asyncio.gather(*(_asked_or_refused(one) for one in body.requests))
        users: dict[int, User] = {}
        read = [one for one in asked if isinstance(one, Asked) and one.ranked]
        for version in dict.fromkeys(one.version for one in read):
            some = [one for one in read if one.version is version]
            found = await service.users(version, [one.history.items for one in some])
            users |= {id(one): user for one, user in zip(some, found, strict=True)}
        answered = iter(
            await asyncio.gather(
                *(_answer(one, users.get(id(one)), name) for one in asked if isinstance(one, Asked))
            )
        )
        answers = [
            next(answered)
            if isinstance(one, Asked)
            else json.loads(problem(one.status, one.error, name))
            for one in asked
        ]
        return as_json({"answers": answers})

    async def _asked_or_refused(body: schemas.Recommend) -> Asked | Refused:
        try:
            return await _asked(body)
        except (Refused, DataError) as error:
            return as_refused(error)

    async def _asked(body: schemas.Recommend) -> Asked:
        """Find out who asks, and for what.

        Raises:
            Refused, DataError: an unknown experiment, or an attribute or item that neither the live
                version nor that of the arm knows. StorageError.
        """
        arm = _arm(settings, body)
        version, latest = live.of_arm(arm), live.current()
        filtering = version if body.filters.keys() <= {*version.attributes.names} else latest
        filtering.attributes.check(body.filters)
        history = await service.audience.whose(version, latest, body)
        return Asked(body, version, filtering, arm, history)

    async def _answer(asked: Asked, user: User | None, request: str) -> dict[str, Any]:
        """Rank for a user; list what is popular for None, and where a search finds nothing."""
        body, version = asked.body, asked.version
        left_out = {*body.deny, *(asked.history.seen if body.exclude_seen else ())}
        without, only = rows_of(version, left_out), _only(asked)
        segment, gate, ranked = None, None, None
        if user is not None:
            query = Query(version, user, body.k, without, only)
            ranked = await service.ranking.submit(query, of=current_key())
            gate = user.gate
        fallback = ranked is None or (version.matrix is None and not len(ranked.rows))
        if ranked is None or fallback:
            popular = await service.audience.popular(version, body.segment, body.user)
            ranked = popular.best(body.k, version.hidden, without, only)
            segment = popular.segment
            metrics.fallbacks.labels("catalog" if segment is None else "segment").inc()
        items = [
            {"id": version.ids[row], "score": score, "text": version.texts[row]}
            for row, score in zip(ranked.rows.tolist(), ranked.scores.tolist(), strict=True)
        ]
        if version is live.version and only is None and user is not None:
            shadow.offer(asked.history.items, [*left_out], [item["id"] for item in items])
        metrics.recommendations.labels(asked.arm or "none", version.version).inc()
        running = settings.experiment
        return {
            "items": items,
            "gate": gate,
            "fallback": fallback,
            "segment": segment,
            "unknown": asked.history.unknown,
            "version": version.version,
            "experiment": None
            if asked.arm is None or running is None
            else {"name": running.name, "arm": asked.arm},
            "request": request,
        }

    @app.post(
        "/v1/embed/users",
        response_model=schemas.EmbeddedUsers,
        responses=ANY | NOT_FOUND | CANNOT,
        tags=["embed"],
    )
    async def embed_users(body: schemas.EmbedUsers) -> Response:
        """Embed users or histories: the vectors whose inner products with items' are the scores."""
        version = live.current()
        if version.matrix is None:
            raise Refused(409, f"{version.name} has no vectors: its method only ranks")
        histories, unknown = known_of(version, version, body.histories or [], body.unknown)
        if body.users is not None:
            histories = await _histories(version, body)
        found = iter(await service.users(version, [history for history in histories if history]))
        vectors = [next(found).vector if history else None for history in histories]
        return await _embedded(vectors, version, unknown=unknown)

    async def _histories(version: Version, body: schemas.EmbedUsers) -> list[list[str]]:
        """Read the histories of users; an empty one of whom nothing is known, if they are skipped.

        Raises:
            Refused: 404, nothing is known of some of them; all are named. StorageError.
        """
        users = body.users or []
        read = (service.audience.history(version, user, schemas.MAX_HISTORY) for user in users)
        histories = [known.items for known in await asyncio.gather(*read)]
        nobody = [user for user, items in zip(users, histories, strict=True) if not items]
        if nobody and body.unknown == "fail":
            named = ", ".join(map(repr, dict.fromkeys(nobody)))
            raise Refused(
                404, f'nothing is known of users {named} ("unknown": "skip" reads the others)'
            )
        return histories

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


async def _embedded(vectors: Sequence[Tensor | None], version: Version, **more: Any) -> Response:
    """Answer with vectors, which are written in a thread: they are many digits."""

    def written() -> Response:
        numbers = [None if vector is None else vector.tolist() for vector in vectors]
        return as_json({"vectors": numbers, **more, "version": version.version})

    return await asyncio.to_thread(written)


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


def _only(asked: Asked) -> Mask | None:
    """Return [N] bool of the rows of the version that alone may be listed, None for all."""
    body, version, filtering = asked.body, asked.version, asked.filtering
    only = filtering.attributes.mask(body.filters) if body.filters else None
    if only is not None and filtering is not version:
        matching = np.flatnonzero(only & ~filtering.hidden).tolist()
        only = _mask(version, [filtering.ids[row] for row in matching])
    if body.allow is not None:
        allowed = _mask(version, body.allow)
        only = allowed if only is None else only & allowed
    return only


def _mask(version: Version, items: Iterable[str]) -> Mask:
    """Return [N] bool of the rows of these ids; unknown ones are ignored."""
    mask = np.zeros(len(version), dtype=np.bool_)
    mask[rows_of(version, items)] = True
    return mask
