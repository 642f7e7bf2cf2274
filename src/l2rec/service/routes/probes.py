"""Probes of a load balancer, and metrics.

- GET /livez: whether the process is alive
- GET /readyz: whether it can answer, by a real inference and a look into the event log
- GET /metrics: for Prometheus
"""

from __future__ import annotations

from fastapi import FastAPI, Response

from l2rec.service import schemas
from l2rec.service.routes.answers import READING, as_json
from l2rec.service.security import Refused
from l2rec.service.serving import Service


def probe_routes(app: FastAPI, service: Service) -> None:
    """Add the routes for a load balancer and for Prometheus."""

    @app.get("/livez", tags=["probes"], response_model=schemas.Status, responses=READING)
    async def livez() -> Response:
        """Say that the event loop runs; nothing else is checked."""
        return as_json({"status": "alive", "version": service.live.current().version})

    @app.get("/readyz", tags=["probes"], response_model=schemas.Status, responses=READING)
    async def readyz() -> Response:
        """Check a real inference in the models' thread, and the event log."""
        problems = await service.problems()
        if problems:
            raise Refused(503, "; ".join(problems), retry_after=1)
        return as_json({"status": "ready", "version": service.live.current().version})

    @app.get("/metrics", response_class=Response, responses=READING, tags=["probes"])
    async def metrics() -> Response:
        """Return all metrics in the text format of Prometheus."""
        text = "text/plain; version=0.0.4; charset=utf-8"
        return Response(service.metrics.text(), media_type=text)
