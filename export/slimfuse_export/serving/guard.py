"""What stands before the routes: token, size and time of a request's body, counting."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Collection
from hmac import compare_digest

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from slimfuse_export.serving.limits import Limits
from slimfuse_export.serving.metrics import Metrics

OPEN = frozenset({"/", "/page.css", "/page.js", "/health", "/ready", "/openapi.json"})
"""Paths that need no token: nothing of the model is behind them."""
_HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
)


class Guard:
    """Middleware of plain ASGI, so that a refused body is never read or parsed.

    token: that a client must bear, None for none. paths: that are counted by name.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        limits: Limits,
        metrics: Metrics,
        token: str | None,
        paths: Collection[str],
    ) -> None:
        self._app, self._limits, self._metrics = app, limits, metrics
        self._token = None if token is None else token.encode()
        self._paths = frozenset(paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on whole, or refuse it."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), 500
        path = scope["path"] if scope["path"] in self._paths else "other"

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = {name for name, _ in message["headers"]}
                more = [header for header in _HEADERS if header[0] not in own]
                message = {**message, "headers": [*message["headers"], *more]}
            await send(message)

        try:
            refused = self._refused(scope)
            body = b""
            if refused is None:
                body, refused = await self._body(receive)
            if refused is None:
                await self._app(scope, _replay(body, receive), counted)
            else:
                await _refuse(counted, *refused)
        finally:
            self._metrics.requests.labels(path, str(status)).inc()
            self._metrics.seconds.labels(path).observe(time.perf_counter() - started)

    def _refused(self, scope: Scope) -> tuple[int, str] | None:
        headers = dict(scope["headers"])
        if self._token is not None and scope["path"] not in OPEN:
            scheme, _, given = headers.get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not compare_digest(given.strip(), self._token):
                return 401, "a bearer token is needed"
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > self._limits.body_bytes:
            return self._too_large
        return None

    @property
    def _too_large(self) -> tuple[int, str]:
        return 413, f"the body is larger than {self._limits.body_bytes:,} bytes"

    async def _body(self, receive: Receive) -> tuple[bytes, tuple[int, str] | None]:
        """Return the whole body, counted as it comes, or why it is refused."""
        parts: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self._limits.seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return b"", (400, "the request was not finished")
                    part = message.get("body", b"")
                    size += len(part)
                    if size > self._limits.body_bytes:
                        return b"", self._too_large
                    parts.append(part)
                    if not message.get("more_body"):
                        return b"".join(parts), None
        except TimeoutError:
            return b"", (408, f"the body took longer than {self._limits.seconds:g} seconds")


def _replay(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that gives the body in one piece, then what the server says."""
    given = False

    async def once() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return once


async def _refuse(send: Send, status: int, detail: str) -> None:
    body = json.dumps({"detail": detail}).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),  # the rest of its body is not wanted
    ]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
