"""The page and its API: HTTP on the one side, a `Backend` on the other."""

import ipaddress
import pathlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import fastapi
import matplotlib.colors
import numpy as np
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, Response, StreamingResponse
from ml_collections import ConfigDict
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from lomdm_jax.errors import UserError
from lomdm_jax.evaluation.order_page import SHADES
from lomdm_jax.evaluation.order_text import PALETTE
from lomdm_jax.serving.device import Device, Full, Job
from lomdm_jax.serving.guard import Guard, as_json, refusal
from lomdm_jax.serving.protocol import EVENTS, Backend, Request
from lomdm_jax.serving.reference import reference

LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
# A character of a JSON string is at most 12 bytes long; the settings are short.
BYTES_PER_CHARACTER, SETTINGS_BYTES = 12, 4096
# The pages load nothing, and nobody may frame them.
CSP = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": CSP,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}
ERROR = {"description": "refused; `error` says why", "content": {"application/json": {}}}
ANSWERS: dict[int | str, dict[str, Any]] = {413: ERROR, 422: ERROR, 503: ERROR}


class Lines(StreamingResponse):
    """The events of a job, a line of JSON each; when the client goes away, the job stops."""

    def __init__(self, job: Job) -> None:
        lines = (as_json(event) async for event in job.events())
        headers = {"cache-control": "no-store", "x-content-type-options": "nosniff"}
        super().__init__(lines, headers=headers, media_type="application/x-ndjson")
        self._job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:  # also if no line was ever read
            self._job.stop()


def make_app(backend: Backend, config: ConfigDict, device: Device) -> fastapi.FastAPI:
    """The server's ASGI application.

    config: the section `serve`.
    """

    @asynccontextmanager
    async def lifespan(app: fastapi.FastAPI) -> AsyncIterator[None]:
        yield
        device.close()

    # FastAPI's own page of the API loads scripts from elsewhere.
    app = fastapi.FastAPI(title="lomdm_jax", docs_url=None, redoc_url=None, lifespan=lifespan)
    _add_pages(app)
    _add_api(app, backend, config, device)
    _add_errors(app)
    hosts = LOOPBACK | {config.host} if is_loopback(config.host) else None
    limit = BYTES_PER_CHARACTER * config.characters + SETTINGS_BYTES
    app.add_middleware(Guard, hosts=hosts, limit=limit)
    return app


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens there."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _add_pages(app: fastapi.FastAPI) -> None:
    page = _page()

    @app.get("/", include_in_schema=False)
    async def main() -> Response:
        return HTMLResponse(page, headers=HEADERS)

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return HTMLResponse(reference(app.openapi(), EVENTS), headers=HEADERS)


def _page() -> str:
    shades = [matplotlib.colors.to_hex(PALETTE(x)) for x in np.linspace(0, 1, SHADES)]
    text = pathlib.Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    return text.replace("@@shades@@", " ".join(shades))


def _add_api(app: fastapi.FastAPI, backend: Backend, config: ConfigDict, device: Device) -> None:
    @app.get("/api/runs", summary="The runs to choose from, and the limits")
    async def runs() -> Response:
        limits = {"characters": config.characters, "samples": config.samples}
        body = as_json({"runs": backend.runs(), "limits": limits})
        return Response(body, headers={"cache-control": "no-store"}, media_type="application/json")

    @app.post("/api/generate", summary="Generate, and watch it", responses=ANSWERS)
    async def generate(request: Request) -> Response:
        """Answers with a line of JSON for each event as it happens; the last one has the trace."""
        device.check()
        _check_limits(request, config)
        return Lines(device.enter(await run_in_threadpool(backend.stream, request)))


def _check_limits(request: Request, config: ConfigDict) -> None:
    characters = len(request.prompt) + len(request.suffix)
    if characters > config.characters:
        raise UserError(
            f"prompt and suffix have {characters:,} characters together, but no more than "
            f"config.serve.characters = {config.characters:,} are taken: shorten them."
        )
    if request.count > config.samples:
        raise UserError(
            f"count is {request.count}, but no more than config.serve.samples = {config.samples} "
            "are generated at a time: ask for fewer."
        )


def _add_errors(app: fastapi.FastAPI) -> None:
    """Every refusal is JSON with the one key `error`."""
    full = "As many requests wait as may (config.serve.queue): try again in a moment."
    answers: dict[type[Exception], Callable[[Any], Response]] = {
        UserError: lambda error: refusal(422, str(error)),
        Full: lambda error: refusal(503, full),
        RequestValidationError: lambda error: refusal(422, _what(error)),
        HTTPException: lambda error: refusal(error.status_code, f"{error.detail}."),
    }
    for kind, answer in answers.items():
        app.add_exception_handler(kind, lambda _, error, answer=answer: answer(error))


def _what(error: RequestValidationError) -> str:
    """What is wrong with a request, field by field."""
    found = []
    for each in error.errors():
        place = ".".join(str(part) for part in each["loc"][1:]) or "The request"
        found.append(f"{place[:100]}: {each['msg']}")
    return "; ".join(found[:5]) + "; see /docs."
