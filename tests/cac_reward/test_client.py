"""What the client sends, tries again and gives up on, against a scripted server."""

import base64
import json
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch
from safetensors.torch import load

from cac_reward.client import RewardClient, ServerError
from cac_reward.frames import blame_map
from cac_reward.report import AnomalyReport, Finding, TimeWindow
from cac_reward.video import Video
from diffusion_rl.reward_contract import Reward, RewardSettings, ask_once, build_function
from diffusion_rl.rewards import judge_videos

VIDEOS = torch.arange(2 * 4 * 3 * 6 * 6).reshape(2, 4, 3, 6, 6).float() % 256 / 255


def report(score: float | None, error: str | None = None) -> AnomalyReport:
    return AnomalyReport(
        score=score,
        judge_id="scripted",
        fps=8.0,
        num_frames=4,
        findings=(Finding("vanish", TimeWindow(0.0, 0.25)),),
        error=error,
    )


def result(score: float | None, error: str | None = None) -> dict[str, Any]:
    status = "scored" if error is None else "unjudged"
    sent = report(score, error).to_dict()
    return {"status": status, "score": score, "error": error, "report": sent}


GOOD = (200, {"results": [result(0.25), result(None, "no verdict")]}, {})


class Scripted:
    """Answers with one line of its script after another; keeps what it was sent."""

    def __init__(self, *script: tuple[int, Any, dict[str, str]]) -> None:
        self.script = list(script)
        self.received: list[tuple[str, dict[str, Any], dict[str, str]]] = []
        self.url = ""

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        length = int(handler.headers.get("Content-Length", 0))
        body = json.loads(handler.rfile.read(length) or b"{}")
        self.received.append((handler.path, body, dict(handler.headers)))
        status, answer, headers = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        if status == 0:
            handler.connection.close()
            return
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        text = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        handler.wfile.write(text)


@contextmanager
def scripted(*script: tuple[int, Any, dict[str, str]]) -> Iterator[Scripted]:
    play = Scripted(*script)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            play.answer(self)

        do_GET = do_POST

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    play.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield play
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_the_reward_contract() -> None:
    with scripted(GOOD) as server:
        found = RewardClient(server.url, token="t")(VIDEOS, ["a", "b"], fps=8.0)
    assert found["score"][0] == 0.25
    assert math.isnan(found["score"][1])
    assert found.keys() == {"score", "blame", "reports"}
    assert found["reports"] == [report(0.25), report(None, "no verdict")]
    expected = blame_map(report(0.25).findings, 4, 6, 6, 8.0, 0.75)
    assert expected.max() > 0
    torch.testing.assert_close(found["blame"], torch.stack([expected, torch.zeros(4, 6, 6)]))
    ((path, body, headers),) = server.received
    assert path == "/v1/score"
    assert headers["Authorization"] == "Bearer t"
    assert 590 < body["deadline_seconds"] <= 600
    for row, sent in enumerate(body["videos"]):
        assert (sent["prompt"], sent["fps"]) == ("ab"[row], 8.0)
        frames = load(base64.b64decode(sent["safetensors"]))["frames"]
        assert torch.equal(frames, (VIDEOS[row] * 255).round().to(torch.uint8))


def test_a_run_takes_the_clients_answer_and_quotes_the_servers_reason() -> None:
    """As `target: cac_reward.client:RewardClient` of docs/rewards.md is asked."""
    bare = {"status": "scored", "score": 0.5, "error": None, "report": None}
    refused = {"status": "refused", "score": None, "error": "too short", "report": None}
    with scripted((200, {"results": [result(0.25), refused]}, {})) as server:
        settings = RewardSettings(
            name="cac",
            target="cac_reward.client:RewardClient",
            options={"base_url": server.url},
        )
        client = build_function(settings)
        found = ask_once("cac", client, VIDEOS, ["a", "b"], 8.0)
        reward = Reward("cac", client)
        with pytest.raises(RuntimeError, match='NaN for 1 of 2 .*last report: "too short"; '):
            judge_videos([reward], VIDEOS, ["a", "b"], fps=8.0, missing_limit=0.4)
    assert found.score[0] == 0.25
    assert bool(found.score[1].isnan())
    assert found.blame is not None
    assert bool(found.blame[0].any())
    assert not bool(found.blame[1].any())
    assert found.reports == [report(0.25), {"error": "too short"}]
    with scripted((200, {"results": [bare, refused]}, {})) as server:
        answer = RewardClient(server.url)(VIDEOS, ["a", "b"], fps=8.0)
    assert answer["reports"] == [None, {"error": "too short"}]


def test_requests_are_split_and_their_answers_put_together() -> None:
    one = (200, {"results": [result(0.5)]}, {})
    two = (200, {"results": [result(0.75)]}, {})
    with scripted(one, two) as server:
        found = RewardClient(server.url, clips_per_request=1)(VIDEOS, ["a", "b"], fps=8.0)
    assert found["score"].tolist() == [0.5, 0.75]
    assert [body["videos"][0]["prompt"] for _, body, _ in server.received] == ["a", "b"]


def test_clips_of_other_kinds_are_sent_too() -> None:
    video = Video((VIDEOS[0] * 255).round().to(torch.uint8), 12.0)
    with scripted(GOOD) as server:
        results = RewardClient(server.url).score([video, video])
    assert [one["score"] for one in results] == [0.25, None]
    assert server.received[0][1]["videos"][0]["fps"] == 12.0


@pytest.mark.parametrize(
    "passing",
    [
        (429, {"error": "queue is full"}, {"Retry-After": "0"}),
        (503, {"error": "broken"}, {}),
        (0, None, {}),
    ],
)
def test_what_passes_is_tried_again(passing: tuple[int, Any, dict[str, str]]) -> None:
    with scripted(passing, passing, GOOD) as server:
        results = RewardClient(server.url).score(list(VIDEOS), fps=8.0)
    assert results[0]["score"] == 0.25
    assert len(server.received) == 3


def test_retry_after_is_obeyed() -> None:
    with scripted((429, {}, {"Retry-After": "9"}), GOOD) as server:
        client = RewardClient(server.url, timeout_seconds=3)
        with pytest.raises(ServerError, match=r"gave no answer within 3 s; the last try: 429"):
            client.score(list(VIDEOS), fps=8.0)
    assert len(server.received) == 1


@pytest.mark.parametrize("status", [400, 401, 413, 422, 500, 504])
def test_what_does_not_pass_is_told_at_once(status: int) -> None:
    with scripted((status, {"error": "because"}, {}), GOOD) as server:
        said = rf"/v1/score answered {status}: .*because"
        with pytest.raises(ServerError, match=said):
            RewardClient(server.url).score(list(VIDEOS), fps=8.0)
    assert len(server.received) == 1


def test_the_token_follows_no_redirect() -> None:
    with scripted(GOOD) as stranger:
        away = (302, {}, {"Location": stranger.url + "/v1/score"})
        with scripted(away) as server, pytest.raises(ServerError, match="answered 302"):
            RewardClient(server.url, token="t").score(list(VIDEOS), fps=8.0)
    assert stranger.received == []


def test_a_server_that_is_not_there_is_told() -> None:
    with scripted(GOOD) as server:
        url = server.url
    client = RewardClient(url, timeout_seconds=0.5)
    with pytest.raises(ServerError, match=r"within 0.5 s; the last try: URLError: .*refused"):
        client.score(list(VIDEOS), fps=8.0)


def test_nonsense_is_told() -> None:
    with scripted((200, b"<html>", {})) as server, pytest.raises(ServerError, match="in JSON"):
        RewardClient(server.url).score(list(VIDEOS), fps=8.0)
    with scripted(GOOD) as server, pytest.raises(ServerError, match="answer 1 clips, got 2"):
        RewardClient(server.url).score([VIDEOS[0]], fps=8.0)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"base_url": "ftp://a"}, "base_url must be http://HOST or https://HOST, got 'ftp://a'"),
        ({"base_url": "127.0.0.1:8000"}, "base_url must be"),
        ({"base_url": "file:///etc/passwd"}, "base_url must be"),
        ({"timeout_seconds": 0}, "timeout_seconds must be above 0, got 0"),
        ({"clips_per_request": 0}, "clips_per_request must be at least 1, got 0"),
    ],
)
def test_wrong_settings_are_refused(arguments: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        RewardClient(**{"base_url": "http://127.0.0.1", **arguments})


def test_wrong_videos_are_refused_before_anything_is_sent() -> None:
    with scripted(GOOD) as server:
        client = RewardClient(server.url)
        with pytest.raises(ValueError, match="prompts must hold one text for each of 2 videos"):
            client(VIDEOS, ["a"], fps=8.0)
        with pytest.raises(ValueError, match="fps must be above 0"):
            client(VIDEOS, ["a", "b"], fps=0.0)
        with pytest.raises(ValueError, match=r"videos must be a tensor \[videos, frames, 3"):
            client(VIDEOS.transpose(1, 2), ["a", "b"], fps=8.0)
    assert server.received == []
