"""The contract of VideoAlign's VideoVLMRewardInference (KwaiVGI/VideoAlign, inference.py)."""

import inspect
import math
from pathlib import Path

import pytest
import torch

from cac_reward.adapters import videoalign
from cac_reward.adapters.videoalign import VideoVLMRewardInference, sample_indices
from cac_reward.video import Video
from tests.cac_reward.adapters.stub_scorer import StubScorer, clip, mp4, red_of


@pytest.fixture
def paths(tmp_path: Path) -> list[str]:
    """Clips of 9 and 4 frames at 8 and 16 frames per second."""
    for name, frames, fps in (("a", clip(100, 9, 8, 8), 8.0), ("b", clip(200, 4), 16.0)):
        (tmp_path / f"{name}.mp4").write_bytes(mp4(frames, fps))
    return [str(tmp_path / "a.mp4"), str(tmp_path / "b.mp4")]


def reds(paths: list[str]) -> list[float]:
    return [red_of(Path(path).read_bytes()) for path in paths]


def alignment(videos: torch.Tensor, prompts: list[str], *, fps: float) -> torch.Tensor:
    return torch.full((len(videos),), 0.5)


def test_signatures_are_theirs() -> None:
    made = inspect.signature(VideoVLMRewardInference).parameters
    assert [name for name, one in made.items() if one.kind is not one.KEYWORD_ONLY] == [
        *("load_from_pretrained", "load_from_pretrained_step", "device", "dtype")
    ]
    assert made["device"].default == "cuda"
    assert made["dtype"].default == torch.bfloat16
    called = inspect.signature(VideoVLMRewardInference.reward).parameters
    assert {name: one.default for name, one in list(called.items())[3:]} == {
        "fps": None,
        "num_frames": None,
        "max_pixels": None,
        "use_norm": True,
    }
    assert list(called)[1:3] == ["video_paths", "prompts"]


def test_one_dict_for_each_video(paths: list[str]) -> None:
    scorer = StubScorer()
    rewards = VideoVLMRewardInference(scorer).reward(paths, ["a cup", "a dog"], use_norm=True)
    for row, red in zip(rewards, reds(paths), strict=True):
        assert list(row) == ["VQ", "MQ", "TA", "Overall"]
        assert row["VQ"] == row["MQ"] == row["Overall"] == pytest.approx(red)
        assert math.isnan(row["TA"])
    assert [(videos.shape[1], fps) for videos, _, fps in scorer.seen] == [(9, 8), (4, 16)]
    assert [prompts for _, prompts, _ in scorer.seen] == [["a cup"], ["a dog"]]
    again = VideoVLMRewardInference(scorer).reward(paths, ["a cup", "a dog"], use_norm=False)
    assert [row["Overall"] for row in again] == [row["Overall"] for row in rewards]


def test_alignment_is_ta_and_half_of_overall(paths: list[str]) -> None:
    rewards = VideoVLMRewardInference(StubScorer(), alignment=alignment).reward(paths, ["", ""])
    assert [row["TA"] for row in rewards] == [0.5, 0.5]
    assert [row["Overall"] for row in rewards] == pytest.approx(
        [(red + 0.5) / 2 for red in reds(paths)]
    )


@pytest.mark.parametrize(
    ("asked", "shape", "fps"),
    [
        ({"fps": 4.0}, (5, 8, 8), 4),
        ({"fps": 99.0}, (9, 8, 8), 8),
        ({"num_frames": 3}, (3, 8, 8), 2),
        ({"max_pixels": 16}, (9, 4, 4), 8),
        ({"max_pixels": 10_000}, (9, 8, 8), 8),
        ({"fps": 4.0, "max_pixels": 16}, (5, 4, 4), 4),
    ],
)
def test_what_the_caller_limits_is_what_the_judge_sees(paths, asked, shape, fps) -> None:
    scorer = StubScorer()
    second = StubScorer()
    VideoVLMRewardInference(scorer, alignment=second).reward(paths[:1], ["a"], **asked)
    ((videos, _, got_fps),) = scorer.seen
    torch.testing.assert_close(second.seen[0][0], videos)
    assert second.seen[0][2] == got_fps
    assert (*videos.shape[1:2], *videos.shape[3:]) == shape
    assert got_fps == fps
    if shape[1:] == (8, 8):  # The frames themselves, in order and at their places in time.
        source = Video.decode(paths[0])
        places = [round(frame * source.fps / fps) for frame in range(shape[0])]
        torch.testing.assert_close(videos[0], source.to_float(places))


@pytest.mark.parametrize(("fps", "wanted"), [(24.0, 16.0), (30.0, 8.0), (16.0, 15.0), (10.0, 3.0)])
@pytest.mark.parametrize("num_frames", [9, 33, 81])
def test_sampled_frames_are_those_on_screen(fps: float, wanted: float, num_frames: int) -> None:
    indices, rate = sample_indices(num_frames, fps, wanted, None)
    assert rate == wanted
    assert indices == [round(place * fps / wanted) for place in range(len(indices))]
    assert indices[-1] < num_frames <= round(len(indices) * fps / wanted) + 1
    indices, rate = sample_indices(num_frames, fps, None, 2)
    assert indices == [0, num_frames - 1]
    assert rate == pytest.approx(fps / (num_frames - 1))


def test_at_least_two_frames_are_left() -> None:
    assert sample_indices(4, 16.0, 4.0, None) == ([0, 3], pytest.approx(16 / 3))
    # 125 frames are 30 steps of 10 / 2.4 frames, but for rounding.
    assert sample_indices(126, 10.0, 2.4, None)[0][-1] == 125
    assert sample_indices(2, 24.0, 16.0, None) == ([0, 1], 24.0)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"fps": 2.0, "num_frames": 4}, "fps must be None where num_frames is given, got 2.0, 4"),
        ({"fps": 0}, "fps must be above 0, got 0"),
        ({"num_frames": 1}, "num_frames must be in .2, 9., the video's frames, got 1"),
        ({"num_frames": 10}, "num_frames must be in .2, 9., the video's frames, got 10"),
        ({"max_pixels": 0}, "max_pixels must be at least 1, got 0"),
    ],
)
def test_wrong_limits_are_refused(paths: list[str], asked: dict, message: str) -> None:
    model = VideoVLMRewardInference(StubScorer(), on_failure="mask")
    with pytest.raises(ValueError, match=message):
        model.reward(paths[:1], ["a"], **asked)


def test_failures(paths: list[str], tmp_path: Path) -> None:
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(Path(paths[0]).read_bytes()[:300])
    both = [str(broken), paths[1]]
    with pytest.raises(RuntimeError, match="1 of 2 videos could not be judged: video must be"):
        VideoVLMRewardInference(StubScorer()).reward(both, ["a", "b"])
    for asked in ({}, {"fps": 4.0}):
        masked = VideoVLMRewardInference(StubScorer(), on_failure="mask")
        rows = masked.reward(both, ["a", "b"], **asked)
        assert all(math.isnan(value) for value in rows[0].values())
        assert rows[1]["Overall"] == pytest.approx(reds(paths)[1])
    rows = VideoVLMRewardInference(StubScorer(), on_failure=-1).reward(both, ["a", "b"])
    assert rows[0]["Overall"] == rows[0]["VQ"] == -1


def test_a_checkpoint_step_is_refused() -> None:
    with pytest.raises(ValueError, match="load_from_pretrained_step must be -1, got 400; name"):
        VideoVLMRewardInference(StubScorer(), 400)


def test_the_judge_is_loaded_as_they_load_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(
        videoalign, "scorer_of", lambda *place, **how: asked.append((place, how)) or StubScorer()
    )
    VideoVLMRewardInference("some/judge", device="cuda:1", dtype=torch.float16)
    assert asked == [(("some/judge",), {"device": "cuda:1", "dtype": torch.float16})]
