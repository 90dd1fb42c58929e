"""Videos of every form into the reward contract, and the failure conventions."""

import copy
import logging
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cac_reward.adapters.base import (
    Outcome,
    VideoReward,
    check_on_failure,
    missing_package,
    refuse_gradient,
    value_range_of,
)
from cac_reward.video import Video
from tests.cac_reward.adapters.stub_scorer import (
    FPS,
    UNJUDGED,
    StubScorer,
    as_float,
    clip,
    expect,
    mp4,
    red_of,
)

ADAPTERS = sorted(
    path.stem
    for path in (Path(__file__).resolve().parents[3] / "cac_reward" / "adapters").glob("*.py")
    if path.stem != "__init__"
)


def pictures(red: int) -> list[Image.Image]:
    return [Image.fromarray(frame) for frame in clip(red).permute(0, 2, 3, 1).numpy()]


@pytest.mark.parametrize("num_frames", [3, 5])  # Three frames look like three channels.
@pytest.mark.parametrize("layout", ["FCHW", "CFHW", "FHWC"])
@pytest.mark.parametrize("kind", ["tensor", "array"])
def test_every_layout_arrives_as_the_contract(layout: str, kind: str, num_frames: int) -> None:
    wanted = torch.stack([clip(red, num_frames) for red in (100, 200)])
    order = ["BFCHW".index(letter) for letter in "B" + layout]
    videos = wanted.permute(order)
    scorer = StubScorer()
    reward = VideoReward(scorer=scorer, fps=FPS, layout=layout, value_range="0..255")
    outcome = reward(videos.numpy() if kind == "array" else videos, ["a", "b"])
    expect(outcome.scores.tolist(), [100, 200])
    ((seen, prompts, fps),) = scorer.seen
    torch.testing.assert_close(seen, as_float(wanted))
    assert (prompts, fps) == (["a", "b"], FPS)


@pytest.mark.parametrize(
    ("value_range", "scale"),
    [("0..1", lambda x: x), ("-1..1", lambda x: x * 2 - 1), ("0..255", lambda x: x * 255)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_range_arrives_as_the_contract(value_range, scale, dtype) -> None:
    wanted = as_float(clip(77))
    scorer = StubScorer()
    reward = VideoReward(scorer=scorer, fps=FPS, value_range=value_range)
    reward(scale(wanted.to(dtype))[None], ["a"])
    torch.testing.assert_close(scorer.seen[0][0][0], wanted, atol=1e-6, rtol=1e-6)


def test_ragged_clips_of_all_forms_keep_their_order(tmp_path: Path) -> None:
    file = tmp_path / "clip.mp4"
    file.write_bytes(mp4(clip(120)))
    videos = [
        as_float(clip(10, num_frames=5)),
        as_float(clip(20)),
        as_float(clip(30, num_frames=5)).numpy(),
        Video(clip(40, height=8), FPS),
        pictures(50),
        file,
        str(file),
        file.read_bytes(),
    ]
    scorer = StubScorer()
    outcome = VideoReward(scorer=scorer, fps=FPS)(videos, list("abcdefgh"))
    expect(outcome.scores[:5].tolist(), [10, 20, 30, 40, 50])
    assert outcome.scores[5:].tolist() == pytest.approx([red_of(file.read_bytes())] * 3)
    assert [report.prompt for report in outcome.reports] == list("abcdefgh")
    assert outcome.errors == (None,) * 8
    # Those of one form went together: two of five frames in one batch.
    assert sorted("".join(prompts) for _, prompts, _ in scorer.seen) == ["ac", "b", "d", "efgh"]


def test_clips_are_scored_a_few_at_a_time() -> None:
    scorer = StubScorer()
    videos = torch.stack([as_float(clip(red)) for red in range(5)])
    outcome = VideoReward(scorer=scorer, fps=FPS, clips_at_once=2)(videos, list("abcde"))
    expect(outcome.scores.tolist(), [0, 1, 2, 3, 4])
    assert [len(prompts) for _, prompts, _ in scorer.seen] == [2, 2, 1]


def test_files_keep_their_own_rate_unless_told(tmp_path: Path) -> None:
    file = tmp_path / "clip.mp4"
    file.write_bytes(mp4(clip(120), fps=25))
    scorer = StubScorer()
    VideoReward(scorer=scorer)([file, Video(clip(1), 12.0)], ["a", "b"])
    VideoReward(scorer=scorer, fps=16)([file], ["a"])
    VideoReward(scorer=scorer, fps=16)([file], ["a"], fps=10.0)
    assert [fps for _, _, fps in scorer.seen] == [25, 12, 16, 10]


def test_what_a_file_shows_can_be_chosen() -> None:
    scorer = StubScorer()
    half = VideoReward(scorer=scorer, sample=lambda video: Video(video.frames[::2], video.fps / 2))
    half([Video(clip(9, num_frames=8), 8.0), mp4(clip(9, num_frames=6))], None)
    half([mp4(clip(9, num_frames=6), 25.0)], None, fps=16.0)
    assert [(videos.shape[1], fps) for videos, _, fps in scorer.seen] == [(4, 4), (3, 4), (3, 8)]


def test_no_videos_ask_nobody() -> None:
    scorer = StubScorer()
    outcome = VideoReward(scorer=scorer, fps=FPS)([], [])
    assert (outcome.scores.shape, outcome.errors, outcome.failed_share) == ((0,), (), 0)
    assert scorer.seen == []


def test_a_scorer_may_return_a_plain_tensor() -> None:
    reward = VideoReward(scorer=StubScorer(with_reports=False), fps=FPS, on_failure="mask")
    outcome = reward([as_float(clip(red)) for red in (30, UNJUDGED)], None)
    expect(outcome.scores.tolist(), [30, UNJUDGED])
    assert outcome.reports == (None, None)
    assert outcome.errors == (None, "the scorer returned NaN")


BROKEN = mp4(clip(120))[:200]


@pytest.mark.parametrize(
    ("video", "error"),
    [
        (Video(clip(UNJUDGED), FPS), "too red to judge"),
        (BROKEN, "video must be a readable video file"),
    ],
)
def test_failures_follow_the_convention(video, error, caplog) -> None:
    videos = [video, Video(clip(51), FPS)]

    def judge(on_failure: str | float) -> Outcome:
        return VideoReward(scorer=StubScorer(), on_failure=on_failure)(videos, ["a", "b"])

    with pytest.raises(RuntimeError, match=f"1 of 2 videos could not be judged: {error}"):
        judge("raise")
    with caplog.at_level(logging.WARNING):
        masked = judge("mask")
    assert f"1 of 2 videos could not be judged: {error}" in caplog.text
    assert masked.scores[0].isnan()
    assert masked.or_none() == [None, pytest.approx(51 / 255)]
    assert error in masked.errors[0]
    assert masked.failed_share == 0.5
    replaced = judge(-10)
    assert replaced.scores.tolist() == pytest.approx([-10, 51 / 255])
    assert error in replaced.errors[0]  # A number does not hide that it failed.
    assert replaced.failed_share == 0.5


def test_a_missing_file_is_never_a_failure_to_mask(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="video must be an existing file"):
        VideoReward(scorer=StubScorer(), on_failure="mask")([tmp_path / "none.mp4"], ["a"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scorer": "cac"}, "scorer must be callable as scorer.videos, prompts, fps=....*'cac'"),
        ({"fps": 0}, "fps must be above 0, got 0"),
        ({"on_failure": "zero"}, "on_failure must be 'mask', 'raise' or a finite number.*'zero'"),
        ({"clips_at_once": 0}, "clips_at_once must be at least 1, got 0"),
    ],
)
def test_wrong_settings_are_refused(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        VideoReward(**{"scorer": StubScorer(), **settings})


@pytest.mark.parametrize("value", [math.nan, math.inf, True, None, "-10"])
def test_what_is_no_failure_convention(value) -> None:
    with pytest.raises(ValueError, match="on_failure must be 'mask', 'raise' or a finite number"):
        check_on_failure(value)


@pytest.mark.parametrize(
    ("videos", "prompts", "settings", "message"),
    [
        (torch.zeros(2, 3, 3, 4, 4), ["a"], {}, "prompts must hold one text for each of 2 videos"),
        (torch.zeros(1, 3, 3, 4, 4), "a", {}, "prompts must hold one text for each of 1 videos"),
        (torch.zeros(1, 3, 3, 4, 4), ["a"], {"fps": None}, "fps must be above 0, got None"),
        (torch.zeros(1, 3, 4, 4), ["a"], {}, "one axis for each letter of layout 'FCHW'"),
        (torch.zeros(1, 3, 5, 4, 4), ["a"], {}, "3 channels where layout 'FCHW' says C, got 5"),
        (torch.zeros(1, 5, 3, 4, 4), ["a"], {"layout": "CFHW"}, "3 channels .* got 5"),
        (torch.zeros(1, 3, 3, 4, 4) - 1, ["a"], {}, "videos must be in 0..1, got values from -1"),
        (torch.zeros(1, 3, 3, 4, 4), ["a"], {"layout": "TCHW"}, "layout must hold the letters"),
        (torch.zeros(1, 3, 3, 4, 4), ["a"], {"value_range": "8bit"}, "value_range must be one of"),
        (clip(1)[None], ["a"], {}, "value_range must be '0..255' for torch.uint8"),
        ([None], ["a"], {}, "a video must be a tensor, an array, a Video, a path or a list of PIL"),
        ([Video(clip(1), 9.0)], ["a"], {}, "fps must be None or the video's own 9.0, got 8.0"),
    ],
)
def test_wrong_videos_are_the_callers_error(videos, prompts, settings, message) -> None:
    reward = VideoReward(scorer=StubScorer(), **{"fps": FPS, "on_failure": "mask", **settings})
    with pytest.raises(ValueError, match=message):
        reward(videos, prompts)


@pytest.mark.parametrize(
    "answer", [torch.zeros(2), torch.zeros(1, 1), torch.tensor(0.5), torch.tensor([math.inf])]
)
def test_a_scorer_must_keep_the_contract(answer: torch.Tensor) -> None:
    reward = VideoReward(scorer=lambda videos, prompts, fps: answer, fps=FPS, on_failure="mask")
    with pytest.raises(ValueError, match="one finite number or NaN for each of 1 videos"):
        reward(as_float(clip(1))[None], ["a"])


def test_only_videos_that_ask_for_a_gradient_are_refused() -> None:
    videos = torch.zeros(2, requires_grad=True)
    with pytest.raises(RuntimeError, match="must not require a gradient.*policy-gradient"):
        refuse_gradient(videos)
    refuse_gradient(videos.detach())
    with torch.no_grad():
        refuse_gradient(videos)


@pytest.mark.parametrize("array", [torch.zeros(1), np.zeros(1, "float32"), np.zeros(1)])
def test_bytes_and_floats_have_their_ranges(array) -> None:
    assert value_range_of(array) == "0..1"
    assert value_range_of(clip(1)) == value_range_of(clip(1).numpy()) == "0..255"


def test_a_copy_shares_the_scorer() -> None:
    reward = VideoReward(scorer=StubScorer(), fps=FPS)
    assert copy.deepcopy(reward) is reward


def test_a_missing_package_says_what_to_do() -> None:
    error = missing_package("CaCMetric", "torchmetrics", "pip install torchmetrics")
    assert str(error) == "CaCMetric needs torchmetrics: pip install torchmetrics"
    assert error.name == "torchmetrics"


def test_importing_every_adapter_loads_no_framework() -> None:
    assert len(ADAPTERS) > 10
    imports = "; ".join(f"import cac_reward.adapters.{name}" for name in ADAPTERS)
    program = f"import sys; {imports}; print(*{{name.split('.')[0] for name in sys.modules}})"
    command = [sys.executable, "-c", program]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    loaded = set(run.stdout.split())
    frameworks = {"trl", "swift", "flow_factory", "verl", "reward_service", "torchmetrics"}
    assert not loaded & (frameworks | {"transformers", "diffusers", "accelerate", "peft", "av"})
    assert {"torch", "cac_reward"} <= loaded


def test_a_scorers_own_reasons_are_told() -> None:
    def scorer(videos: torch.Tensor, prompts: list[str], *, fps: float) -> dict:
        told = ["busy", "a remark on a clip with a score", None]
        return {"score": torch.tensor([math.nan, 0.5, math.nan]), "errors": told}

    outcome = VideoReward(scorer=scorer, fps=FPS, on_failure="mask")(
        torch.zeros(3, 2, 3, 4, 4), None
    )
    assert outcome.errors == ("busy", None, "the scorer returned NaN")
