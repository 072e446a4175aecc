"""What is refused before any handler sees it: other names of the host, and too much of a body."""

import asyncio
import json
from typing import Any
from urllib.parse import urlsplit

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

PATIENCE = 10.0  # seconds in which a body must have come
# Of a body that is too large so many times the limit are read before it is refused: a client that
# is cut off while it writes may not see the answer.
TOO_MUCH = 16


def as_json(value: Any) -> bytes:
    """One line of ASCII, so that no text, not even half a character, can break it."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode() + b"\n"


def refusal(status: int, message: str) -> Response:
    """An answer that says what is wrong; the connection ends with it."""
    headers = {"connection": "close", "cache-control": "no-store"}
    body = as_json({"error": message})
    return Response(body, status, headers, media_type="application/json")


class Guard:
    """ASGI middleware.

    hosts: names that a request may use for this server; None for any. On loopback a page of
      another site could else reach the server under that site's name (DNS rebinding).
    limit: bytes of a body; counted as they come, whatever Content-Length says.
    """

    def __init__(self, app: ASGIApp, hosts: frozenset[str] | None, limit: int) -> None:
        self._app, self._hosts, self._limit = app, hosts, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        if self._hosts is not None and (host := _host(scope)) not in self._hosts:
            known = ", ".join(sorted(self._hosts))
            message = f"This server is called {known}, not {host!r}: use one of these names."
            return await refusal(400, message)(scope, receive, send)
        try:
            async with asyncio.timeout(PATIENCE):
                body = await self._read(receive)
        except TimeoutError:
            message = f"The request had not come after {PATIENCE:g} s: send it at once."
            return await refusal(408, message)(scope, receive, send)
        except ClientDisconnect:
            return None
        if body is None:
            message = f"The request has more than {self._limit:,} bytes: shorten it."
            return await refusal(413, message)(scope, receive, send)
        await self._app(scope, _replayed(body, receive), send)

    async def _read(self, receive: Receive) -> bytes | None:
        """The body; None if it is too large."""
        chunks, size, more = list[bytes](), 0, True
        while more and size <= TOO_MUCH * self._limit:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientDisconnect
            size += len(message.get("body", b""))
            if size <= self._limit:
                chunks.append(message.get("body", b""))
            more = message.get("more_body", False)
        return b"".join(chunks) if size <= self._limit else None


def _host(scope: Scope) -> str | None:
    """The name in the Host header, without a port; None if there is not exactly one."""
    values = [value for name, value in scope["headers"] if name == b"host"]
    try:
        return urlsplit(f"//{values[0].decode('latin-1')}").hostname if len(values) == 1 else None
    except ValueError:
        return None


def _replayed(body: bytes, receive: Receive) -> Receive:
    """The body at once; later calls wait for the client to go away."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def replay() -> Message:
        return messages.pop() if messages else await receive()

    return replay
