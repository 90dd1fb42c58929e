"""The contract of FastVideo's MultiRewardScorer (fastvideo/train/methods/rl/rewards/media.py)."""

import pytest
import torch

from cac_reward.adapters.fastvideo import fastvideo_scorer
from tests.cac_reward.adapters.stub_scorer import (
    FPS,
    UNJUDGED,
    StubScorer,
    as_float,
    clip,
    expect,
)


@torch.no_grad()
def multi_reward_scorer(scorer, media: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """How FastVideo calls and checks a scorer."""
    scores = scorer(media, prompts).detach().float()
    assert scores.ndim == 1
    assert scores.shape[0] == len(prompts)
    return scores.to(media.device)


@pytest.mark.parametrize("num_frames", [3, 5])
def test_media_are_channels_first(num_frames: int) -> None:
    scorer = StubScorer()
    frames = torch.stack([as_float(clip(red, num_frames)) for red in (10, 20)])
    media = frames.permute(0, 2, 1, 3, 4)  # [B C T H W]
    scores = multi_reward_scorer(fastvideo_scorer(scorer, fps=FPS), media, ["a", "b"])
    expect(scores.tolist(), [10, 20])
    torch.testing.assert_close(scorer.seen[0][0], frames)


def test_a_gradient_is_refused_where_one_is_asked_for() -> None:
    media = as_float(clip(7)).permute(1, 0, 2, 3)[None].requires_grad_()
    score = fastvideo_scorer(StubScorer(), fps=FPS)
    with pytest.raises(RuntimeError, match="must not require a gradient"):
        score(media, ["a"])
    expect(multi_reward_scorer(score, media, ["a"]).tolist(), [7])


def test_failures() -> None:
    media = torch.stack([as_float(clip(red)) for red in (UNJUDGED, 40)]).permute(0, 2, 1, 3, 4)
    with pytest.raises(RuntimeError, match="1 of 2 videos could not be judged: too red"):
        fastvideo_scorer(StubScorer(), fps=FPS)(media, ["a", "b"])
    scores = fastvideo_scorer(StubScorer(), fps=FPS, on_failure="mask")(media, ["a", "b"])
    expect(scores.tolist(), [UNJUDGED, 40])
    assert fastvideo_scorer(StubScorer(), fps=FPS, on_failure=0.25)(media, ["a", "b"])[0] == 0.25


def test_images_are_refused() -> None:
    with pytest.raises(ValueError, match="one axis for each letter of layout 'CFHW'"):
        fastvideo_scorer(StubScorer(), fps=FPS)(torch.zeros(1, 3, 4, 4), ["a"])
