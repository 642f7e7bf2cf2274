"""The page at ``/``. Its files are served as they are; it asks the routes beside this file:

- live.py     GET /v1/live: the live version, its scores, and what is held beside it
- browse.py   GET /v1/items, /v1/items/{id}, /v1/items/{id}/neighbours, /v1/users, /v1/users/{id}
- explain.py  POST /v1/explain: why an item is ranked where it is
"""

from __future__ import annotations

__all__ = ["router", "static"]

from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response
from starlette.staticfiles import StaticFiles

FILES = Path(__file__).parents[1] / "static"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
TYPES |= {".svg": "image/svg+xml"}  # by name: what a system takes them for varies


class _Files(StaticFiles):
    """Files of a folder, with types that do not depend on the system, asked for anew each time (and
    answered with 304 where they are the same).
    """

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        found = super().file_response(*args, **kwargs)
        kind = TYPES.get(Path(args[0]).suffix)
        if kind is not None and found.status_code == 200:
            found.headers["content-type"] = f"{kind}; charset=utf-8"
        found.headers["cache-control"] = "no-cache"
        return found


router = APIRouter(include_in_schema=False)
static = _Files(directory=FILES)


@router.api_route("/", methods=["GET", "HEAD"])
async def page(request: Request) -> Response:
    """The page."""
    return await static.get_response("index.html", request.scope)
