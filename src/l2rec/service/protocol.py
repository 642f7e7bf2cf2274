"""HTTP/1.1 of the server: uvicorn's, with a time for the head of a request, and for a body that is
not read; its own errors are problem details too.
"""

from __future__ import annotations

__all__ = ["HEAD_SECONDS", "Http"]

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from l2rec.service.security import PROBLEM, problem

HEAD_SECONDS = 10.0
"""Time for the head of a request to arrive, for the first one of a connection to begin, and for the
rest of a body whose request is answered already.
"""


class Http(H11Protocol):
    """A connection that is closed where the head of a request, or the rest of a body whose request
    is answered already, takes longer than `HEAD_SECONDS`. A body that is read has its own time.
    """

    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.conn.their_state is h11.SEND_BODY:
            self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._settle()

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP, and close the connection."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):  # nothing of an answer is sent yet
            body = problem(400, f"not HTTP/1.1: {msg}")
            headers = [
                (b"content-type", PROBLEM.encode()),
                (b"content-length", str(len(body)).encode()),
                (b"connection", b"close"),
            ]
            events: list[Any] = [
                h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ]
            for event in events:
                self.transport.write(self.conn.send(event))
        self.transport.close()

    def _watch(self) -> None:
        their = self.conn.their_state
        # Not closed at once: a client may send its body before it reads that it was refused.
        unread = their is h11.SEND_BODY and self.cycle.response_complete
        if their is not h11.IDLE and not unread:
            self._settle()
        elif self._late is None:
            self._late = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _settle(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None
