"""Rewards elsewhere answer as those here do, and every way they can fail has a name."""

from __future__ import annotations

import errno
import fcntl
import http.client as http_client
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from cac_reward.client import RewardClient
from diffusion_rl import processes, remote_rewards
from diffusion_rl.remote_rewards import HttpReward, ProcessReward
from diffusion_rl.reward_contract import RewardFailed, RewardRefused
from diffusion_rl.reward_worker import write_message
from diffusion_rl.rewards import Reward, RewardSettings, ask_rewards, build_reward, judge_videos
from tests.score_server import by_redness, score_server
from tests.serving import running_server

PROMPTS = ["a", "b", "unknown", "d"]
VIDEOS = torch.rand(4, 3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
ENDED = os.WEXITED | os.WNOHANG | os.WNOWAIT
RED = VIDEOS[:, :, 0].mean((1, 2, 3))


class Report:
    """A report that knows how to become JSON, as those of CaC do."""

    def __init__(self, error: str | None, **more: Any) -> None:
        self.error = error
        self.more = more

    def to_dict(self) -> dict[str, Any]:
        return {"error": self.error, "process": os.getpid(), **self.more}


def act(videos: Tensor, prompts: Sequence[str], *, fps: float, bonus: float = 0.0) -> Any:
    """A reward that does what the first prompt says."""
    print("a library prints")
    word, _, value = prompts[0].partition(" ")
    if word == "help":
        start_helpers(value)
        word, _, value = prompts[1].partition(" ")
    if word == "die":
        print("the card fell off the bus", file=sys.stderr, flush=True)
        os._exit(7)
    if word == "sleep":
        time.sleep(float(value))
    if word == "raise":
        raise KeyError(value)
    if word == "numpy":
        reports = [Report(None, severity=np.float32(0.5))] * len(prompts)
        return {"score": torch.zeros(len(prompts)), "reports": reports}
    if word == "short":
        return torch.zeros(1)
    score = videos[:, :, 0].mean((1, 2, 3)) + bonus * fps
    score[[prompt == "unknown" for prompt in prompts]] = math.nan
    blame = videos.mean(2)
    reports = [Report("told not to know" if prompt == "unknown" else None) for prompt in prompts]
    return {"score": score, "blame": blame, "reports": reports}


HELPER = """
import fcntl, sys, time
file = open(sys.argv[1], "w")
fcntl.flock(file, fcntl.LOCK_EX)
file.write("held")
file.flush()
time.sleep(600)
"""


def start_helpers(folder: str) -> None:
    """A forked process and a started one, each with a lock on a file for as long as it lives."""
    paths = [os.path.join(folder, name) for name in ("exec", "fork")]
    subprocess.Popen([sys.executable, "-c", HELPER, paths[0]])
    if os.fork() == 0:
        sys.argv = ["helper", paths[1]]
        exec(HELPER, {})
        os._exit(0)
    while not all(os.path.exists(path) and os.path.getsize(path) for path in paths):
        time.sleep(0.01)


def held(folder: Path) -> list[str]:
    """Names of the files in a folder whose process still lives."""
    found = []
    for path in sorted(folder.iterdir()):
        with path.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                found.append(path.name)
    return found


def comes_true(said: Callable[[], bool], seconds: float = 30.0) -> bool:
    """Whether something becomes so within a time."""
    end = time.monotonic() + seconds
    while not said() and time.monotonic() < end:
        time.sleep(0.02)
    return said()


def settings(**changes: Any) -> RewardSettings:
    given = {"name": "mine", "target": f"{__name__}:act", "where": "process", **changes}
    return RewardSettings(**given)


@pytest.fixture(scope="module")
def process() -> Iterator[ProcessReward]:
    reward = ProcessReward(settings(options={"bonus": 0.5}))
    yield reward
    reward.close()


def ask(function: Any, *prompts: str) -> Any:
    return function(VIDEOS, [*prompts, *PROMPTS[len(prompts) :]], fps=8.0)


def test_a_process_answers_what_the_reward_would_here(process: ProcessReward) -> None:
    found, expected = ask(process), act(VIDEOS, PROMPTS, fps=8.0, bonus=0.5)
    torch.testing.assert_close(found["score"], expected["score"], rtol=0, atol=0, equal_nan=True)
    assert torch.equal(found["blame"], expected["blame"])
    assert found["reports"][2]["error"] == "told not to know"
    assert found["reports"][0]["process"] != os.getpid()
    with pytest.raises(RuntimeError, match=r'for 1 of 4 .* last report: "told not to know"'):
        judge_videos([Reward("mine", process)], VIDEOS, PROMPTS, fps=8.0, missing_limit=0.1)


def test_what_goes_wrong_in_the_process_is_told(process: ProcessReward) -> None:
    with pytest.raises(RewardFailed, match="raised KeyError: 'lens' in its process"):
        ask(process, "raise lens")
    with pytest.raises(RewardRefused, match=r"score of reward 'mine' must be .* got \(1,\)"):
        ask(process, "short")
    message = r"to_dict\(\) of reports of reward 'mine' must hold .* float32 .*float\(\.\.\.\)"
    with pytest.raises(RewardRefused, match=message):
        ask(process, "numpy")
    before = ask(process)["reports"][0]["process"]
    assert ask(process)["reports"][0]["process"] == before  # It lives on.
    with pytest.raises(RewardFailed, match="(?s)ended with status 7; .*card fell off the bus"):
        ask(process, "die")
    assert ask(process)["reports"][0]["process"] != before  # Started again.


def test_a_process_that_hangs_is_ended_and_one_that_is_closed_is_not_asked(tmp_path: Path) -> None:
    reward = ProcessReward(settings(timeout_seconds=600.0))
    reward._seconds = 0.3
    started = time.monotonic()
    with pytest.raises(RewardFailed, match=r"took longer than 0.3 s and was ended"):
        ask(reward, "sleep 60")
    assert time.monotonic() - started < 30
    reward._seconds = 600.0
    ask(reward, f"help {tmp_path}")
    assert held(tmp_path) == ["exec", "fork"]
    reward.close()
    assert comes_true(lambda: not held(tmp_path))
    with pytest.raises(RewardRefused, match="its process was closed"):
        ask(reward)


def test_what_the_reward_started_neither_holds_a_call_nor_outlives_it(
    process: ProcessReward, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ask_helped(name: str, then: str) -> tuple[Any, Path]:
        folder = tmp_path / name
        folder.mkdir()
        return ask(process, f"help {folder}", then), folder

    with pytest.raises(RewardFailed, match="(?s)ended with status 7; .*card fell off the bus"):
        ask_helped("died", "die")
    assert comes_true(lambda: not held(tmp_path / "died"))

    answer, folder = ask_helped("killed", "b")
    assert held(folder) == ["exec", "fork"]
    number = answer["reports"][0]["process"]
    os.kill(number, signal.SIGKILL)
    assert comes_true(lambda: os.waitid(os.P_PID, number, ENDED) is not None)
    assert ask(process)["reports"][0]["process"] != number
    assert comes_true(lambda: not held(folder))

    with monkeypatch.context() as brief:
        brief.setattr(process, "_seconds", 10.0)
        with pytest.raises(RewardFailed, match="took longer than 10 s and was ended"):
            ask_helped("late", "sleep 600")
    assert comes_true(lambda: not held(tmp_path / "late"))

    _, folder = ask_helped("left", "b")
    assert held(folder) == ["exec", "fork"]
    run = process._process
    assert run.stdin is not None
    assert run.stdout is not None
    # All that it sees of a run that was killed while it waited.
    write_message(run.stdin, {"prompts": ["sleep 1"] * 4, "fps": 8.0}, {"videos": VIDEOS})
    run.stdin.close()
    run.stdout.close()
    assert comes_true(lambda: not held(folder))


def test_where_there_are_no_groups_the_process_alone_is_killed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delattr(os, "killpg")
    with subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as process:
        remote_rewards._kill_group(process)
    assert process.returncode == -signal.SIGKILL


def test_a_process_that_does_not_start_says_why() -> None:
    with pytest.raises(RewardFailed, match="(?s)ended with status 1; .*has no 'acct'; near"):
        build_reward(settings(target=f"{__name__}:acct"))


def test_each_of_several_processes_gives_its_reward_its_own_gpu(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert processes.own_gpu() is None
    monkeypatch.setattr(processes, "count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 987)
    # There is no such GPU; that the worker looks for it is what is to be seen.
    with pytest.raises(RewardFailed, match=r"(?s)ended with status 1; .*set_device"):
        build_reward(settings())


def test_the_server_gets_the_documented_schema_and_its_words_come_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MY_TOKEN", "s" * 16)
    with score_server() as server:
        reward = HttpReward(f"{server.url}/", token_variable="MY_TOKEN", timeout_seconds=30.0)
        found = reward(VIDEOS, PROMPTS, fps=12.5)
    assert (found["score"][[0, 1, 3]] - RED[[0, 1, 3]]).abs().max() < 1 / 255
    assert found["score"].isnan().tolist() == [False, False, True, False]
    assert found["reports"] == [None, None, "told not to know", None]
    ((path, body, headers),) = server.received
    assert path == "/v1/score"
    assert headers["Authorization"] == "Bearer " + "s" * 16
    assert [one["prompt"] for one in body["videos"]] == PROMPTS
    assert {one["fps"] for one in body["videos"]} == {12.5}
    assert body["deadline_seconds"] == 30.0


def test_our_own_server_answers_it_as_it_answers_its_own_client() -> None:
    with running_server("--scorer", "tests.serving:plain_reward") as server:
        own = RewardClient(server.url)(VIDEOS, PROMPTS, fps=8.0)
        reward = build_reward(
            settings(where="http", target=server.url, videos_per_call=2, calls_at_once=2)
        )
        judged = judge_videos([reward], VIDEOS, PROMPTS, fps=8.0)
        assert torch.equal(judged.score, own["score"])
        assert judged.score.std() > 0
        server.process.kill()
        server.process.wait()
        with pytest.raises(RewardFailed, match="'mine': http://127.* Connection"):
            judge_videos([_hasty(reward, retries=0)], VIDEOS, PROMPTS, fps=8.0)


def _hasty(reward: Reward, **changes: Any) -> Reward:
    """The same reward, asked again without pauses."""
    from dataclasses import replace

    calls = replace(reward.calls, retry_seconds=0.0, **changes)
    return replace(reward, calls=calls)


def http(url: str, **changes: Any) -> Reward:
    return build_reward(settings(where="http", target=url, retry_seconds=0.0, **changes))


def test_calls_are_split_made_at_once_and_put_together_in_order() -> None:
    with score_server() as server:
        server.seconds = 0.1
        batch = judge_videos(
            [http(server.url, videos_per_call=1, calls_at_once=4)], VIDEOS, PROMPTS, fps=8.0
        )
        assert 1 < server.most_at_once <= 4
        assert [len(body["videos"]) for _, body, _ in server.received] == [1] * 4
        server.most_at_once = 0
        judge_videos([http(server.url, videos_per_call=1)], VIDEOS, PROMPTS, fps=8.0)
        assert server.most_at_once == 1
    assert (batch.score - RED)[[0, 1, 3]].abs().max() < 1 / 255
    assert batch.judgements["mine"].reports == [None, None, "told not to know", None]


def test_asking_does_not_wait_and_the_answers_do() -> None:
    release = threading.Event()

    def held(body: dict[str, Any]) -> Any:
        assert release.wait(30)
        return by_redness(body)

    with score_server(held) as server:
        asked = ask_rewards([http(server.url)], VIDEOS, PROMPTS, fps=8.0)
        assert server.finished == 0
        release.set()
        assert asked.answers()["mine"].score.isnan().sum() == 1


@pytest.mark.parametrize(
    ("reply", "error", "message", "asked"),
    [
        ((503, {"error": "full"}, {}), RewardFailed, r"answered 503: .*full", 3),
        ((401, {"error": "token"}, {}), RewardRefused, r"answered 401: .*token", 1),
        ((200, b"<html>", {}), RewardRefused, "must answer in JSON, got <html>", 1),
        ((200, [1], {}), RewardRefused, r"must answer an object, got \[1\]", 1),
        ((200, {"results": []}, {}), RewardRefused, r"must answer 4 results, got \[\]", 1),
        (
            (200, {"results": [{"score": "high"}] * 4}, {}),
            RewardRefused,
            "must answer finite scores or null, got {'score': 'high'}",
            1,
        ),
    ],
)
def test_only_what_may_pass_is_asked_again(
    reply: Any, error: type[Exception], message: str, asked: int
) -> None:
    with score_server(lambda body: reply) as server:
        with pytest.raises(error, match=message):
            judge_videos([http(server.url, retries=2)], VIDEOS, PROMPTS, fps=8.0)
        assert len(server.received) == asked


def test_a_busy_server_is_left_alone_for_as_long_as_it_asks() -> None:
    times: list[float] = []

    def busy_twice(body: dict[str, Any]) -> Any:
        times.append(time.monotonic())
        return (429, {}, {"Retry-After": "1"}) if len(times) < 2 else by_redness(body)

    with score_server(busy_twice) as server:
        batch = judge_videos([http(server.url, retries=2)], VIDEOS, PROMPTS, fps=8.0)
    assert batch.score.isnan().sum() == 1
    assert times[1] - times[0] > 0.9


def test_closing_ends_a_request_under_way_at_once() -> None:
    with score_server() as server:
        server.seconds = 5.0
        reward = http(server.url, retries=5)
        asked = ask_rewards([reward], VIDEOS, PROMPTS, fps=8.0)
        while not server.received:
            time.sleep(0.01)
        started = time.monotonic()
        reward.close()
        with pytest.raises(RewardFailed, match="'mine': http"):
            asked.answers()
        assert time.monotonic() - started < 2
        with pytest.raises(RewardRefused, match="is not asked any more"):
            judge_videos([reward], VIDEOS, PROMPTS, fps=8.0)
        assert len(server.received) == 1


def test_closing_takes_it_that_the_server_was_faster() -> None:
    class Reset:
        def shutdown(self, how: int) -> None:
            raise OSError(errno.ENOTCONN, "Transport endpoint is not connected")

    reward = HttpReward("http://127.0.0.1:1")
    connection = http_client.HTTPConnection("127.0.0.1")
    connection.sock = Reset()
    reward._open.add(connection)
    reward.close()
    with pytest.raises(RewardRefused, match="is not asked any more"):
        reward(VIDEOS, PROMPTS, fps=8.0)


def test_a_wrong_address_option_or_token_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_TOKEN", raising=False)
    with pytest.raises(ValueError, match="target must be http://HOST or https://HOST, got 'http:/"):
        HttpReward("http:///v1")
    with pytest.raises(ValueError, match="must be set in the environment, got no NO_TOKEN"):
        HttpReward("http://127.0.0.1", token_variable="NO_TOKEN")
    with pytest.raises(ValueError, match="'mine' must be token_variable or none .*, got mode"):
        http("http://127.0.0.1:1", options={"mode": "fast"})
    with pytest.raises(ValueError, match=r"prompts must be one per video \(4\), got 1"):
        HttpReward("http://127.0.0.1:1")(VIDEOS, ["a"], fps=8.0)
