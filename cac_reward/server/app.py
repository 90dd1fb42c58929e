"""The routes: who may ask, how much a request may bring, and which answer belongs to it."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, NoReturn
from urllib.parse import urlsplit

from fastapi import Depends, FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from cac_reward.server.metrics import Metrics
from cac_reward.server.pipeline import BrokenError, OverloadedError, Pipeline
from cac_reward.server.settings import ServerSettings, is_loopback
from cac_reward.server.wire import (
    METRIC,
    REWARD,
    Answer,
    ClipRequest,
    WireError,
    flow_factory_clips,
    flow_factory_reply,
    own_clips,
    own_reply,
    parse_json,
    unirl_clips,
    unirl_reply,
)

MAX_BODIES_DISCARDED = 4
"""How many times the longest body is read to the end only to say that it is refused."""


class _AsciiResponse(JSONResponse):
    """JSON that can carry whatever came in as JSON, lone surrogates included."""

    def render(self, content: Any) -> bytes:
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode()


class _RefusalError(Exception):
    """An answer other than 200, with its reason."""

    def __init__(self, status: int, text: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(text)
        self.status = status
        self.headers = dict(headers or {})


def make_app(settings: ServerSettings, pipeline: Pipeline, metrics: Metrics) -> FastAPI:
    """The server's routes over a pipeline that was started."""
    app = FastAPI(title="cac_reward", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_exception_handler(_RefusalError, _answer_refusal)
    app.add_exception_handler(HTTPException, _answer_http_error)
    door = _Door(settings, metrics)
    guarded = [Depends(door.check_caller)]

    @app.get("/health")
    async def health() -> dict[str, Any]:
        if pipeline.broken.is_set():
            raise _RefusalError(503, "a process of this server cannot be started any more")
        return {"status": "ok", "rewards": {REWARD: [METRIC]}}

    @app.get("/rewards", dependencies=guarded)
    async def rewards() -> dict[str, Any]:
        return {"rewards": [REWARD], "judge": pipeline.judge}

    @app.get("/metrics", dependencies=guarded)
    async def show_metrics() -> Response:
        return PlainTextResponse(metrics.render(), media_type="text/plain; version=0.0.4")

    async def score(
        request: Request, read: Callable[[dict[str, Any]], _Asked]
    ) -> tuple[dict[str, Any], _Asked, list[Answer]]:
        began = time.monotonic()
        status = 500
        try:
            async with door.body(request) as body:
                parsed, asked = await asyncio.to_thread(_parse, body, read)
                del body
                answers = await _answer(request, pipeline, asked, settings)
            status = 200
            return parsed, asked, answers
        except _RefusalError as refusal:
            status = refusal.status
            raise
        finally:
            metrics.add("requests_total", route=request.scope["path"], status=str(status))
            metrics.observe_request(time.monotonic() - began)

    @app.post("/v1/score", dependencies=guarded)
    async def own(request: Request) -> Response:
        _, asked, answers = await score(request, lambda body: _Asked(*own_clips(body, settings)))
        return _AsciiResponse({**own_reply(answers, asked.reports), "judge": pipeline.judge})

    @app.post("/score", dependencies=guarded)
    async def unirl(request: Request) -> Response:
        body, _, answers = await score(request, lambda body: _Asked(unirl_clips(body, settings)))
        return _AsciiResponse(unirl_reply(body, answers, pipeline.judge))

    @app.post("/compute", dependencies=guarded)
    async def flow_factory(request: Request) -> Response:
        _, _, answers = await score(
            request, lambda body: _Asked(flow_factory_clips(body, settings))
        )
        return _AsciiResponse(flow_factory_reply(answers))

    return app


class _Asked:
    """What a request wants, whatever its schema."""

    def __init__(
        self,
        clips: Sequence[ClipRequest],
        deadline_seconds: float | None = None,
        reports: bool = True,
    ) -> None:
        self.clips = clips
        self.deadline_seconds = deadline_seconds
        self.reports = reports


class _Door:
    """Who comes in, and with how much."""

    def __init__(self, settings: ServerSettings, metrics: Metrics) -> None:
        self._settings = settings
        self._limits = settings.limits
        self._metrics = metrics

    async def check_caller(self, request: Request) -> None:
        """Refuse who does not know the token, or where there is none, who is not of this machine.

        Without a token a page in a browser here could ask under a name that it made to point at
        this machine; such a name is not a loopback name.
        """
        token = self._settings.token
        if token is None:
            host = _host_name(request)
            if not is_loopback(host):
                text = f"Host must be a loopback name, got {host[:100]!r}"
                await self._refuse(request, _RefusalError(403, text))
        elif not hmac.compare_digest(_given_token(request).encode(), token.encode()):
            text = "token must be sent as 'Authorization: Bearer TOKEN' (or as a Basic password)"
            challenge = {"WWW-Authenticate": "Bearer"}
            await self._refuse(request, _RefusalError(401, text, challenge))

    @asynccontextmanager
    async def body(self, request: Request) -> AsyncIterator[bytes]:
        """Read a request's body; its bytes count as pending until the request is answered."""
        media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type != "application/json":
            text = f"Content-Type must be application/json, got {media_type!r}"
            await self._refuse(request, _RefusalError(415, text))
        length = request.headers.get("content-length", "")
        if not (length.isascii() and length.isdigit() and len(length) < 20):
            await self._refuse(request, _RefusalError(411, "Content-Length must be given"))
        size = int(length)
        limits = self._limits
        if size > limits.max_body_bytes:
            text = f"body must have at most {limits.max_body_bytes} bytes, got {size}"
            await self._refuse(request, _RefusalError(413, text))
        if self._metrics.pending_bytes + size > limits.max_pending_bytes:
            text = (
                f"pending requests must stay within {limits.max_pending_bytes} bytes; "
                "try again later"
            )
            await self._refuse(request, _RefusalError(429, text, {"Retry-After": "1"}))
        self._metrics.pending_bytes += size
        try:
            yield await self._read(request, keep=True)
        finally:
            self._metrics.pending_bytes -= size

    async def _refuse(self, request: Request, refusal: _RefusalError) -> NoReturn:
        """Refuse a request whose body is not read yet.

        The body is thrown away first: a client that is still sending when the connection closes
        never sees the answer.
        """
        await self._read(request, keep=False)
        raise refusal

    async def _read(self, request: Request, *, keep: bool) -> bytes:
        """The body, or nothing where it is thrown away."""
        body = bytearray()
        num_bytes = 0
        try:
            async with asyncio.timeout(self._limits.body_seconds):
                async for chunk in request.stream():
                    num_bytes += len(chunk)
                    if keep:
                        body += chunk
                    elif num_bytes > MAX_BODIES_DISCARDED * self._limits.max_body_bytes:
                        break
        except TimeoutError as error:
            text = f"body must arrive within {self._limits.body_seconds:g} s"
            raise _RefusalError(408, text) from error
        except ClientDisconnect as error:
            raise _RefusalError(499, "the client left") from error
        return bytes(body)


def _host_name(request: Request) -> str:
    """The name under which the caller found this server; empty where there is none to be read."""
    try:
        return urlsplit("//" + request.headers.get("host", "")).hostname or ""
    except ValueError:
        return ""


def _given_token(request: Request) -> str:
    """The caller's token: Bearer, or the password of Basic, which an address can carry."""
    kind, _, value = request.headers.get("authorization", "").partition(" ")
    if kind.lower() == "bearer":
        return value.strip()
    if kind.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).decode().partition(":")[2]
        except (binascii.Error, ValueError):
            return ""
    return ""


def _parse(body: bytes, read: Callable[[dict[str, Any]], _Asked]) -> tuple[dict[str, Any], _Asked]:
    try:
        parsed = parse_json(body)
    except WireError as error:
        raise _RefusalError(400, str(error)) from error
    try:
        return parsed, read(parsed)
    except WireError as error:
        raise _RefusalError(422, str(error)) from error


async def _answer(
    request: Request, pipeline: Pipeline, asked: _Asked, settings: ServerSettings
) -> list[Answer]:
    """Answers to all clips, unless the queue is full, time runs out, or the client leaves."""
    longest = settings.limits.deadline_seconds
    deadline = min(asked.deadline_seconds or longest, longest)
    work = asyncio.create_task(pipeline.answer(asked.clips))
    gone = asyncio.create_task(_leaves(request))
    try:
        await asyncio.wait((work, gone), timeout=deadline, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return work.result()
    except WireError as error:
        raise _RefusalError(422, str(error)) from error
    except OverloadedError as error:
        raise _RefusalError(429, str(error), {"Retry-After": str(error.retry_seconds)}) from error
    except BrokenError as error:
        raise _RefusalError(503, str(error)) from error
    finally:
        work.cancel()
        left = gone.done()
        gone.cancel()
    if left:
        raise _RefusalError(499, "the client left")
    raise _RefusalError(504, f"answer must be ready within {deadline:g} s, and was not")


async def _leaves(request: Request) -> None:
    """Return when the client closes the connection."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _answer_refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, _RefusalError)
    return _AsciiResponse({"error": str(error)}, error.status, error.headers)


async def _answer_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _AsciiResponse({"error": error.detail}, error.status_code, error.headers)
