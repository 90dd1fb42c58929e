"""Which video belongs to a completion, and which text to a chat message."""

from pathlib import Path

import pytest
import torch

from cac_reward.adapters.base import VideoReward
from cac_reward.adapters.texts import judge_texts, text_of
from tests.cac_reward.adapters.stub_scorer import FPS, StubScorer, as_float, clip, mp4, red_of


def render(texts: list[str]) -> list[torch.Tensor]:
    """As red as the text is long, and as many frames."""
    return [as_float(clip(len(text), num_frames=len(text))) for text in texts]


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ("a cup", "a cup"),
        ([{"role": "user", "content": "no"}, {"role": "assistant", "content": "a cup"}], "a cup"),
        ([{"role": "assistant", "content": [{"type": "text", "text": "a "}, {"text": "cup"}]}],
         "a cup"),
        ([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "x"}]}], "x"),
        ({"role": "user", "content": "a cup"}, "a cup"),
        ([], ""),
        ([{"role": "assistant", "content": None}], ""),
    ],
)  # fmt: skip
def test_the_text_of_a_message(message, text) -> None:
    assert text_of(message) == text


def test_videos_made_from_what_the_model_wrote() -> None:
    scorer = StubScorer()
    judge = judge_texts(VideoReward(scorer=scorer, fps=FPS), render=render, column=None)
    outcome = judge(["abc", [{"role": "assistant", "content": "abcdef"}]], ["p", "q"], {})
    assert outcome.scores.tolist() == pytest.approx([3 / 255, 6 / 255])
    assert [prompts for _, prompts, _ in scorer.seen] == [["abc"], ["abcdef"]]


def test_videos_that_stand_in_the_data(tmp_path: Path) -> None:
    file = tmp_path / "clip.mp4"
    file.write_bytes(mp4(clip(120)))
    scorer = StubScorer()
    judge = judge_texts(VideoReward(scorer=scorer), render=None, column="videos")
    rows = {"videos": [str(file), [str(file)]], "other": [1, 2]}
    prompts = [[{"role": "user", "content": "a cup"}], "a dog"]
    outcome = judge(["yes", "no"], prompts, rows)
    assert outcome.scores.tolist() == pytest.approx([red_of(file.read_bytes())] * 2)
    assert scorer.seen[0][1:] == (["a cup", "a dog"], FPS)


def test_one_source_of_videos_must_be_given() -> None:
    reward = VideoReward(scorer=StubScorer())
    for source in ({"render": None, "column": None}, {"render": render, "column": "videos"}):
        with pytest.raises(ValueError, match="render or column must be given, and not both"):
            judge_texts(reward, **source)


def test_rows_must_hold_one_video() -> None:
    judge = judge_texts(VideoReward(scorer=StubScorer()), render=None, column="videos")
    with pytest.raises(ValueError, match="column must be among .'video'., got 'videos'"):
        judge(["a"], ["p"], {"video": ["x.mp4"]})
    with pytest.raises(ValueError, match="videos must hold one video in each row, got 2"):
        judge(["a"], ["p"], {"videos": [["x.mp4", "y.mp4"]]})
