"""Guard before every route: keys, what each may cost, and the size and shape of a body.

It is one ASGI layer, so that no route can be left out: a new route needs a key until it is named
here. It refuses before it reads, reads no more than is allowed, and answers with problem details.

    public      /livez /readyz /openapi.json / and the page's files: no key
    read key    everything that is GET, and recommend, embed, explain
    write key   everything else
"""

from __future__ import annotations

__all__ = [
    "PROBLEM",
    "Caller",
    "Guard",
    "RateLimit",
    "Refused",
    "charge",
    "current_key",
    "current_writer",
    "problem",
]

import asyncio
import hmac
import json
import logging
import math
import re
import time
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from l2rec.service.metrics import Failure, Metrics
from l2rec.service.settings import Settings

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

logger = logging.getLogger("l2rec.service")

PUBLIC = frozenset({"/", "/livez", "/readyz", "/openapi.json", "/favicon.ico"})
PUBLIC_FOLDER = "/static/"
READING_POSTS = frozenset(
    {
        "/v1/recommend",
        "/v1/recommend/batch",
        "/v1/embed/users",
        "/v1/embed/items",
        "/v1/explain",
    }
)
PROBLEM = "application/problem+json"
"""Media type of every error."""
PROBES = frozenset({"/livez", "/readyz"})
DEPTH = 16
"""Levels of lists and objects in a body."""
BODY_SECONDS = 10.0
"""Time for the whole body to arrive."""
PUBLIC_KEY = -1
"""Number that stands for the key of requests that need none."""
REQUEST_TOKENS, BYTES_OF_TOKEN = 10, 16
"""What a request costs beside what the model reads for it, and a token more for so many bytes."""
LOOPBACK_HOSTS = frozenset({"localhost", "127.0.0.1", "[::1]"})

HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
]


def policy(images: Sequence[str]) -> tuple[bytes, bytes]:
    """Return the header with the content security policy: nothing from elsewhere but the pictures
    of these hosts.
    """
    pictures = " ".join(["'self'", "data:", *images])
    text = (
        f"default-src 'none'; script-src 'self'; style-src 'self'; img-src {pictures}; "
        "font-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
    return b"content-security-policy", text.encode()


class Refused(Exception):
    """A request that is answered with an error. retry_after: seconds until it may come again.
    closes: the connection too, because what follows on it cannot be trusted, or is not read.
    """

    def __init__(
        self, status: int, error: str, *, retry_after: float | None = None, closes: bool = False
    ) -> None:
        super().__init__(error)
        self.status, self.error, self.retry_after = status, error, retry_after
        self.closes = closes or status in (408, 413)


def problem(status: int, error: str, request: str | None = None) -> bytes:
    """Return the body of an error, problem details as in RFC 9457: the error is one line.

    request: id of the request, if it has one.
    """
    value = {
        "type": "about:blank",
        "title": HTTPStatus(status).phrase,
        "status": status,
        "detail": " ".join(str(error).split())[:1000],
        "request": request,
    }
    return json.dumps(value).encode()


@dataclass
class _Bucket:
    tokens: float
    at: float


class RateLimit:
    """A token bucket for each key: ``rate`` tokens a minute, and a minute's worth at once.

    What a request costs is known once it was read. So any request may pass while something is
    left, and what it costs beyond that has to come back before the next one.
    """

    def __init__(self, rate: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate, self._clock = rate, clock
        self._buckets: dict[int, _Bucket] = {}

    def _bucket(self, key: int) -> _Bucket:
        now = self._clock()
        bucket = self._buckets.setdefault(key, _Bucket(self._rate, now))
        come = (now - bucket.at) * self._rate / 60
        bucket.tokens, bucket.at = min(self._rate, bucket.tokens + come), now
        return bucket

    def wait(self, key: int) -> float:
        """Return 0 if a request of a key may pass, else the seconds until one may."""
        if not self._rate:
            return 0.0
        return max(0.0, 1 - self._bucket(key).tokens) * 60 / self._rate

    def charge(self, key: int, tokens: float) -> None:
        """Take what a request of a key costs."""
        if self._rate:
            self._bucket(key).tokens -= tokens


@dataclass(frozen=True)
class Caller:
    """Who a request is of: the number of a key, the limit that it has a share of, and, if it may
    write, the name that its changes are noted under.
    """

    key: int
    limit: RateLimit
    writer: str | None


_CALLER: ContextVar[Caller | None] = ContextVar("l2rec_caller", default=None)
"""The caller of the request that is being answered."""


def current_key() -> int:
    """Return the number of the key of the request that is being answered, 0 outside of any."""
    caller = _CALLER.get()
    return 0 if caller is None else caller.key


def current_writer() -> str | None:
    """Return the name of who may write in the request that is being answered; None for nobody."""
    caller = _CALLER.get()
    return None if caller is None else caller.writer


def charge(tokens: float) -> None:
    """Charge tokens to the key of the request that is being answered."""
    caller = _CALLER.get()
    if caller is not None:
        caller.limit.charge(caller.key, tokens)


def may_write(method: str, path: str) -> bool:
    """Tell whether a request needs a write key."""
    reads = method in ("GET", "HEAD", "OPTIONS")
    return not reads and not (method == "POST" and path in READING_POSTS)


def is_public(method: str, path: str) -> bool:
    """Tell whether a request needs no key: probes, the page and its files, the schema."""
    public = path in PUBLIC or path.startswith(PUBLIC_FOLDER)
    return method in ("GET", "HEAD") and public


_STRINGS = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"?', re.DOTALL)
_BRACKETS = re.compile(rb"[\[\]{}]")


_PLAIN = bytes(set(range(256)) - set(b'[]{}"'))


def depth_of(body: bytes, limit: int) -> int:
    """Count the levels of lists and objects of a JSON text, up to ``limit`` + 1."""
    if b"\\" not in body:  # faster by far: a megabyte must not hold up the event loop
        body = body.translate(None, _PLAIN).replace(b'""', b"")
    depth = deepest = 0
    for bracket in _BRACKETS.finditer(_STRINGS.sub(b"", body)):
        depth += 1 if bracket[0] in b"[{" else -1
        deepest = max(deepest, depth)
        if deepest > limit:
            break
    return deepest


class Guard:
    """ASGI layer around an app.

    It sets ``l2rec.request`` in the scope, an id that is also in ``X-Request-Id`` and in the log.
    The log has no header, no query and no body.
    """

    def __init__(self, app: App, settings: Settings, metrics: Metrics) -> None:
        self.app, self.settings, self._metrics = app, settings, metrics
        self._read = [key.get_secret_value().encode() for key in settings.read_keys]
        self._write = [key.get_secret_value().encode() for key in settings.write_keys]
        self._limit = RateLimit(settings.rate)
        self._headers = [*HEADERS, policy(settings.images)]
        self.inflight = 0
        self._inflight_of: Counter[int] = Counter()
        metrics.gauge(
            "l2rec_inflight_requests", "Requests in progress.", lambda: float(self.inflight)
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1008})
                return
            await self.app(scope, receive, send)
            return
        started, sent, detail = time.perf_counter(), 0, ""
        _CALLER.set(None)  # a context may be that of the request before on its connection
        scope["l2rec.request"] = request = uuid.uuid4().hex
        counted = scope["path"] not in PROBES

        async def answer(message: Message) -> None:
            nonlocal sent, detail
            if sent >= 400 and not detail:
                detail = _detail(message.get("body", b""))
            if message["type"] == "http.response.start":
                sent = int(message["status"])
                headers = [*message.get("headers", [])]
                if b"cache-control" not in {name.lower() for name, _ in headers}:
                    headers.append((b"cache-control", b"no-store"))
                request_id = (b"x-request-id", request.encode())
                message["headers"] = [*headers, *self._headers, request_id]
            await send(message)

        self.inflight += counted
        try:
            await self._pass(scope, receive, answer, counted)
        except Refused as refused:
            if not sent:
                await _refuse(answer, refused, request)
        except Exception:
            # An error that was not foreseen goes to the log, not to the client.
            logger.exception("request %s failed", request)
            if not sent:
                internal = Refused(500, f"internal error; see the log at {request}")
                await _refuse(answer, internal, request)
        finally:
            self.inflight -= counted
            route = scope.get("route")
            template = getattr(route, "path", None) or "other"
            seconds = time.perf_counter() - started
            self._metrics.answered(template, scope["method"], sent, seconds)
            # Whoever has no key must not push the failures of the others out of the list.
            known = _CALLER.get() is not None or not self.settings.secured
            if sent >= 400 and counted and known:
                failure = Failure(time.time(), scope["method"], template, sent, detail, request)
                self._metrics.failures.append(failure)
            if self.settings.access_log:
                logger.info(
                    "%s %s %d %.1f ms %s", scope["method"], template, sent, 1000 * seconds, request
                )

    async def _pass(self, scope: Scope, receive: Receive, send: Send, counted: bool) -> None:
        settings, method, path = self.settings, scope["method"], scope["path"]
        headers = {bytes(name).lower(): bytes(value) for name, value in scope["headers"]}
        if b"content-length" in headers and b"transfer-encoding" in headers:
            # Whoever stands in between may have taken the other one to end the request.
            raise Refused(400, "both Content-Length and Transfer-Encoding", closes=True)
        self._check_host(headers)
        key, public = PUBLIC_KEY, is_public(method, path)
        if not public:
            key = self._key(headers)
            _CALLER.set(Caller(key, self._limit, self._writer(key)))
        if counted and self.inflight > settings.inflight:
            self._metrics.refused.labels("inflight").inc()
            raise Refused(
                503, f"{settings.inflight} requests are being answered already", retry_after=1
            )
        if not public:
            if may_write(method, path) and current_writer() is None:
                raise Refused(403, "a read key: items and events need a write key")
            if wait := self._limit.wait(key):
                self._metrics.refused.labels("rate").inc()
                raise Refused(429, f"more than {settings.rate:g} tokens a minute", retry_after=wait)
            most = settings.inflight // 2 if len(self._read) + len(self._write) > 1 else math.inf
            if self._inflight_of[key] >= most:
                self._metrics.refused.labels("inflight").inc()
                raise Refused(
                    503, f"{most} requests of this key are being answered already", retry_after=1
                )
            charge(REQUEST_TOKENS)
        self._inflight_of[key] += 1
        try:
            await self._answer(headers, scope, receive, send, counted)
        finally:
            self._inflight_of[key] -= 1

    async def _answer(
        self,
        headers: dict[bytes, bytes],
        scope: Scope,
        receive: Receive,
        send: Send,
        counted: bool,
    ) -> None:
        """Read the body and let the app answer, in its time."""
        settings, method = self.settings, scope["method"]
        body = await self._body(headers, receive) if method not in ("GET", "HEAD") else b""
        delivered = False

        async def whole() -> Message:
            nonlocal delivered
            if delivered:
                return await receive()  # the disconnect
            delivered = True
            return {"type": "http.request", "body": body, "more_body": False}

        try:
            async with asyncio.timeout(settings.timeout if counted else None):
                await self.app(scope, whole, send)
        except TimeoutError:
            self._metrics.refused.labels("timeout").inc()
            raise Refused(
                503, f"no answer within {settings.timeout:g} s; try again", retry_after=1
            ) from None

    def _check_host(self, headers: dict[bytes, bytes]) -> None:
        """Refuse names other than this machine's where there are no keys.

        Otherwise a web page open in a browser here could let its name point to this machine, and
        so reach the server.
        """
        if self.settings.secured:
            return
        host = headers.get(b"host", b"").decode("latin-1")
        name = re.sub(r":\d+$", "", host).lower()
        if name not in LOOPBACK_HOSTS:
            raise Refused(
                400, "a server without keys answers to localhost alone; set keys to use other names"
            )

    def _key(self, headers: dict[bytes, bytes]) -> int:
        """Return the number of the key that was sent, counting read keys first.

        Every key is compared, in constant time, so that the duration reveals nothing about them.
        """
        if not self.settings.secured:
            return 0
        scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
        token = token.strip()
        if not token or scheme.lower() != b"bearer":
            raise Refused(401, "give a key: Authorization: Bearer KEY")
        match = -1
        for number, key in enumerate([*self._read, *self._write]):
            if hmac.compare_digest(key, token):
                match = number
        if match < 0:
            raise Refused(401, "unknown key")
        return match

    def _writer(self, key: int) -> str | None:
        """Return a name for who has a key; None for a read key."""
        if not self.settings.secured:
            return "somebody at this machine"
        return None if key < len(self._read) else f"write key {key - len(self._read) + 1}"

    async def _body(self, headers: dict[bytes, bytes], receive: Receive) -> bytes:
        """Read the whole body.

        Raises:
            Refused: too large (as soon as that is known), too slow, too deep, or not JSON by its
                type.
        """
        most = self.settings.body_bytes
        declared = headers.get(b"content-length", b"0")
        if not declared.isdigit():
            raise Refused(400, "Content-Length is not a number")
        if int(declared) > most:
            raise Refused(413, f"a body of {int(declared)} bytes; send at most {most}")
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(BODY_SECONDS):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Refused(400, "the connection was closed within the body")
                    part = message.get("body", b"")
                    size += len(part)
                    if size > most:
                        raise Refused(413, f"a body of more than {most} bytes")
                    parts.append(part)
                    if not message.get("more_body", False):
                        break
        except TimeoutError:
            raise Refused(408, f"the body took more than {BODY_SECONDS:g} s") from None
        body = b"".join(parts)
        charge(len(body) / BYTES_OF_TOKEN)
        if body:
            kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
            if kind != b"application/json":
                raise Refused(415, "send application/json")
            if depth_of(body, DEPTH) > DEPTH:
                raise Refused(400, f"JSON deeper than {DEPTH} levels")
        return body


def _detail(body: bytes) -> str:
    """Return the detail of problem details; "" of anything else."""
    try:
        value = json.loads(body)
    except ValueError:
        return ""
    return str(value.get("detail", "")) if isinstance(value, dict) else ""


async def _refuse(send: Send, refused: Refused, request: str) -> None:
    body = problem(refused.status, refused.error, request)
    headers = [
        (b"content-type", PROBLEM.encode()),
        (b"content-length", str(len(body)).encode()),
    ]
    if refused.retry_after is not None:
        headers.append((b"retry-after", str(max(1, math.ceil(refused.retry_after))).encode()))
    if refused.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if refused.closes:
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": refused.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
