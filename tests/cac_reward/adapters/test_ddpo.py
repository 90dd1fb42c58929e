"""The contract of ddpo-pytorch's and TRL's former reward functions.

Source: kvablack/ddpo-pytorch, scripts/train.py; huggingface/trl before 0.24, ddpo_trainer.py.
"""

import pytest
import torch

from cac_reward.adapters.ddpo import ddpo_reward
from tests.cac_reward.adapters.stub_scorer import (
    FPS,
    UNJUDGED,
    StubScorer,
    as_float,
    clip,
    expect,
)


@pytest.mark.parametrize("num_frames", [3, 5])
def test_rewards_and_metadata(num_frames: int) -> None:
    scorer = StubScorer()
    videos = torch.stack([as_float(clip(red, num_frames)) for red in (10, 20)])
    rewards, metadata = ddpo_reward(scorer, fps=FPS)(videos, ("a", "b"), ({}, {}))
    expect(torch.as_tensor(rewards, device="cpu").tolist(), [10, 20])
    torch.testing.assert_close(scorer.seen[0][0], videos)
    assert [report.prompt for report in metadata["reports"]] == ["a", "b"]
    assert metadata["errors"] == (None, None)


def test_failures() -> None:
    videos = torch.stack([as_float(clip(red)) for red in (UNJUDGED, 40)])
    with pytest.raises(RuntimeError, match="1 of 2 videos could not be judged: too red"):
        ddpo_reward(StubScorer(), fps=FPS)(videos, ("a", "b"), None)
    rewards, metadata = ddpo_reward(StubScorer(), fps=FPS, on_failure="mask")(videos, ("a", "b"))
    expect(rewards.tolist(), [UNJUDGED, 40])
    assert metadata["errors"] == ("too red to judge", None)
    rewards, _ = ddpo_reward(StubScorer(), fps=FPS, on_failure=0)(videos, ("a", "b"))
    assert rewards[0] == 0
