"""The contract of VideoX-Fun's BaseReward (videox_fun/reward/reward_fn.py)."""

import math

import pytest
import torch

from cac_reward.adapters import videox_fun
from cac_reward.adapters.videox_fun import CaCReward
from tests.cac_reward.adapters.stub_scorer import (
    FPS,
    UNJUDGED,
    StubScorer,
    as_float,
    clip,
    expect,
)


def batch(*reds: int, num_frames: int = 3) -> torch.Tensor:
    """[B C T H W] in [0, 1]."""
    frames = torch.stack([as_float(clip(red, num_frames)) for red in reds])
    return frames.permute(0, 2, 1, 3, 4)


@pytest.mark.parametrize("num_frames", [3, 5])
def test_a_reward_for_each_video(num_frames: int) -> None:
    scorer = StubScorer()
    frames = batch(51, 102, num_frames=num_frames)
    rewards = CaCReward(scorer, fps=FPS).get_reward(frames, ["a", "b"])
    expect(rewards.tolist(), [51, 102])
    torch.testing.assert_close(scorer.seen[0][0], frames.permute(0, 2, 1, 3, 4))
    assert CaCReward(scorer, fps=FPS, dtype=torch.float16).get_reward(frames).dtype == torch.float16


@pytest.mark.parametrize(("max_reward", "loss"), [(1, (0.8 + 0.6) / 2), (None, -0.3)])
def test_loss_and_reward_of_a_batch(max_reward: float | None, loss: float) -> None:
    reward = CaCReward(StubScorer(), fps=FPS, max_reward=max_reward, loss_scale=10)
    with torch.no_grad():
        got_loss, got_reward = reward(batch(51, 102), ["a", "b"])
    torch.testing.assert_close(got_loss, torch.tensor(10 * loss))
    torch.testing.assert_close(got_reward, torch.tensor(0.3))


def test_a_gradient_is_refused() -> None:
    reward = CaCReward(StubScorer(), fps=FPS)
    frames = batch(51).requires_grad_()
    for call in (reward, reward.get_reward):
        with pytest.raises(RuntimeError, match="P.clean. is read from .* has none; detach them"):
            call(frames, ["a"])
    with torch.no_grad():
        reward(frames, ["a"])


def test_failures() -> None:
    frames = batch(UNJUDGED, 51)
    with pytest.raises(RuntimeError, match="1 of 2 videos could not be judged: too red"):
        CaCReward(StubScorer(), fps=FPS)(frames, ["a", "b"])
    masked = CaCReward(StubScorer(), fps=FPS, on_failure="mask")
    expect(masked.get_reward(frames, ["a", "b"]).tolist(), [UNJUDGED, 51])
    loss, reward = masked(frames, ["a", "b"])
    assert (loss.item(), reward.item()) == pytest.approx((0.8, 0.2))
    assert math.isnan(masked(batch(UNJUDGED), ["a"])[1])
    replaced = CaCReward(StubScorer(), fps=FPS, on_failure=0)
    assert replaced.get_reward(frames)[0] == 0


def test_the_judge_is_loaded_as_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(
        videox_fun, "scorer_of", lambda *judge, **how: asked.append((judge, how)) or StubScorer()
    )
    CaCReward("some/judge", fps=FPS, device="cuda:1", dtype=torch.float16)
    assert asked == [(("some/judge",), {"device": "cuda:1", "dtype": torch.float16})]


def test_a_missing_rate_is_refused() -> None:
    with pytest.raises(ValueError, match="fps must be above 0, got None"):
        CaCReward(StubScorer(), fps=None)
