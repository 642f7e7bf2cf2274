"""The page at ``/`` and its files, which are served as they are.

- GET /: the page
- GET /static/...: its files, by ``static``

The page asks the routes of live.py, browse.py and explain.py.
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
TYPES |= {".svg": "image/svg+xml"}  # named here: systems differ in their tables of types


class _Files(StaticFiles):
    """Files of a folder, with types that do not depend on the system.

    A browser asks for them anew each time, and gets 304 where they are the same.
    """

    def file_response(self, *args: Any, **kwargs: Any) -> Response:
        response = super().file_response(*args, **kwargs)
        kind = TYPES.get(Path(args[0]).suffix)
        if kind is not None and response.status_code == 200:
            response.headers["content-type"] = f"{kind}; charset=utf-8"
        response.headers["cache-control"] = "no-cache"
        return response


router = APIRouter(include_in_schema=False)
static = _Files(directory=FILES)


@router.api_route("/", methods=["GET", "HEAD"])
async def page(request: Request) -> Response:
    """Return the page."""
    return await static.get_response("index.html", request.scope)
