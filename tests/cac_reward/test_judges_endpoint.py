"""A judge elsewhere: as good as here where it gives log-probabilities, and honest where not."""

from __future__ import annotations

import json
import logging
import math
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from cac_reward import CaCScorer
from cac_reward.frames import JudgeSettings
from cac_reward.judges.base import NoAnswer
from cac_reward.judges.votes import first_choice
from cac_reward.questions import Message, scan_message

pytest.importorskip("openai", reason="the extra 'serve' is not installed")
from cac_reward.judges.endpoint import (
    EndpointJudge,
    EndpointOptions,
    message_text,
    write_messages,
)

JUDGE = Path("examples/toy_world/checkpoints/judge")
QUICK = {"max_retries": 1, "timeout_seconds": 5.0, "patch_factor": 8}
ASKED = (Message("user", ("Say A or B.",)),)


@contextmanager
def serving(*options: str) -> Iterator[str]:
    """A process that serves the toy judge; its address."""
    command = [sys.executable, "-m", "tests.openai_server", str(JUDGE), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            yield f"http://127.0.0.1:{int(process.stdout.readline())}/v1"
        finally:
            process.terminate()


@contextmanager
def transformers_serve(folder: Path) -> Iterator[str]:
    """`transformers serve` with a copy of the toy judge that samples; its address.

    The server takes from the model's own folder whether a temperature above 0 draws samples.
    """
    model = folder / "judge"
    shutil.copytree(JUDGE, model)
    generation = json.loads((model / "generation_config.json").read_text(encoding="utf-8"))
    text = json.dumps({**generation, "do_sample": True})
    (model / "generation_config.json").write_text(text, encoding="utf-8")
    program = "from transformers.cli.transformers import main; main()"
    asked = ["serve", str(model), "--device", "cpu", "--host", "127.0.0.1", "--port", "0"]
    log = folder / "log"
    with (
        log.open("wb") as output,
        subprocess.Popen(
            [sys.executable, "-c", program, *asked], stdout=output, stderr=output
        ) as process,
    ):
        try:
            deadline = time.monotonic() + 240
            while "running on " not in log.read_text(encoding="utf-8"):
                assert process.poll() is None, log.read_text(encoding="utf-8")
                assert time.monotonic() < deadline, log.read_text(encoding="utf-8")
                time.sleep(0.1)
            address = log.read_text(encoding="utf-8").partition("running on ")[2].split()[0]
            yield f"{address}/v1"
        finally:
            process.kill()


@contextmanager
def scripted(reply: Callable[[dict[str, Any]], tuple[int, Any]]) -> Iterator[str]:
    """A server that answers by a function of the request's body: (status, JSON or raw bytes)."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, content = reply({**body, "key": self.headers["Authorization"]})
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        server.server_close()


def said(text: str, top: dict[str, float] | None = None) -> dict[str, Any]:
    """An answer of the chat API."""
    logprobs = None
    if top is not None:
        listed = [{"token": k, "logprob": math.log(v), "bytes": None} for k, v in top.items()]
        logprobs = {"content": [{**listed[0], "top_logprobs": listed}], "refusal": None}
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "finish_reason": "stop", "message": message, "logprobs": logprobs}
    head = {"id": "1", "object": "chat.completion", "created": 0, "model": "m"}
    return {**head, "choices": [choice]}


def world_clips(count: int) -> torch.Tensor:
    """Clips of 24 x 24 pixels with 8-bit values: nothing is lost on the way to a server."""
    from examples.toy_world.world import WorldSettings, render_clip

    small = WorldSettings(size=24)
    clips = [render_clip(5000 + i, small, split="evaluation") for i in range(count)]
    frames = torch.stack([torch.from_numpy(clip.frames) for clip in clips])
    return frames.permute(0, 1, 4, 2, 3).float() / 255


@pytest.mark.parametrize("mode", ["full", "fast"])
def test_scores_agree_with_the_local_judge(mode: str) -> None:
    videos, prompts = world_clips(6), ["a clip"] * 6
    local = CaCScorer.from_pretrained(JUDGE, mode=mode)
    expected = local.inspect(videos, prompts, fps=8.0)
    with serving() as address:
        elsewhere = CaCScorer.from_endpoint(
            address,
            "toy",
            options=EndpointOptions(patch_factor=8),
            settings=JudgeSettings.load(JUDGE),
            mode=mode,
        )
        found = elsewhere.inspect(videos, prompts, fps=8.0)
    assert elsewhere.judge.judge_id == f"toy at {address}"
    assert {one.verdict for one in expected} >= {"clean", "anomalous"}
    for here, there in zip(expected, found, strict=True):
        assert there.reward == pytest.approx(here.reward, abs=1e-3, nan_ok=True)
        assert there.findings == here.findings
        assert there.windows == here.windows
        assert there.inspect_frames == here.inspect_frames
        # What is kept here between calls is sent, and read, again there.
        assert here.tokens is not None
        assert there.tokens is not None
        assert set(there.tokens) == set(here.tokens)
        assert there.tokens["scan.read"] >= here.tokens["scan.read"] > len(here.scan_frames)


def test_a_server_that_only_chats_is_asked_for_votes(caplog: pytest.LogCaptureFixture) -> None:
    with serving("--plain") as address, caplog.at_level(logging.WARNING):
        scorer = CaCScorer.from_endpoint(
            address,
            "toy",
            options=EndpointOptions(patch_factor=8, num_votes=2),
            settings=JudgeSettings.load(JUDGE),
        )
        reports = scorer.inspect(world_clips(2), fps=8.0)
    assert "verdicts are shares of votes" in caplog.text
    for report in reports:
        assert report.judge_id.endswith("(share of 2 votes)")
        # This server does not sample: its votes agree with each other.
        assert report.score in (0.0, 1.0)


def test_transformers_serve_is_asked_for_votes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = JudgeSettings.load(JUDGE)
    local = CaCScorer.from_pretrained(JUDGE, mode="fast")
    broken, clean = world_clips(2)
    (expected,) = local.inspect([clean], fps=8.0)
    times = [index / 8 for index in range(len(broken))]
    scan = [scan_message(broken, times, "brief")]
    written = local.judge.generate(scan, max_new_tokens=48)
    assert written[0].startswith("<tool_call>")
    with transformers_serve(tmp_path) as address, caplog.at_level(logging.WARNING):
        elsewhere = CaCScorer.from_endpoint(
            address,
            str(tmp_path / "judge"),
            options=EndpointOptions(patch_factor=8, num_votes=2, concurrency=1),
            settings=settings,
            mode="fast",
        )
        (found,) = elsewhere.inspect([clean], fps=8.0)
        assert elsewhere.judge.generate(scan, max_new_tokens=48) == written
    # It refuses to go on with an answer that has begun, and gives no log-probabilities.
    assert "verdicts are shares of votes" in caplog.text
    assert found.judge_id.endswith("(share of 2 votes)")
    assert expected.reward > 0.99
    assert (found.verdict, found.score) == ("clean", 1.0)


def chooser(top: dict[str, dict[str, float]]) -> Callable[[dict[str, Any]], tuple[int, Any]]:
    """Continues what was said so far by a table of probabilities."""

    def reply(body: dict[str, Any]) -> tuple[int, Any]:
        last = body["messages"][-1]
        begun = last["content"] if last["role"] == "assistant" else ""
        return 200, said("", {"x": 1.0} if begun == "Ye" else top[begun])

    return reply


def test_choices_are_weighed_token_by_token() -> None:
    table = {
        "P:": {"A": 0.5, "AB": 0.2, "B": 0.1},
        "P:A": {"C": 0.25, "B": 0.5},
        "P:AB": {"C": 0.4, "D": 0.5},
        "P:AC": {"D": 1.0},
    }
    with scripted(chooser(table)) as address:
        judge = EndpointJudge(address, "m", options=EndpointOptions(**QUICK))
        log_probs = judge.choice_log_probs(
            [ASKED, ASKED], choices=["ABC", "ACD", "B", "Q"], prefix="P:"
        )
    # The longest token that fits is taken; what is not listed has no more than the least listed.
    expected = torch.tensor([0.2 * 0.4, 0.5 * 0.25, 0.1, 0.1])
    torch.testing.assert_close(log_probs.exp(), expected.expand(2, -1))


def test_votes_are_counted_with_seeds_of_their_own() -> None:
    seeds = []

    def reply(body: dict[str, Any]) -> tuple[int, Any]:
        seeds.append(body["seed"])
        text = ["thinking\nVerdict: clean", "Verdict: anomalous", "no idea"][body["seed"] % 3]
        return 200, said(text)

    options = EndpointOptions(**QUICK, probabilities="votes", num_votes=6, seed=3)
    with scripted(reply) as address:
        judge = EndpointJudge(address, "m", options=options)
        log_probs = judge.choice_log_probs(
            [ASKED], choices=[" clean", " anomalous"], prefix="{}\nVerdict:"
        )
    assert sorted(seeds) == [3, 4, 5, 6, 7, 8]
    torch.testing.assert_close(judge.probabilities(log_probs), torch.tensor([[0.5, 0.5]]))
    assert log_probs.exp().sum() == 4  # two votes of six said neither


def test_what_may_pass_is_tried_again() -> None:
    tries = []

    def reply(body: dict[str, Any]) -> tuple[int, Any]:
        tries.append(body["key"])
        return (200, said("fine")) if len(tries) > 2 else (503, {"error": {"message": "busy"}})

    options = EndpointOptions(**{**QUICK, "max_retries": 2}, probabilities="log_probs")
    with scripted(reply) as address:
        judge = EndpointJudge(address, "m", options=options, api_key="secret")
        assert judge.generate([ASKED], max_new_tokens=4) == ["fine"]
    assert tries == ["Bearer secret"] * 3


def test_a_clip_that_fails_for_good_gets_no_score_and_harms_no_other() -> None:
    def reply(body: dict[str, Any]) -> tuple[int, Any]:
        if len(body["messages"][0]["content"]) > 6:
            return 500, {"error": {"message": "too hard"}}
        return 200, said("", {"Verdict": 0.9, ":": 0.8, " clean": 0.9, " anomalous": 0.1})

    options = EndpointOptions(**QUICK, probabilities="log_probs")
    settings = JudgeSettings.load(JUDGE)
    with scripted(reply) as address:
        scorer = CaCScorer.from_endpoint(address, "m", options=options, settings=settings)
        videos = [torch.rand(frames, 3, 24, 24) for frames in (2, 13)]
        reports = scorer.inspect(videos, fps=8.0)
        answers = scorer.judge.generate(
            [scan_message(video, [i / 8 for i in range(len(video))], "brief") for video in videos],
            max_new_tokens=4,
        )
    assert reports[0].score == pytest.approx(0.9)  # against 0.1; a call is not among the likeliest
    assert reports[0].error is None
    assert reports[1].score is None
    assert "the judge gave no probabilities" in reports[1].error
    assert isinstance(answers[1], NoAnswer)
    assert "too hard" in answers[1].reason
    assert not isinstance(answers[0], NoAnswer)


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ((401, {"error": {"message": "bad key"}}), "bad key; check address, model and key"),
        ((404, {"error": {"message": "no model m"}}), "must answer for the model 'm', got: .*no m"),
        ((500, {"error": {"message": "down"}}), "got: .*down; check address"),
    ],
)
def test_a_wrong_key_or_model_is_an_error_at_once(reply: tuple, message: str) -> None:
    with scripted(lambda body: reply) as address, pytest.raises(RuntimeError, match=message):
        EndpointJudge(address, "m", options=EndpointOptions(**{**QUICK, "max_retries": 0}))


def test_nobody_there_is_an_error_that_names_the_address() -> None:
    with scripted(lambda body: (200, said(""))) as address:
        pass
    options = EndpointOptions(**{**QUICK, "max_retries": 0}, probabilities="votes")
    judge = EndpointJudge(address, "m", options=options)
    with pytest.raises(RuntimeError, match=f"endpoint {address} must answer"):
        judge.generate([ASKED, ASKED], max_new_tokens=1)


def test_a_server_that_hangs_is_given_up() -> None:
    def reply(body: dict[str, Any]) -> tuple[int, Any]:
        if "slow" in str(body["messages"]):
            time.sleep(2)
        return 200, said("done")

    options = EndpointOptions(
        **{**QUICK, "max_retries": 0, "timeout_seconds": 0.5}, probabilities="votes"
    )
    with scripted(reply) as address:
        judge = EndpointJudge(address, "m", options=options)
        slow = (Message("user", ("slow",)),)
        answers = judge.generate([slow, ASKED], max_new_tokens=1)
    assert isinstance(answers[0], NoAnswer)
    assert answers[1] == "done"


@pytest.mark.parametrize("content", [b"not json", {"choices": []}])
def test_rubbish_is_no_answer(content: object) -> None:
    options = EndpointOptions(**{**QUICK, "max_retries": 0}, probabilities="votes")
    with scripted(lambda body: (200, content)) as address:
        judge = EndpointJudge(address, "m", options=options)
        (answer,) = judge.generate([ASKED], max_new_tokens=1)
    assert isinstance(answer, NoAnswer)


def test_no_more_requests_at_once_than_allowed() -> None:
    under_way, most, lock = 0, 0, threading.Lock()

    def reply(body: dict[str, Any]) -> tuple[int, Any]:
        nonlocal under_way, most
        with lock:
            under_way += 1
            most = max(most, under_way)
        time.sleep(0.02)
        with lock:
            under_way -= 1
        return 200, said("ok")

    options = EndpointOptions(**QUICK, probabilities="votes", concurrency=3)
    with scripted(reply) as address:
        judge = EndpointJudge(address, "m", options=options)
        assert judge.generate([ASKED] * 20, max_new_tokens=1) == ["ok"] * 20
    assert most == 3


def test_a_tool_turn_goes_as_the_users_in_its_tags() -> None:
    frame = torch.zeros(3, 8, 8)
    (written,) = write_messages([Message("tool", ("<0.10 seconds>", frame, "Judge."))])
    assert written["role"] == "user"
    kinds = [part["type"] for part in written["content"]]
    assert kinds == ["text", "image_url", "text"]
    assert written["content"][0]["text"] == "<tool_response>\n<0.10 seconds>"
    assert written["content"][2]["text"] == "Judge.\n</tool_response>"
    assert written["content"][1]["image_url"]["url"].startswith("data:image/png;base64,")


def test_a_call_taken_apart_is_written_out_again() -> None:
    from types import SimpleNamespace as Record

    function = Record(name="inspect", arguments='{"windows": [[0.5, 1.0]]}')
    message = Record(content=None, tool_calls=[Record(function=function)])
    assert message_text(message) == (
        '<tool_call>\n{"name": "inspect", "arguments": {"windows": [[0.5, 1.0]]}}\n</tool_call>'
    )


def test_the_first_choice_made_counts() -> None:
    choices = ["Verdict: clean", "<tool_call>", "Verdict: anomalous"]
    assert first_choice("<tool_call>\n...Verdict: clean", "", choices) == [0, 1, 0]
    assert first_choice("Verdict: anomalous", "", choices) == [0, 0, 1]
    assert first_choice("hm", "", choices) == [0, 0, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"probabilities": "x"}, "probabilities must be one of .*, got 'x'"),
        ({"num_votes": 1}, "num_votes must be at least 2, got 1"),
        ({"concurrency": 0}, "concurrency must be at least 1, got 0"),
        ({"max_retries": -1}, "max_retries must be at least 0, got -1"),
        ({"timeout_seconds": 0}, "timeout_seconds must be above 0, got 0"),
        ({"temperature": math.inf}, "temperature must be above 0, got inf"),
    ],
)
def test_options_outside_their_range_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EndpointOptions(**options)
