"""The contract of flow_grpo's multi_score, and of its relatives.

Source: yifan123/flow_grpo, flow_grpo/rewards.py; franklinz233/Astrolabe, astrolabe/rewards.py;
microsoft/World-R1, flow_grpo/rewards.py.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from cac_reward.adapters.flow_grpo import cac_score, score_with
from tests.cac_reward.adapters.stub_scorer import (
    FPS,
    UNJUDGED,
    StubScorer,
    as_float,
    clip,
    expect,
)

PROMPTS = ("a cup", "a dog")


def multi_score(device: torch.device, factory, weight: float):
    """How flow_grpo makes, calls and weighs a reward."""
    assert "device" in factory.__code__.co_varnames
    function = factory(device)

    def score(images, prompts, metadata, only_strict=True):
        scores, _rewards = function(images, prompts, metadata)
        return {"cac": scores, "avg": [weight * one for one in scores]}, {}

    return score


@pytest.mark.parametrize("num_frames", [3, 5])
def test_tensors_and_arrays_of_the_family(num_frames: int) -> None:
    frames = torch.stack([clip(red, num_frames) for red in (60, 180)])  # [B F C H W]
    last = frames.permute(0, 1, 3, 4, 2).contiguous().numpy()  # [B F H W C]
    for videos in (as_float(frames), frames, last, (last / 255).astype(np.float32)):
        scorer = StubScorer()
        scores, extras = score_with(scorer, fps=FPS)(videos, PROMPTS, [{}, {}])
        expect(scores, [60, 180])
        assert isinstance(scores, list)
        assert extras == {}
        torch.testing.assert_close(scorer.seen[0][0], as_float(frames))
        assert scorer.seen[0][1:] == (list(PROMPTS), FPS)


def test_it_runs_inside_multi_score_from_several_threads() -> None:
    scorer = StubScorer()
    reward = multi_score(torch.device("cpu"), lambda device: score_with(scorer, fps=FPS), 0.5)
    batches = [torch.stack([as_float(clip(2 * row)), as_float(clip(99))]) for row in range(9)]
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(reward, one, PROMPTS, [{}], only_strict=True) for one in batches]
    for row, future in enumerate(futures):
        rewards, _ = future.result()
        expect(rewards["cac"], [2 * row, 99])
        torch.testing.assert_close(
            torch.as_tensor(rewards["avg"]).float(), torch.tensor([row, 49.5]) / 255
        )


def test_failures() -> None:
    videos = torch.stack([as_float(clip(red)) for red in (UNJUDGED, 40)])
    with pytest.raises(RuntimeError, match="1 of 2 videos could not be judged: too red"):
        score_with(StubScorer(), fps=FPS)(videos, PROMPTS, None)
    scores, _ = score_with(StubScorer(), fps=FPS, on_failure="mask")(videos, PROMPTS, None)
    expect(scores, [UNJUDGED, 40])
    scores, _ = score_with(StubScorer(), fps=FPS, on_failure=-10)(videos, PROMPTS, None)
    assert scores == pytest.approx([-10, 40 / 255])


def test_a_missing_rate_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="fps must be above 0, got None"):
        score_with(StubScorer(), fps=None)


def test_the_factory_loads_the_judge_of_the_environment(
    monkeypatch: pytest.MonkeyPatch, toy_judge_folder: Path, toy_videos: torch.Tensor
) -> None:
    monkeypatch.setenv("CAC_REWARD_JUDGE", str(toy_judge_folder))
    monkeypatch.setenv("CAC_REWARD_FPS", "8")
    monkeypatch.setenv("CAC_REWARD_DTYPE", "float32")
    monkeypatch.setenv("CAC_REWARD_MODE", "fast")
    reward = multi_score(torch.device("cpu"), cac_score, 1.0)
    rewards, _ = reward(toy_videos, PROMPTS, [{}, {}])
    assert len(rewards["cac"]) == 2
    assert all(0 <= score <= 1 for score in rewards["cac"])
    assert rewards["cac"][0] != rewards["cac"][1]
    monkeypatch.delenv("CAC_REWARD_FPS")
    with pytest.raises(ValueError, match="fps must be above 0, got None"):
        cac_score("cpu")


def test_a_running_server_named_by_the_environment(reward_server, monkeypatch) -> None:
    monkeypatch.setenv("CAC_REWARD_JUDGE", reward_server.url)
    monkeypatch.setenv("CAC_REWARD_FPS", str(FPS))
    monkeypatch.setenv("CAC_REWARD_ON_FAILURE", "mask")
    reward = multi_score(torch.device("cpu"), cac_score, 0.5)
    videos = torch.stack([as_float(clip(red)) for red in (60, 10, 180)])
    scores, _ = reward(videos, [*PROMPTS, "a pond"], [{}] * 3)
    assert scores["cac"] == pytest.approx([60 / 255, float("nan"), 180 / 255], nan_ok=True)
    monkeypatch.setenv("CAC_REWARD_ON_FAILURE", "raise")
    reward = multi_score(torch.device("cpu"), cac_score, 0.5)
    with pytest.raises(RuntimeError, match="1 of 3 videos .*: the reward returned nan"):
        reward(videos, [*PROMPTS, "a pond"], [{}] * 3)


def test_a_server_that_wants_another_token_is_an_error(reward_server, monkeypatch) -> None:
    monkeypatch.setenv("CAC_REWARD_JUDGE", reward_server.url)
    monkeypatch.setenv("CAC_REWARD_FPS", str(FPS))
    monkeypatch.setenv("CAC_REWARD_ON_FAILURE", "mask")
    monkeypatch.setenv("CAC_REWARD_TOKEN", "not the token of that one")
    reward = cac_score("cpu")
    with pytest.raises(RuntimeError, match="/v1/score answered 401"):
        reward(as_float(clip(60))[None], ["a"], [{}])
