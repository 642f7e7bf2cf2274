"""What an operator looks at beside the metrics, and the one thing to do about it.

- GET /v1/failures: the newest requests that were answered with an error
- GET /v1/deployments: what is deployed, and who changed that and when
- POST /v1/deployments/rollback: serve the run before again
"""

from __future__ import annotations

__all__ = ["router"]

import asyncio
import contextlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict

from l2rec.errors import L2RecError
from l2rec.service import live, schemas
from l2rec.service.live import Action
from l2rec.service.metrics import Failure
from l2rec.service.routes.answers import CANNOT, WRITING
from l2rec.service.routes.state import example, service_of
from l2rec.service.security import Refused, current_writer

router = APIRouter(tags=["operations"])

STEP = {
    "at": 1767225600.0,
    "by": "ada@build-3",
    "action": "deploy",
    "run": "ml-tuesday",
    "version": "0f3a6d1c2b4e5f60",
}


class Failures(BaseModel):
    """The newest requests that failed, newest first."""

    model_config = example(
        failures=[
            {
                "at": 1767225600.0,
                "method": "POST",
                "route": "/v1/recommend",
                "status": 422,
                "detail": "unknown item ids: 'sold-out'",
                "request": "9f0c8b7a6d5e4f3a2b1c0d9e8f7a6b5c",
            }
        ]
    )

    failures: list[Failure]


class Run(BaseModel):
    """A run. version: hash of its tensors when it was deployed; null where that is not known."""

    run: str
    version: str | None


class Step(Run):
    """A change of what is served. at: unix seconds. by: the user and machine of a command, or who
    sent a request.
    """

    at: float
    by: str
    action: Action


class Deployments(BaseModel):
    """What is deployed. current: what live.json names, which is not live yet while it is loaded, or
    if it was refused; null where one run folder is served, and nothing can be deployed. previous:
    runs that were current before, newest first. steps: changes, newest first.
    """

    model_config = example(
        current={"run": "ml-tuesday", "version": "0f3a6d1c2b4e5f60"},
        previous=[{"run": "ml", "version": "5e0d1c2b3a495867"}],
        shadow=None,
        steps=[STEP],
    )

    current: Run | None
    previous: list[Run]
    shadow: Run | None
    steps: list[Step]


class RollBack(schemas.Closed):
    """The run to leave, as `GET /v1/deployments` has it in ``current``, so that two who ask at once
    go back only once.
    """

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"run": "ml-tuesday", "version": "0f3a6d1c2b4e5f60"}]}
    )

    run: schemas.Id
    version: schemas.Id | None


class RolledBack(Run):
    """The run that is the current one now: a server of the folder loads it, and then serves it."""

    model_config = example(run="ml", version="5e0d1c2b3a495867")


@router.get("/v1/failures")
async def failures(request: Request) -> Failures:
    """List the newest requests that were answered with an error, by this process."""
    newest = reversed(service_of(request).metrics.failures)
    return Failures(failures=list(newest))


@router.get("/v1/deployments", responses=CANNOT)
async def deployments(request: Request) -> Deployments:
    """Return what is deployed in the folder that is served, and who changed that and when."""
    folder = service_of(request).live.folder
    if folder is None:
        return Deployments(current=None, previous=[], shadow=None, steps=[])

    def read() -> live.Deployment:
        assert folder is not None
        with _by_name(folder):
            return live.read_deployment(folder)

    known = await asyncio.to_thread(read)

    def run(path: Path) -> Run:
        return Run(run=path.name, version=known.expected(path))

    return Deployments(
        current=run(known.current),
        previous=[run(path) for path in known.previous],
        shadow=None if known.shadow is None else run(known.shadow),
        steps=[Step(**asdict(step) | {"run": Path(step.run).name}) for step in known.steps],
    )


@router.post("/v1/deployments/rollback", responses=WRITING | CANNOT)
async def rollback(request: Request, body: RollBack) -> RolledBack:
    """Make the run before the current one again. The answer does not wait until it is loaded: see
    `GET /v1/live` for what is served, and for a run that was refused.
    """
    folder = service_of(request).live.folder
    if folder is None:
        raise Refused(409, "one run folder is served; only what was deployed can be rolled back")

    def change() -> RolledBack:
        assert folder is not None
        leaving = (body.run, body.version)
        with _by_name(folder):
            new = live.rollback(folder, leaving=leaving, by=current_writer(), check=False)
        return RolledBack(run=new.current.name, version=new.expected(new.current))

    done = await asyncio.to_thread(change)
    follower = request.app.state.follower
    if follower is not None:
        follower.poke()
    return done


@contextlib.contextmanager
def _by_name(folder: Path) -> Iterator[None]:
    """Let errors name a folder and its runs without their paths."""
    try:
        yield
    except L2RecError as error:
        paths = [folder]
        with contextlib.suppress(L2RecError):
            known = live.read_deployment(folder)
            paths = [known.current, *known.previous, folder]
        raise type(error)(live.by_name(str(error), *paths)) from error
