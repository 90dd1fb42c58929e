"""The door and the queue without processes: who comes in, with how much, and what is answered."""

import asyncio
import base64
import json
import os
import signal
import time
from collections.abc import Sequence
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")

from cac_reward.server.app import make_app
from cac_reward.server.children import (
    Child,
    ChildDiedError,
    ChildTimeoutError,
    child_environment,
)
from cac_reward.server.metrics import Metrics
from cac_reward.server.pipeline import BrokenError, OverloadedError
from cac_reward.server.settings import ServerLimits, ServerSettings
from cac_reward.server.wire import Answer, ClipRequest, WireError

TOKEN = "a-token-of-the-tests"
BODY = json.dumps({"videos": [{"path": "a.mp4", "prompt": "p"}]}).encode()
JSON = {"Content-Type": "application/json"}


class FakePipeline:
    """Answers with a fixed score, or does what it is told."""

    def __init__(self, action: Exception | float = 0.0) -> None:
        self.action = action
        self.judge = "fake"
        self.broken = asyncio.Event()
        self.cancelled = False

    async def answer(self, requests: Sequence[ClipRequest]) -> list[Answer]:
        if isinstance(self.action, Exception):
            raise self.action
        try:
            await asyncio.sleep(self.action)
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        return [Answer("scored", score=0.5, report={}) for _ in requests]


class Caller:
    """Sends requests straight into the app."""

    def __init__(self, pipeline: FakePipeline | None = None, **settings: Any) -> None:
        self.pipeline = pipeline or FakePipeline()
        self.metrics = Metrics()
        self.app = make_app(ServerSettings(**settings), self.pipeline, self.metrics)

    def __call__(
        self,
        method: str = "POST",
        path: str = "/v1/score",
        body: bytes = BODY,
        headers: dict[str, str] = JSON,
        *,
        stays: bool = True,
    ) -> tuple[int, Any, dict[str, str]]:
        return asyncio.run(self._call(method, path, body, headers, stays))

    async def _call(
        self, method: str, path: str, body: bytes, headers: dict[str, str], stays: bool
    ) -> tuple[int, Any, dict[str, str]]:
        given = {"Host": "127.0.0.1:8000", "Content-Length": str(len(body)), **headers}
        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "root_path": "",
            "headers": [(k.lower().encode(), v.encode()) for k, v in given.items() if v],
            "server": ("127.0.0.1", 8000),
            "client": ("127.0.0.1", 1),
        }
        waiting = [{"type": "http.request", "body": body, "more_body": False}]
        sent: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            if waiting:
                return waiting.pop(0)
            if stays:
                await asyncio.Event().wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        await self.app(scope, receive, send)
        await asyncio.sleep(0.01)
        self.cancelled = self.pipeline.cancelled  # The end of the loop would cancel it anyhow.
        headers = {name.decode(): value.decode() for name, value in sent[0]["headers"]}
        text = b"".join(one.get("body", b"") for one in sent[1:]).decode()
        is_json = headers["content-type"] == "application/json"
        return sent[0]["status"], json.loads(text) if is_json else text, headers


def bearer(token: str) -> dict[str, str]:
    return {**JSON, "Authorization": f"Bearer {token}"}


def basic(password: str) -> dict[str, str]:
    code = base64.b64encode(f"user:{password}".encode()).decode()
    return {**JSON, "Authorization": f"Basic {code}"}


def test_a_request_is_answered() -> None:
    status, body, _ = Caller()()
    assert status == 200
    result = {"status": "scored", "score": 0.5, "error": None, "report": {}}
    assert body == {"results": [result], "judge": "fake"}


@pytest.mark.parametrize("headers", [bearer(TOKEN), basic(TOKEN)])
def test_who_knows_the_token_is_let_in(headers: dict[str, str]) -> None:
    assert Caller(token=TOKEN)(headers=headers)[0] == 200


@pytest.mark.parametrize(
    "headers",
    [
        JSON,
        bearer(""),
        bearer(TOKEN[:-1]),
        bearer(TOKEN + "x"),
        bearer("\u00e4" * 16),
        basic("wrong"),
        {**JSON, "Authorization": "Basic !"},
        {**JSON, "Authorization": "Basic /////w=="},
        {**JSON, "Authorization": TOKEN},
        {**JSON, "Authorization": f"Digest {TOKEN}"},
    ],
)
@pytest.mark.parametrize("path", ["/v1/score", "/score", "/compute", "/rewards", "/metrics"])
def test_who_does_not_is_not(headers: dict[str, str], path: str) -> None:
    method = "GET" if path in ("/rewards", "/metrics") else "POST"
    status, body, answered = Caller(token=TOKEN)(method, path, headers=headers)
    assert status == 401
    assert "token must be sent as 'Authorization: Bearer TOKEN'" in body["error"]
    assert answered["www-authenticate"] == "Bearer"


def test_health_is_told_to_everybody() -> None:
    caller = Caller(token=TOKEN)
    health = {"status": "ok", "rewards": {"cac": ["p_clean"]}}
    assert caller("GET", "/health")[:2] == (200, health)
    caller.pipeline.broken.set()
    status, body, _ = caller("GET", "/health")
    assert status == 503
    assert "cannot be started" in body["error"]


def test_rewards_as_unirl_lists_them() -> None:
    assert Caller()("GET", "/rewards")[1] == {"rewards": ["cac"], "judge": "fake"}


@pytest.mark.parametrize("host", ["evil.org", "127.0.0.1.evil.org:8000", "10.0.0.1", "[::1", ""])
def test_without_a_token_another_host_name_is_refused(host: str) -> None:
    status, body, _ = Caller()(headers={**JSON, "Host": host})
    assert status == 403
    assert "Host must be a loopback name" in body["error"]
    assert Caller(token=TOKEN)(headers={**bearer(TOKEN), "Host": host})[0] == 200


def taking_a_body() -> list[str]:
    """Every route that reads a body, from the app itself."""
    app = Caller().app
    return sorted(one.path for one in app.routes if "POST" in getattr(one, "methods", ()))


@pytest.mark.parametrize(
    "kind",
    [
        *("text/plain", "application/x-www-form-urlencoded", "", "json", "multipart/form-data"),
        *("application/jsonp", "application/octet-stream", "video/mp4", "text/plain;json"),
    ],
)
@pytest.mark.parametrize("path", ["/compute", "/score", "/v1/score"])
def test_only_json_is_read_on_every_route(path: str, kind: str) -> None:
    assert taking_a_body() == ["/compute", "/score", "/v1/score"]
    caller = Caller()
    status, body, _ = caller("POST", path, headers={"Content-Type": kind})
    assert status == 415
    expected = kind.partition(";")[0]
    assert f"Content-Type must be application/json, got {expected!r}" in body["error"]
    assert caller.metrics.pending_bytes == 0
    # The same body is not refused for its type where the type is right.
    for right in ("application/json", "Application/JSON; charset=utf-8"):
        assert caller("POST", path, headers={"Content-Type": right})[0] != 415


def test_a_body_must_state_a_length_and_keep_it_small() -> None:
    limits = ServerLimits(max_body_bytes=len(BODY))
    assert Caller(limits=limits)()[0] == 200
    status, body, _ = Caller(limits=limits)(body=BODY + b" ")
    assert (status, body["error"]) == (
        413,
        f"body must have at most {len(BODY)} bytes, got {len(BODY) + 1}",
    )
    for length in ("", "-1", "1e3", "9" * 5000):
        status, body, _ = Caller(limits=limits)(headers={**JSON, "Content-Length": length})
        assert (status, body["error"]) == (411, "Content-Length must be given")


def test_all_bodies_together_are_bounded_and_given_back() -> None:
    caller = Caller(limits=ServerLimits(max_pending_bytes=len(BODY)))
    caller.metrics.pending_bytes = 1
    status, body, headers = caller()
    assert status == 429
    assert "pending requests must stay within" in body["error"]
    assert headers["retry-after"] == "1"
    caller.metrics.pending_bytes = 0
    assert [caller()[0] for _ in range(3)] == [200] * 3
    assert caller.metrics.pending_bytes == 0


@pytest.mark.parametrize(
    ("body", "status", "text"),
    [
        (b"{", 400, "body must be JSON"),
        (b"{}", 422, "body must have 'videos'"),
        (b'{"videos": [{"url": "http://127.0.0.1"}]}', 422, "no key but"),
    ],
)
def test_what_breaks_the_schema_is_told(body: bytes, status: int, text: str) -> None:
    caller = Caller()
    got, answer, _ = caller(body=body)
    assert got == status
    assert text in answer["error"]
    assert caller.metrics.pending_bytes == 0


def test_unknown_routes_and_methods_are_told_in_json() -> None:
    assert Caller()("GET", "/docs")[:2] == (404, {"error": "Not Found"})
    assert Caller()("GET", "/openapi.json")[0] == 404
    assert Caller()("GET", "/v1/score")[:2] == (405, {"error": "Method Not Allowed"})


@pytest.mark.parametrize(
    ("action", "status", "text", "retry"),
    [
        (OverloadedError("queue is full", 7), 429, "queue is full", "7"),
        (BrokenError("it broke"), 503, "it broke", None),
        (WireError("no base64"), 422, "no base64", None),
        (9.0, 504, "answer must be ready within 0.05 s, and was not", None),
    ],
)
def test_what_the_pipeline_says_becomes_a_status(
    action: Exception | float, status: int, text: str, retry: str | None
) -> None:
    caller = Caller(FakePipeline(action))
    body = json.dumps({"videos": [{"path": "a"}], "deadline_seconds": 0.05}).encode()
    got, answer, headers = caller(body=body)
    assert (got, headers.get("retry-after")) == (status, retry)
    assert text in answer["error"]
    assert caller.cancelled == (status == 504)
    assert caller.metrics.value("requests_total", route="/v1/score", status=str(status)) == 1


def test_a_deadline_cannot_pass_the_servers() -> None:
    caller = Caller(FakePipeline(9.0), limits=ServerLimits(deadline_seconds=0.05))
    body = json.dumps({"videos": [], "deadline_seconds": 100}).encode()
    assert caller(body=body)[0] == 504


def test_work_is_given_up_when_the_client_leaves() -> None:
    caller = Caller(FakePipeline(9.0))
    began = time.monotonic()
    assert caller(stays=False)[0] == 499
    assert caller.cancelled
    assert time.monotonic() - began < 5


def test_what_is_echoed_need_not_be_unicode() -> None:
    request = {"history": [{"text": "", "video_path": "a"}], "required_rewards": ["cac"]}
    body = json.dumps({"requests": [{**request, "request_id": "\ud800"}]}).encode()
    status, answer, _ = Caller()(path="/score", body=body)
    assert status == 200
    assert answer["identities"][0]["request_id"] == "\ud800"


def test_metrics_are_what_prometheus_reads() -> None:
    caller = Caller()
    caller()
    caller(body=b"{")
    status, page, headers = caller("GET", "/metrics")
    assert status == 200
    assert headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = page.splitlines()
    assert 'cac_reward_requests_total{route="/v1/score",status="200"} 1' in lines
    assert 'cac_reward_requests_total{route="/v1/score",status="400"} 1' in lines
    assert 'cac_reward_request_seconds_bucket{le="+Inf"} 2' in lines
    assert "cac_reward_request_seconds_count 2" in lines
    samples = [line for line in lines if not line.startswith("#")]
    for line in samples:
        name, value = line.rsplit(" ", 1)
        assert float(value) >= 0
        assert name.startswith("cac_reward_")
    kinds = [line for line in lines if line.startswith("# TYPE")]
    assert len(kinds) == len(set(kinds)) == 10


def test_a_histogram_counts_what_is_not_longer() -> None:
    metrics = Metrics()
    for seconds in (0.05, 0.06, 1000.0):
        metrics.observe_request(seconds)
    page = metrics.render()
    assert 'bucket{le="0.05"} 1\n' in page
    assert 'bucket{le="0.1"} 2\n' in page
    assert 'bucket{le="300"} 2\n' in page
    assert 'bucket{le="+Inf"} 3\n' in page


def echo() -> Child:
    return Child("the echo", "tests.serving", [])


def test_a_child_answers_and_what_it_prints_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAC_REWARD_TOKEN", TOKEN)
    monkeypatch.syspath_prepend(os.getcwd())

    async def talk() -> None:
        child = echo()
        assert child.process_id is None
        assert await child.start(60) == {"ready": True, "token": None}  # The secret stays here.
        for number in range(3):
            assert await child.ask({"number": number}, 60) == {"number": number}
        first = child.process_id
        assert first is not None
        # Ctrl-C goes to the server's whole group; its children still have work to finish.
        assert os.getpgid(first) != os.getpgid(0)
        with pytest.raises(ChildDiedError, match="the echo ended with status 5"):
            await child.ask({"end": 5}, 60)
        assert child.process_id is None
        with pytest.raises(ChildDiedError, match="the echo ended with status 5"):
            await child.ask({}, 60)
        await child.start(60)
        assert child.process_id not in (None, first)
        with pytest.raises(ChildTimeoutError, match="the echo took longer than 0.1 s"):
            await child.ask({"sleep": 30}, 0.1)
        await child.start(60)
        assert child.process_id is not None
        os.kill(child.process_id, signal.SIGKILL)
        with pytest.raises(ChildDiedError, match="the echo ended with status -9"):
            await child.ask({"sleep": 30}, 60)
        await child.kill()

    asyncio.run(talk())


def test_a_bare_child_sees_no_more_than_it_needs() -> None:
    parent = {"PATH": "/bin", "HF_TOKEN": "secret", "CAC_REWARD_TOKEN": TOKEN}
    assert set(child_environment(parent, bare=True)) == {"PATH", "PYTHONPATH"}
    assert set(child_environment(parent, bare=False)) == {"PATH", "PYTHONPATH", "HF_TOKEN"}


def test_a_child_that_does_not_start_is_told() -> None:
    async def talk() -> None:
        with pytest.raises(ChildDiedError, match="the stranger ended with status 1"):
            await Child("the stranger", "no_such_module_at_all", []).start(60)

    asyncio.run(talk())
