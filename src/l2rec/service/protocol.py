"""HTTP/1.1 of the server: uvicorn's, whose own errors are problem details too."""

from __future__ import annotations

__all__ = ["Http"]

from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from l2rec.service.security import PROBLEM, problem


class Http(H11Protocol):
    """The protocol of one connection."""

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
