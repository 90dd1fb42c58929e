"""A real server process on loopback: routes, overload, deaths, and an end that loses nothing."""

import base64
import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")
pytest.importorskip("uvicorn", reason="the extra 'serve' is not installed")

from cac_reward.client import RewardClient
from cac_reward.scorer import CaCScorer
from cac_reward.video import Video
from tests.serving import Server, running_server

TOKEN = "a-token-of-the-tests"


def shade(value: int, size: int = 8) -> torch.Tensor:
    """A clip [3 3 size size] uint8 of one brightness, which is its score under the stub."""
    return torch.full((3, 3, size, size), value, dtype=torch.uint8)


def as_frames(value: int) -> list[str]:
    picture = Image.new("RGB", (8, 8), (value, value, value))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return [base64.b64encode(buffer.getvalue()).decode()] * 3


def clip(value: int, prompt: str = "") -> dict[str, Any]:
    return {"frames": as_frames(value), "prompt": prompt, "fps": 8.0}


def as_mp4(value: int) -> str:
    return base64.b64encode(Video(shade(value, 16), 8.0).encode(crf=0)).decode()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("media") / "root"
    folder.mkdir()
    Video(shade(153, 16), 8.0).save(folder / "good.mp4", crf=0)
    Video(shade(153, 16), 8.0).save(folder.parent / "secret.mp4")
    (folder / "link.mp4").symlink_to(folder.parent / "secret.mp4")
    return folder


@pytest.fixture(scope="module")
def server(root: Path) -> Iterator[Server]:
    options = ["--scorer", "tests.serving:stub", "--media-root", str(root), "--max-queue", "8"]
    options += ["--max-batch", "2", "--num-decoders", "1", "--max-body-bytes", "200000"]
    with running_server(*options, CAC_REWARD_TOKEN=TOKEN) as running:
        yield running


def test_every_form_of_a_clip_is_scored(server: Server, root: Path) -> None:
    results = server.score(
        {"mp4": as_mp4(51), "prompt": "a"},
        clip(102, "b"),
        {"path": "good.mp4", "prompt": "c"},
        {"path": str(root / "good.mp4"), "fps": 4.0},
    )
    scores = [one["score"] for one in results]
    assert scores == pytest.approx([0.2, 0.4, 0.6, 0.6], abs=0.005)
    assert [one["report"]["prompt"] for one in results] == ["a", "b", "c", ""]
    assert [one["report"]["fps"] for one in results] == [8.0, 8.0, 8.0, 4.0]
    assert "report" not in server.score(clip(3), reports=False)[0]
    assert server.score() == []


def test_unirls_and_flow_factorys_routes(server: Server) -> None:
    history = [
        {"text": "unknown" if value == 9 else "p", "video_b64": as_mp4(value)} for value in (51, 9)
    ]
    asked = [
        {"history": [turn], "required_rewards": ["cac"], "request_id": turn["text"]}
        for turn in history
    ]
    status, body, _ = server.ask("POST", "/score", {"protocol_version": "1", "requests": asked})
    assert status == 200
    assert body["results"][0]["cac"]["p_clean"] == pytest.approx(0.2, abs=0.005)
    assert body["results"][1] == {}
    assert body["errors"] == [{}, {"cac": "told not to know"}]
    assert [one["request_id"] for one in body["identities"]] == ["p", "unknown"]
    asked = {"prompt": ["a", "b"], "video": [as_frames(51), as_frames(102)], "kwargs": {"fps": 8}}
    status, body, _ = server.ask("POST", "/compute", asked)
    assert body["rewards"] == pytest.approx([0.2, 0.4])


def test_a_bad_clip_does_not_spoil_its_neighbours(server: Server) -> None:
    whole = base64.b64decode(as_mp4(51))
    cut = base64.b64encode(whole[: len(whole) // 2]).decode()
    bad = [{"mp4": cut}, {"path": "link.mp4"}, {"path": "../secret.mp4"}, {"path": "/etc/passwd"}]
    results = server.score(clip(51), *bad, clip(102, "unknown"), clip(153))
    statuses = ["scored", *["refused"] * 4, "unjudged", "scored"]
    assert [one["status"] for one in results] == statuses
    assert "videos[1]" in results[1]["error"]
    for one in results[2:5]:
        assert "path must name a regular file under the server's media root" in one["error"]
    assert [results[row]["score"] for row in (0, 6)] == pytest.approx([0.2, 0.6])
    assert all(one["score"] is None for one in results[1:6])


def test_the_door_is_shut(server: Server) -> None:
    body = {"videos": []}
    assert server.ask("POST", "/v1/score", body)[0] == 200
    assert server.ask("POST", "/v1/score", body, Authorization="Bearer wrong")[0] == 401
    assert server.ask("GET", "/metrics", Authorization="")[0] == 401
    assert server.ask("GET", "/health", Authorization="")[0] == 200
    assert server.ask("POST", "/v1/score", body, Content_Type="text/plain")[0] == 415
    assert server.ask("POST", "/v1/score", b" " * 200_001)[0] == 413
    assert server.ask("POST", "/v1/score", b" " * 790_000, Authorization="")[0] == 401
    body = {"videos": [clip(1)] * 9}
    status, answer, _ = server.ask("POST", "/v1/score", body)
    assert (status, answer["error"]) == (
        422,
        "request must hold at most max_queue=8 clips, got 9",
    )
    assert server.ask("POST", "/v1/score", {"videos": [{"mp4": "!"}]})[0] == 422
    command = Path(f"/proc/{server.process.pid}/cmdline").read_bytes()
    (model,) = server.children("judging")
    (decoder,) = server.children("decoding")
    for pid in (model, decoder):
        assert TOKEN.encode() not in Path(f"/proc/{pid}/environ").read_bytes()
        command += Path(f"/proc/{pid}/cmdline").read_bytes()
    assert TOKEN.encode() not in command
    assert TOKEN not in server.log.read_text(encoding="utf-8")


def test_a_deadline_is_kept_and_the_place_given_back(server: Server) -> None:
    body = {"videos": [clip(1, "sleep 1"), clip(2)], "deadline_seconds": 0.2}
    status, answer, _ = server.ask("POST", "/v1/score", body)
    assert (status, answer["error"]) == (504, "answer must be ready within 0.2 s, and was not")
    assert server.score(clip(51))[0]["score"] == pytest.approx(0.2)
    assert server.metric("queued_clips") == 0
    assert server.metric("pending_bytes") == 0


def test_at_four_times_the_queue_nothing_is_lost_or_doubled(server: Server) -> None:
    before = server.metric('clips_total{status="scored"}')

    def ask(value: int) -> tuple[int, Any, dict[str, str]]:
        return server.ask("POST", "/v1/score", {"videos": [clip(value, "sleep 0.05")]})

    with ThreadPoolExecutor(32) as threads:
        answers = list(threads.map(ask, range(100, 132)))
    scored = 0
    for value, (status, body, headers) in zip(range(100, 132), answers, strict=True):
        assert status in (200, 429), body
        if status == 200:
            scored += 1
            assert body["results"][0]["score"] == pytest.approx(value / 255)
        else:
            assert 1 <= int(headers["retry-after"]) <= 60
            assert "queue must hold at most 8 clips" in body["error"]
    assert 8 <= scored < 32
    assert server.metric('clips_total{status="scored"}') - before == scored
    assert server.metric("queued_clips") == 0


def test_the_client_gets_every_answer_in_spite_of_overload(server: Server) -> None:
    client = RewardClient(server.url, token=TOKEN, clips_per_request=2)
    videos = torch.stack([shade(value).float() / 255 for value in range(200, 212)])

    def ask(rows: range) -> torch.Tensor:
        return client(videos[rows], ["sleep 0.02"] * len(rows), fps=8.0)["score"]

    with ThreadPoolExecutor(4) as threads:
        scores = torch.cat(list(threads.map(ask, [range(s, s + 3) for s in range(0, 12, 3)])))
    torch.testing.assert_close(scores, torch.arange(200, 212) / 255)


def test_killing_the_model_loses_nothing(server: Server, tmp_path: Path) -> None:
    restarts = server.metric("model_restarts_total")
    (model,) = server.children("judging")

    def ask(value: int) -> list[dict[str, Any]]:
        return server.score(clip(value, "sleep 0.4"))

    with ThreadPoolExecutor(6) as threads:
        answers = [threads.submit(ask, value) for value in range(50, 56)]
        time.sleep(0.5)
        os.kill(model, signal.SIGKILL)
        found = [answer.result()[0] for answer in answers]
    assert [one["score"] for one in found] == pytest.approx([v / 255 for v in range(50, 56)])
    assert server.metric("model_restarts_total") == restarts + 1
    assert server.children("judging") != [model]


def test_a_clip_that_kills_the_model_is_told_and_its_neighbours_are_scored(
    server: Server, tmp_path: Path
) -> None:
    once = server.score(clip(51, f"die_once {tmp_path / 'marker'}"), clip(102))
    assert [one["score"] for one in once] == pytest.approx([0.2, 0.4])
    good, bad = server.score(clip(51), clip(102, "die"))
    assert good["score"] == pytest.approx(0.2)
    assert bad["status"] == "failed"
    assert "videos[1] could not be judged in 2 tries: the model process ended" in bad["error"]
    good, bad = server.score(clip(51), clip(102, "raise no"))
    assert good["score"] == pytest.approx(0.2)
    assert "in 2 tries: ValueError: told to raise: no" in bad["error"]


def test_killing_a_decoder_loses_nothing(server: Server) -> None:
    (decoder,) = server.children("decoding")
    os.kill(decoder, signal.SIGKILL)
    assert server.score(clip(51))[0]["score"] == pytest.approx(0.2)
    assert server.metric("decoder_restarts_total") == 1


def test_the_spool_is_empty_when_nothing_is_asked(server: Server) -> None:
    (spool,) = server.log.parent.glob("cac_reward_*")
    assert list(spool.iterdir()) == []
    assert spool.stat().st_mode & 0o077 == 0


def test_the_end_answers_what_was_accepted_and_leaves_nothing() -> None:
    options = ["--scorer", "tests.serving:stub", "--frames-fps", "8", "--num-decoders", "1"]
    with running_server(*options) as server:
        children = [*server.children("judging"), *server.children("decoding")]
        assert len(children) == 2
        answers: list[Any] = []
        shades = range(100, 120)
        many = [{"frames": as_frames(value), "prompt": "sleep 0.1"} for value in shades]
        asking = threading.Thread(target=lambda: answers.append(server.score(*many)))
        asking.start()
        while server.metric("queued_clips") == 0:
            time.sleep(0.01)
        assert server.stop(signal.SIGTERM) == 0
        asking.join()
        scores = [one["score"] for one in answers[0]]
        assert scores == pytest.approx([value / 255 for value in shades])
        assert not [pid for pid in children if Path(f"/proc/{pid}").exists()]
        assert list(server.log.parent.glob("cac_reward_*")) == []
        assert "Traceback" not in server.log.read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_toy_judge_over_http_says_what_it_says_here(
    toy_judge_folder: Path, toy_videos: torch.Tensor
) -> None:
    videos = (toy_videos * 255).round() / 255
    prompts = ["a red square", "a blue circle"]
    asked = {"mode": "fast", "scan": {"max_frames": 5}, "attention": "eager"}
    here = CaCScorer.from_pretrained(toy_judge_folder, **asked)(videos, prompts, fps=8.0)
    options = ["--mode", "fast", "--scan", "max_frames=5", "--attention", "eager"]
    with running_server("--judge", str(toy_judge_folder), *options) as server:
        there = RewardClient(server.url)(videos, prompts, fps=8.0)
    assert len(here["reports"][0].scan_frames) == 5
    # With so few frames it may fail to judge one of them; not to be judged is an answer, too.
    assert not here["score"].isnan().all()
    torch.testing.assert_close(there["score"], here["score"], equal_nan=True)
    torch.testing.assert_close(there["blame"], here["blame"], equal_nan=True)
    for one, other in zip(there["reports"], here["reports"], strict=True):
        assert one is not None
        assert one.findings == other.findings
        assert one.judge_id == other.judge_id
        assert (one.settings, one.attention) == (other.settings, "eager")


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (["--scorer", "no_such_module:x", "--num-decoders", "1"], 1, "could not start"),
        (["--scorer", "a:b", "--host", "0.0.0.0"], 2, "host must be a loopback address"),
        (["--scorer", "a:b", "--max-frames", "0"], 2, "max_frames must be above 0, got 0"),
        (["--scorer", "a:b", "--mode", "fast"], 2, "mode must be left out with scorer, got 'fast'"),
        (["--scorer", "a:b", "--scan", "fps=2"], 2, "scan must be left out with scorer"),
        (["--judge", "x", "--seed", "1"], 2, "seed must be left out without num_votes"),
        (
            ["--judge", "/no/x", "--num-decoders", "1"],
            1,
            "judge must be an existing folder where a path is given, got '/no/x'",
        ),
        (["--scorer", "a:b", "--token-file", "/no/file"], 2, "No such file"),
        ([], 2, "one of the arguments --judge --scorer is required"),
    ],
)
def test_a_server_that_cannot_serve_says_why(arguments: list[str], status: int, text: str) -> None:
    command = [sys.executable, "-m", "cac_reward.server", "--port", "0", *arguments]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == status, run.stderr
    assert text in run.stderr
    assert ("No module named 'no_such_module'" in run.stderr) == ("no_such_module:x" in arguments)
    assert "Traceback" not in run.stderr
