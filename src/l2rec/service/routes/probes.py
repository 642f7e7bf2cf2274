"""Liveness, readiness and metrics."""

from __future__ import annotations

from fastapi import FastAPI, Response

from l2rec.service import schemas as s
from l2rec.service.routes.answers import READING, as_json
from l2rec.service.security import Refused
from l2rec.service.serving import Service


def probe_routes(app: FastAPI, service: Service) -> None:
    """Add the routes that a load balancer and Prometheus ask."""

    @app.get("/livez", tags=["probes"], response_model=s.Status, responses=READING)
    async def livez() -> Response:
        """The event loop turns; nothing else is looked at."""
        return as_json({"status": "alive", "version": service.live.current().version})

    @app.get("/readyz", tags=["probes"], response_model=s.Status, responses=READING)
    async def readyz() -> Response:
        """A real inference in the thread of the models, and the event log."""
        problems = await service.problems()
        if problems:
            raise Refused(503, "; ".join(problems), retry_after=1)
        return as_json({"status": "ready", "version": service.live.current().version})

    @app.get("/metrics", response_class=Response, responses=READING, tags=["probes"])
    async def metrics() -> Response:
        """Everything that is counted, for Prometheus."""
        text = "text/plain; version=0.0.4; charset=utf-8"
        return Response(service.metrics.text(), media_type=text)
