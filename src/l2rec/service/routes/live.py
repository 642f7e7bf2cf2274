"""GET /v1/live: the live version, its scores, and the versions beside it."""

from __future__ import annotations

__all__ = ["router"]

import math
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel

from l2rec.protocols import Inspectable
from l2rec.service.routes.state import SCORES, example, service_of
from l2rec.service.security import current_writer
from l2rec.service.version import Version

router = APIRouter(tags=["page"])


class OtherVersion(BaseModel):
    """A version that is loaded beside the live one."""

    name: str
    version: str


class Data(BaseModel):
    """The data set that a run was made on."""

    name: str
    fingerprint: str
    users: int
    items: int
    events: int


class Running(BaseModel):
    """The experiment that runs, and the share of users that is served the live version."""

    name: str
    treatment: float


class RefusedRun(BaseModel):
    """The last candidate that was refused."""

    run: str
    reason: str
    at: float


class Abilities(BaseModel):
    """Questions that this version can answer."""

    gate: bool
    experts: bool
    neighbours: bool


class State(BaseModel):
    """The live version. scores: on the test split, of the model (first) and of the floors beside
    it. items: number that can be recommended; added: rows that came since it was loaded.
    may_write: whether whoever asks may also change things.
    """

    model_config = example(
        name="ml",
        version="0f3a6d1c2b4e5f60",
        loaded_at=1767225600.0,
        method="L2Rec",
        recipe="movielens-100k/l2rec-plus",
        data={
            "name": "ml-100k",
            "fingerprint": "ffc605ffa7f72d8a",
            "users": 943,
            "items": 1682,
            "events": 100000,
        },
        scores={"L2Rec": SCORES},
        items=1682,
        added=0,
        index="exact",
        can={"gate": True, "experts": True, "neighbours": True},
        experiment=None,
        control=None,
        shadow=None,
        refused=None,
        may_write=False,
    )

    name: str
    version: str
    loaded_at: float
    method: str | None
    recipe: str | None
    data: Data | None
    scores: dict[str, dict[str, float]]
    items: int
    added: int
    index: str | None
    can: Abilities
    experiment: Running | None
    control: OtherVersion | None
    shadow: OtherVersion | None
    refused: RefusedRun | None
    may_write: bool


@router.get("/v1/live")
async def live(request: Request) -> State:
    """Return the live version, its scores on the test split, and the versions beside it."""
    service = service_of(request)
    version, running = service.live.current(), service.settings.experiment
    report, model = version.report, version.predictor.model
    inspectable = model if isinstance(model, Inspectable) else None
    refused = service.live.status()["refused"]
    method, data = report.get("method"), report.get("dataset")
    scores = {
        name: {key: float(value) for key, value in values.items() if _is_number(value)}
        for name, values in report.get("scores", {}).items()
    }
    return State(
        name=version.name,
        version=version.version,
        loaded_at=version.loaded_at,
        method=method,
        recipe=report.get("recipe") or None,
        data=None if data is None else Data.model_validate(data),
        scores=dict(sorted(scores.items(), key=lambda pair: pair[0] != method)),
        items=int((~version.hidden).sum()),
        added=len(version) - version.loaded if version.loaded else 0,
        index=None if version.index is None else version.index.kind,
        can=Abilities(
            gate=inspectable is not None and inspectable.has_gate,
            experts=inspectable is not None and inspectable.has_experts,
            neighbours=version.matrix is not None,
        ),
        experiment=None
        if running is None
        else Running(name=running.name, treatment=running.treatment),
        control=_named(service.live.control),
        shadow=_named(service.live.shadow),
        refused=None if not refused else RefusedRun.model_validate(refused),
        may_write=current_writer() is not None,
    )


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _named(version: Version | None) -> OtherVersion | None:
    return None if version is None else OtherVersion(name=version.name, version=version.version)
