"""What a server takes: how long a request may be, how many at once, and from whom."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from fastapi import HTTPException
from fastapi.responses import JSONResponse

OPEN = ("/health",)
"""Paths that need no key."""

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


@dataclass(frozen=True)
class Limits:
    """How much a server takes.

    Attributes:
        parallel: answers that are generated at the same time.
        waiting: requests that wait for their turn; others are refused with status 429.
        body: bytes of a request; a longer one is refused with status 413.
    """

    parallel: int = 16
    waiting: int = 64
    body: int = 1 << 20


def fault(status: int, message: str, **headers: str) -> JSONResponse:
    """Return an error as OpenAI's clients read it."""
    kind = "server_error" if status >= 500 else "invalid_request_error"
    kind = {401: "authentication_error", 429: "rate_limit_error"}.get(status, kind)
    error = {"message": message, "type": kind, "param": None, "code": status}
    return JSONResponse({"error": error}, status, headers=headers)


class Places:
    """The places for answers that are generated, and the queue before them.

    Args:
        limits: says how many there are of both.
    """

    def __init__(self, limits: Limits) -> None:
        self._free = asyncio.Semaphore(limits.parallel)
        self._most = limits.waiting
        self.waiting = self.taken = 0

    async def take(self) -> None:
        """Wait for a place.

        Raises:
            HTTPException: 429, too many are waiting.
        """
        if self._free.locked() and self.waiting >= self._most:
            raise HTTPException(
                429, f"{self.waiting} requests are waiting already; try again in a moment",
                headers={"Retry-After": "1"},
            )  # fmt: skip
        self.waiting += 1
        try:
            await self._free.acquire()
        finally:
            self.waiting -= 1
        self.taken += 1

    def give_back(self) -> None:
        """Free a place."""
        self.taken -= 1
        self._free.release()


class Gate:
    """ASGI middleware: refuses requests without the key, and bodies that are too long.

    Args:
        app: what gets the other requests, with their whole bodies.
        key: the key of `Authorization: Bearer KEY`; None lets everybody in.
        body: the most bytes of a request.
    """

    def __init__(self, app: Any, key: str | None, body: int) -> None:
        self.app, self.body = app, body
        self.key = None if key is None else f"Bearer {key}".encode()

    async def __call__(self, scope: dict[str, Any], receive: Receive, send: Send) -> None:
        """Pass a request on or answer it with an error."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if self.key is not None and scope["path"] not in OPEN:
            given = headers.get(b"authorization", b"")
            if not secrets.compare_digest(given, self.key):
                refused = fault(
                    401, "the API key is missing or wrong; send Authorization: Bearer KEY",
                    **{"WWW-Authenticate": "Bearer"},
                )  # fmt: skip
                await refused(scope, receive, send)
                return
        body = await self._read(receive)
        if body is None:
            refused = fault(413, f"the request is longer than {self.body} bytes; shorten it")
            await refused(scope, receive, send)
            return
        await self.app(scope, _replay(body, receive), send)

    async def _read(self, receive: Receive) -> list[MutableMapping[str, Any]] | None:
        """Return the messages of a request's body, None if it is too long."""
        messages, length = [], 0
        while True:
            message = await receive()
            messages.append(message)
            length += len(message.get("body", b""))
            if length > self.body:
                return None
            if message["type"] != "http.request" or not message.get("more_body", False):
                return messages


def _replay(messages: list[MutableMapping[str, Any]], receive: Receive) -> Receive:
    left = iter(messages)

    async def replay() -> MutableMapping[str, Any]:
        for message in left:
            return message
        return await receive()

    return replay
