"""The contract of GenRL's load_reward_fn and multi_score (ModelTC/GenRL, genrl/rewards.py)."""

import importlib

import pytest
import torch

from cac_reward.adapters import genrl
from cac_reward.adapters.settings import ScorerSettings
from tests.cac_reward.adapters.stub_scorer import (
    FPS,
    UNJUDGED,
    StubScorer,
    as_float,
    clip,
    expect,
)


@pytest.fixture
def scorer(monkeypatch: pytest.MonkeyPatch) -> StubScorer:
    """What the environment's judge is."""
    stub = StubScorer()
    monkeypatch.setenv("CAC_REWARD_JUDGE", "some/judge")
    monkeypatch.setenv("CAC_REWARD_FPS", str(FPS))
    monkeypatch.setattr(ScorerSettings, "load", lambda settings: stub)
    return stub


def multi_score(device: torch.device, weights: dict[str, float], module_path: str):
    """How GenRL finds, makes, calls and weighs rewards of a `reward_module`."""
    module = importlib.import_module(module_path)
    functions = {name: getattr(module, f"{name}_score")(device) for name in weights}

    def score(images, prompts, metadata, only_strict=True):
        scores = {}
        for name, function in functions.items():
            out, _ = function(images, prompts, metadata)
            value = out.get("avg", out.get("reward", out)) if isinstance(out, dict) else out
            scores[name] = value * weights[name]
        scores["avg"] = torch.stack([scores[name] for name in weights]).mean(0)
        return scores, {}

    return score


@pytest.mark.parametrize("num_frames", [3, 5])
def test_the_reward_module_needs_no_code(scorer: StubScorer, num_frames: int) -> None:
    reward = multi_score(torch.device("cpu"), {"cac": 2.0}, "cac_reward.adapters.genrl")
    frames = torch.stack([clip(red, num_frames) for red in (60, 120)])
    scores, _ = reward(as_float(frames), ["a", "b"], [{}, {}])
    torch.testing.assert_close(scores["avg"], torch.tensor([120.0, 240.0]) / 255)
    torch.testing.assert_close(scorer.seen[0][0], as_float(frames))
    reward(frames.permute(0, 1, 3, 4, 2).numpy(), ["a", "b"], [{}, {}])
    torch.testing.assert_close(scorer.seen[1][0], as_float(frames))


def test_scores_are_a_tensor_where_the_trainer_is(scorer: StubScorer) -> None:
    score = genrl.cac_score(torch.device("meta"))  # Any device but the one of the videos.
    scores, extras = score(as_float(clip(60))[None], ["a"], None)
    assert scores["avg"].device.type == "meta"
    assert scores["avg"].dtype == torch.float32
    assert extras == {}


def test_failures() -> None:
    videos = torch.stack([as_float(clip(red)) for red in (UNJUDGED, 40)])

    def judge(on_failure: str | float) -> torch.Tensor:
        score = genrl.score_with(StubScorer(), "cpu", fps=FPS, on_failure=on_failure)
        return score(videos, ["a", "b"], None)[0]["avg"]

    with pytest.raises(RuntimeError, match="1 of 2 videos could not be judged: too red"):
        judge("raise")
    expect(judge("mask").tolist(), [UNJUDGED, 40])
    assert judge(-10)[0] == -10


def test_a_missing_rate_is_refused_at_once(
    scorer: StubScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CAC_REWARD_FPS")
    with pytest.raises(ValueError, match="fps must be above 0, got None"):
        genrl.cac_score("cpu")
