"""The server's routes: OpenAI's interface to the models of a shelf."""

from __future__ import annotations

import asyncio
import json
import logging
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Depends, FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.security import HTTPBearer
from openai.types import Completion
from openai.types.chat import ChatCompletion
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware

from rotmole.errors import InputError
from rotmole.serving.engine import Engine
from rotmole.serving.handlers import Shelf, handlers
from rotmole.serving.limits import Gate, Limits, Places, fault
from rotmole.serving.requests import ChatRequest, LoadRequest, TextRequest

logger = logging.getLogger(__name__)

GONE = 499
"""Status for a client that closed the connection; nobody reads it."""

_STATUSES = {
    400: "The request is wrong.",
    401: "The API key is missing or wrong.",
    404: "There is no such model.",
    413: "The request is too long.",
    429: "Too many requests are waiting.",
    503: "The server cannot answer.",
}


def build_app(
    engines: Sequence[Engine],
    *,
    limits: Limits | None = None,
    key: str | None = None,
    hosts: Sequence[str] = ("*",),
) -> FastAPI:
    """Return the server as an ASGI application; it stops the engines when it is shut down.

    Args:
        engines: one for each model.
        limits: None is the default ones.
        key: what clients must send as their API key; None lets everybody in.
        hosts: names under which clients may address the server, so that a web page of a foreign
            name cannot; "*" is any.
    """
    limits = limits or Limits()
    shelf, places = Shelf(engines), Places(limits)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.gather(*(asyncio.to_thread(engine.stop) for engine in engines))

    app = FastAPI(
        title="rotmole", docs_url=None, redoc_url=None, lifespan=lifespan,
        responses={code: {"description": text} for code, text in _STATUSES.items()},
        dependencies=[Depends(HTTPBearer(auto_error=False))] if key is not None else [],
    )  # fmt: skip
    _add_errors(app)
    _describe(app, list(shelf.engines))
    _add_answers(app, shelf, places)
    _add_models(app, shelf)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))
    app.add_middleware(Gate, key=key, body=limits.body)
    return app


def _add_errors(app: FastAPI) -> None:
    """Let every error be one sentence in OpenAI's form."""

    @app.exception_handler(StarletteHTTPException)
    async def refused(_: Request, error: StarletteHTTPException) -> JSONResponse:
        return fault(error.status_code, str(error.detail), **(error.headers or {}))

    @app.exception_handler(RequestValidationError)
    async def wrong(_: Request, error: RequestValidationError) -> JSONResponse:
        return fault(400, _problems(error))

    @app.exception_handler(InputError)
    async def refused_by_the_library(_: Request, error: InputError) -> JSONResponse:
        return fault(400, str(error))

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> JSONResponse:
        return fault(500, "the server failed; its log has the reason")


def _describe(app: FastAPI, names: list[str]) -> None:
    """Let the schema say which models and which statuses there are."""
    make = app.openapi

    def described() -> dict[str, Any]:
        schema = make()
        for operations in schema["paths"].values():
            for operation in operations.values():
                operation["responses"].pop("422", None)  # wrong requests get 400
                for parameter in operation.get("parameters", []):
                    parameter["schema"]["enum"] = names
        for request in (ChatRequest, TextRequest, LoadRequest):
            schema["components"]["schemas"][request.__name__]["properties"]["model"]["enum"] = names
        return schema

    app.openapi = described  # type: ignore[method-assign] # FastAPI's own way to change it


def _problems(error: RequestValidationError) -> str:
    texts = []
    for problem in error.errors()[:5]:
        place = ".".join(str(part) for part in problem["loc"][1:]) or "the request"
        if problem["type"] == "json_invalid":
            texts.append(f"the request is not JSON ({problem['ctx']['error']})")
        elif problem["type"] == "extra_forbidden":
            texts.append(f"{place}: this server has no such field; leave it out")
        else:
            texts.append(f"{place}: {problem['msg'].removeprefix('Value error, ')}")
    return "; ".join(texts)


def _add_answers(app: FastAPI, shelf: Shelf, places: Places) -> None:
    chat, text = handlers(shelf)

    def answers(kind: Any) -> dict[int | str, dict[str, Any]]:
        return {200: {"model": kind, "content": {"text/event-stream": {}}}}

    @app.post("/v1/chat/completions", responses=answers(ChatCompletion))
    async def chat_completions(request: Request, asked: ChatRequest) -> Response:
        """Answer a chat."""
        return await _answer(request, shelf, places, asked, chat)

    @app.post("/v1/completions", responses=answers(Completion))
    async def completions(request: Request, asked: TextRequest) -> Response:
        """Continue a text."""
        return await _answer(request, shelf, places, asked, text)


async def _answer(
    request: Request, shelf: Shelf, places: Places, asked: ChatRequest | TextRequest, handler: Any
) -> Response:
    """Answer a request in its turn; if its client goes away, generate no more."""
    shelf.check(asked.model)
    request_id = f"rotmole-{uuid.uuid4().hex}"

    def done() -> None:
        shelf.cancel(asked.model, request_id)
        places.give_back()

    async def work() -> Response:
        await places.take()
        try:
            answer: Response = await handler.handle_request(asked.body(), request_id)
        except BaseException:
            done()
            raise
        if isinstance(answer, StreamingResponse):
            return Stream(answer.body_iterator, done)
        done()
        return answer

    return await _unless_gone(request, work())


async def _unless_gone(request: Request, work: Coroutine[Any, Any, Response]) -> Response:
    """Return what the work returns; cancel it if the client goes away before."""
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnect(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            return Response(status_code=GONE)
        return await task
    finally:
        gone.cancel()
        if not task.done():
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class Stream(StreamingResponse):
    """A stream of server-sent events that says when it is over, however it ends.

    Args:
        events: of transformers' handler.
        done: called once, also if nothing was sent.
    """

    def __init__(self, events: Any, done: Callable[[], None]) -> None:
        super().__init__(_with_end(events), media_type="text/event-stream")
        self._done = done

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Send the stream."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._done()


async def _with_end(events: Any) -> AsyncIterator[str]:
    async for event in events:
        yield event
    yield "data: [DONE]\n\n"  # OpenAI's last line, which transformers leaves out


def _add_models(app: FastAPI, shelf: Shelf) -> None:
    def described(name: str) -> dict[str, Any]:
        served = shelf.engines[name].served
        owner = "rotmole" if served.adapted else "base"
        return {"id": name, "object": "model", "created": served.created, "owned_by": owner}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """List the models: every adapter, and the base model."""
        return {"object": "list", "data": [described(name) for name in shelf.engines]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        """Describe one model."""
        shelf.check(name)
        return described(name)

    @app.post("/load_model", response_class=StreamingResponse)
    async def load_model(asked: LoadRequest) -> StreamingResponse:
        """Say that a model is loaded, which `transformers chat` asks; nothing is ever loaded."""
        shelf.check(asked.model)
        event = {"status": "ready", "model": asked.model, "cached": True}
        return StreamingResponse(
            iter([f"data: {json.dumps(event)}\n\n"]), media_type="text/event-stream"
        )

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Say whether every model can answer."""
        if not shelf.is_alive():
            raise HTTPException(503, "an engine has stopped; the server's log has the reason")
        return {"status": "ok"}
