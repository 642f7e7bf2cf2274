"""Answers of the routes: their errors, for OpenAPI, and JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fastapi import Response

from l2rec.errors import DataError, StorageError
from l2rec.service import schemas
from l2rec.service.batching import Busy
from l2rec.service.security import Refused


def described(**texts: str) -> dict[int | str, dict[str, Any]]:
    """Describe answers by status, ``_404=...``, for OpenAPI."""
    return {
        int(code[1:]): {"model": schemas.Problem, "description": text}
        for code, text in texts.items()
    }


ANY = described(
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
NOT_FOUND = described(_404="Unknown")
WRITING = ANY | described(_403="A read key: a write key is needed")
CANNOT = described(_409="The live model cannot do this")


RETRY_STORAGE = 5
"""Seconds until a request may come again whose storage was away."""


def as_refused(error: Exception) -> Refused:
    """Return an error that has an answer of its own as the refusal that it is answered with."""
    if isinstance(error, Refused):
        return error
    if isinstance(error, Busy):
        return Refused(503, str(error), retry_after=error.retry_after)
    if isinstance(error, StorageError):
        return Refused(503, str(error), retry_after=RETRY_STORAGE)
    return Refused(422 if isinstance(error, DataError) else 409, str(error))


def as_json(value: Mapping[str, Any]) -> Response:
    """Return a response with a JSON object; half a surrogate pair becomes a question mark.

    Raises:
        ValueError: a number that is not finite.
    """
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Response(text.encode("utf-8", "replace"), media_type="application/json")
