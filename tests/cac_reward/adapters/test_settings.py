"""A scorer from plain values, checked and loaded once."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from cac_reward import CaCScorer
from cac_reward.adapters import settings as module
from cac_reward.adapters.settings import ScorerSettings, dtype_name, scorer_of
from cac_reward.client import RewardClient
from cac_reward.frames import JudgeSettings
from cac_reward.judges.endpoint import EndpointOptions
from tests.cac_reward.adapters.stub_scorer import StubScorer

SERVER = {"judge": "http://127.0.0.1:8000"}


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """What `CaCScorer.from_pretrained` was asked for; it returns stubs."""
    asked: list[dict] = []

    def from_pretrained(judge: str, **options: object) -> StubScorer:
        given = {name: value for name, value in options.items() if value is not None}
        asked.append({"judge": judge, **given})
        threading.Event().wait(0.02)  # Long enough for a second thread to come by.
        return StubScorer()

    monkeypatch.setattr(CaCScorer, "from_pretrained", from_pretrained)
    module._load.cache_clear()
    yield asked
    module._load.cache_clear()


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch):
    """Sets variables; those of the machine are out of the way."""
    for name in (
        "JUDGE",
        "MODEL",
        "FPS",
        "DEVICE",
        "DTYPE",
        "ATTENTION",
        "MODE",
        "REVISION",
        "ON_FAILURE",
    ):
        monkeypatch.delenv(f"CAC_REWARD_{name}", raising=False)

    def set_variables(**variables: str) -> None:
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_variables


def test_settings_come_from_the_environment(environment) -> None:
    environment(
        CAC_REWARD_JUDGE="some/judge",
        CAC_REWARD_FPS="16",
        CAC_REWARD_MODE="fast",
        CAC_REWARD_ON_FAILURE="-10",
        CAC_REWARD_TOKEN="not ours",
    )
    assert ScorerSettings.from_environment(device="cuda:1") == ScorerSettings(
        judge="some/judge", fps=16.0, mode="fast", on_failure=-10.0, device="cuda:1"
    )
    environment(CAC_REWARD_DEVICE="cpu", CAC_REWARD_ON_FAILURE="mask")
    settings = ScorerSettings.from_environment(device="cuda:1")
    assert (settings.device, settings.on_failure) == ("cpu", "mask")


def test_an_environment_without_a_judge_is_refused(environment) -> None:
    environment(CAC_REWARD_FPS="16")
    with pytest.raises(ValueError, match="CAC_REWARD_JUDGE must be set.*CAC_REWARD_FPS"):
        ScorerSettings.from_environment()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "judge must be given among the options, got \\[\\]"),
        ({"judge": ""}, "judge must name a folder or a hub id"),
        ({"judge": "x", "url": "y"}, "options must be among \\['judge', .*got 'url'"),
        ({"judge": "x", "model": "y"}, "model must be left out where judge is a folder.* got 'y'"),
        ({**SERVER, "mode": "fast"}, "mode must be left out where judge is an address, got 'fast'"),
        ({**SERVER, "attention": "eager"}, "attention must be left out .*got 'eager'"),
        ({**SERVER, "model": "y", "revision": "main"}, "revision must be left out .*got 'main'"),
        ({"judge": "x", "fps": "fast"}, "fps must be above 0, got 'fast'"),
        ({"judge": "x", "fps": -1}, "fps must be above 0, got -1"),
        ({"judge": "x", "on_failure": "ignore"}, "on_failure must be .*'ignore'"),
    ],
)
def test_wrong_options_are_refused(options, message) -> None:
    with pytest.raises(ValueError, match=message):
        ScorerSettings.from_mapping(options)


def test_what_the_options_say_goes_before_the_framework() -> None:
    assert ScorerSettings.from_mapping({"judge": "x", "dtype": "float32"}, dtype="float16") == (
        ScorerSettings(judge="x", dtype="float32")
    )


def test_a_scorer_is_loaded_once_by_many_threads(loaded) -> None:
    settings = ScorerSettings(judge="some/judge", mode="fast", revision="main", fps=8)
    with ThreadPoolExecutor(4) as pool:
        scorers = set(map(id, pool.map(lambda _: settings.load(), range(8))))
    assert len(scorers) == 1
    wanted = {"device": "cuda", "dtype": "bfloat16", "attention": "sdpa"}
    assert loaded == [{"judge": "some/judge", **wanted, "revision": "main", "mode": "fast"}]
    ScorerSettings(judge="some/judge").load()
    assert len(loaded) == 2


def test_a_reward_carries_the_settings(loaded) -> None:
    settings = ScorerSettings(judge="some/judge", fps=8, on_failure="0.5")
    reward = settings.reward(layout="CFHW", value_range="-1..1")
    assert reward.scorer is settings.load()
    assert (reward.fps, reward.layout, reward.value_range) == (8, "CFHW", "-1..1")
    assert reward.on_failure == 0.5


def test_a_scorer_is_taken_as_it_is_or_loaded(loaded) -> None:
    own = StubScorer()
    assert scorer_of(own, device="cuda", dtype="float16") is own
    assert loaded == []
    scorer_of(Path("some/judge"), device=torch.device("cpu"), dtype=torch.float16, mode="fast")
    assert loaded[0]["judge"] == "some/judge"
    assert (loaded[0]["device"], loaded[0]["dtype"]) == ("cpu", "float16")
    assert dtype_name("float32") == "float32"


def test_an_address_is_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CAC_REWARD_TOKEN", raising=False)
    module._load.cache_clear()
    # What the framework decides, device and dtype, a server does not hear of.
    scorer = ScorerSettings(**SERVER, device="cuda:3", dtype="float16", fps=8).load()
    assert isinstance(scorer, RewardClient)
    assert scorer.base_url == SERVER["judge"]
    assert "Authorization" not in scorer._headers
    module._load.cache_clear()
    monkeypatch.setenv("CAC_REWARD_TOKEN", "a secret of 16 letters")
    scorer = scorer_of(SERVER["judge"], device="cpu", dtype="float32")
    assert scorer._headers["Authorization"] == "Bearer a secret of 16 letters"
    module._load.cache_clear()


def test_an_address_with_a_model_is_an_openai_server(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(
        CaCScorer, "from_endpoint", lambda *judge, **how: asked.append((judge, how)) or 1
    )
    how = {"options": EndpointOptions(), "settings": JudgeSettings(), "cache": None}
    ScorerSettings(judge="https://a/v1", model="qwen", mode="fast", fps=8).load()
    assert asked == [(("https://a/v1", "qwen"), {"mode": "fast", **how})]
    module._load.cache_clear()


def test_the_toy_judge_loads_from_settings(toy_judge_folder: Path) -> None:
    settings = ScorerSettings(judge=str(toy_judge_folder), device="cpu", dtype="float32")
    scorer = settings.load()
    assert isinstance(scorer, CaCScorer)
    assert scorer.judge.judge_id == str(toy_judge_folder)


def test_what_does_not_change_the_judge_loads_no_second_one(loaded) -> None:
    first = ScorerSettings(judge="some/judge", fps=8, on_failure="mask").load()
    assert ScorerSettings(judge="some/judge", fps=16, on_failure=0.5).load() is first
    assert ScorerSettings(judge="some/judge", device="cpu").load() is not first
