"""The contract of Flow-Factory's reward models and of its client of /compute.

Flow-Factory is not installed here: a stand-in with its documented base class takes its place.
Source: X-GenGroup/Flow-Factory, src/flow_factory/rewards/{abc,registry,my_reward_remote}.py.
"""

import base64
import importlib
import io
import json
import pickle
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from PIL import Image

from cac_reward.adapters import flow_factory
from cac_reward.adapters.base import Outcome, VideoReward
from cac_reward.adapters.flow_factory import compute_reply, parse_compute
from cac_reward.adapters.settings import ScorerSettings
from cac_reward.video import VideoLimits
from tests.cac_reward.adapters.stub_scorer import (
    FPS,
    UNJUDGED,
    StubScorer,
    as_float,
    clip,
    expect,
)


class PointwiseRewardModel:
    """What their base class does with its arguments."""

    def __init__(self, config, accelerator) -> None:
        self.config = config
        self.accelerator = accelerator
        same = config.device == torch.device("cuda")
        self.device = accelerator.device if same else config.device
        self.dtype = config.dtype
        self.model = None


@dataclass
class RewardModelOutput:
    rewards: torch.Tensor
    extra_info: dict | None = None


@pytest.fixture
def reward_class(monkeypatch: pytest.MonkeyPatch) -> type:
    """The class as their registry finds it: by dotted path."""
    parts = [ModuleType(f"flow_factory{end}") for end in ("", ".rewards", ".rewards.abc")]
    parts[2].PointwiseRewardModel = PointwiseRewardModel
    parts[2].RewardModelOutput = RewardModelOutput
    for part in parts:
        monkeypatch.setitem(sys.modules, part.__name__, part)
    flow_factory._reward_model_class.cache_clear()
    path, name = "cac_reward.adapters.flow_factory.CaCRewardModel".rsplit(".", 1)
    yield getattr(importlib.import_module(path), name)
    flow_factory._reward_model_class.cache_clear()


@pytest.fixture
def scorer(monkeypatch: pytest.MonkeyPatch) -> StubScorer:
    """What any judge's folder loads."""
    stub = StubScorer()
    stub.loaded_with = []
    monkeypatch.setattr(
        ScorerSettings, "load", lambda settings: stub.loaded_with.append(settings) or stub
    )
    return stub


def make(reward_class: type, **extra: object):
    """How they make one: unknown keys of the YAML stand in extra_kwargs."""
    options = {"judge": "some/judge", "fps": FPS, **extra}
    config = SimpleNamespace(
        dtype=torch.bfloat16, device=torch.device("cuda"), extra_kwargs=options, batch_size=2
    )
    return reward_class(config=config, accelerator=SimpleNamespace(device=torch.device("cpu")))


def test_it_is_one_of_theirs(reward_class, scorer) -> None:
    model = make(reward_class, mode="fast")
    assert issubclass(reward_class, PointwiseRewardModel)
    assert (model.required_fields, model.use_tensor_inputs) == (("prompt", "video"), True)
    assert pickle.loads(pickle.dumps(reward_class)) is reward_class
    (settings,) = scorer.loaded_with
    assert settings == ScorerSettings(
        judge="some/judge", fps=FPS, device="cpu", dtype="bfloat16", mode="fast"
    )


@pytest.mark.parametrize("num_frames", [3, 5])
def test_lists_of_tensors_and_of_pictures(reward_class, scorer, num_frames: int) -> None:
    model = make(reward_class)
    frames = [clip(51), clip(102, num_frames), clip(204, height=8)]  # Ragged.
    output = model(
        prompt=["a", "b", "c"],
        video=[as_float(one) for one in frames],
        image=None,
        audio=None,
        condition_images=None,
        condition_videos=None,
        metadata=["{}", "{}", "{}"],
    )
    assert isinstance(output, RewardModelOutput)
    expect(
        torch.as_tensor(output.rewards, device="cpu", dtype=torch.float32).tolist(), [51, 102, 204]
    )
    assert output.extra_info == {"errors": [None, None, None]}
    shown = {prompts[0]: videos for videos, prompts, _ in scorer.seen}
    torch.testing.assert_close(shown["a"][0], as_float(frames[0]))
    pictures = [
        [Image.fromarray(one) for one in video.permute(0, 2, 3, 1).numpy()] for video in frames
    ]
    again = model(prompt=["a", "b", "c"], video=pictures)
    torch.testing.assert_close(again.rewards, output.rewards)


def test_failures(reward_class, scorer) -> None:
    video = [as_float(clip(UNJUDGED)), as_float(clip(51))]
    with pytest.raises(RuntimeError, match="1 of 2 videos could not be judged: too red"):
        make(reward_class)(prompt=["a", "b"], video=video)
    output = make(reward_class, on_failure="mask")(prompt=["a", "b"], video=video)
    expect(output.rewards.tolist(), [UNJUDGED, 51])
    assert output.extra_info == {"errors": ["too red to judge", None]}
    assert make(reward_class, on_failure=-1)(prompt=["a", "b"], video=video).rewards[0] == -1


def test_wrong_options_are_refused(reward_class, scorer) -> None:
    with pytest.raises(ValueError, match="fps must be above 0, got None"):
        make(reward_class, fps=None)
    with pytest.raises(ValueError, match="options must be among .* got 'server_url'"):
        make(reward_class, server_url="http://127.0.0.1")
    with pytest.raises(ValueError, match="video must be given, got None; CaC judges videos"):
        make(reward_class)(prompt=["a"], image=[object()])


def test_without_flow_factory_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flow_factory", None)
    flow_factory._reward_model_class.cache_clear()
    with pytest.raises(ImportError, match="CaCRewardModel needs flow_factory: install X-GenGroup"):
        _ = flow_factory.CaCRewardModel
    with pytest.raises(AttributeError, match="has no attribute 'Reward'"):
        _ = flow_factory.Reward


def base64_frames(frames: torch.Tensor, kind: str = "PNG") -> list[str]:
    """How their client writes a video."""
    texts = []
    for frame in frames.permute(0, 2, 3, 1).numpy():
        buffer = io.BytesIO()
        Image.fromarray(frame).save(buffer, format=kind)
        texts.append(base64.b64encode(buffer.getvalue()).decode())
    return texts


def payload(*frames: torch.Tensor, **changes: object) -> dict:
    """What their client posts, after its way over the wire."""
    body = {
        "prompt": [f"prompt {row}" for row in range(len(frames))],
        "image": None,
        "video": [base64_frames(one) for one in frames],
        "condition_images": None,
        "condition_videos": None,
        "kwargs": None,
        **changes,
    }
    return json.loads(json.dumps(body))


@pytest.mark.parametrize("num_frames", [3, 5])
def test_a_request_and_its_answer(num_frames: int) -> None:
    frames = [clip(51, num_frames), clip(102, height=8)]
    request = parse_compute(payload(*frames))
    assert all(torch.equal(*pair) for pair in zip(request.videos, frames, strict=True))
    assert all(one.dtype == torch.uint8 for one in request.videos)
    assert (request.prompts, request.fps) == (("prompt 0", "prompt 1"), None)
    assert parse_compute(payload(*frames, kwargs={"fps": 24})).fps == 24
    reward = VideoReward(scorer=StubScorer(), fps=FPS, value_range="0..255", on_failure="mask")
    reply = json.loads(json.dumps(compute_reply(reward(request.videos, request.prompts))))
    assert list(reply) == ["rewards"]
    expect(reply["rewards"], [51, 102])


def test_a_missing_reward_is_an_error_of_the_request() -> None:
    scores = torch.tensor([0.5, float("nan")])
    reply = compute_reply(Outcome(scores, (None, "too red to judge"), (None, None)))
    assert reply == {"error": "video 1 could not be judged: too red to judge"}
    replaced = Outcome(torch.tensor([0.5, -1.0]), (None, "too red to judge"), (None, None))
    assert compute_reply(replaced) == {"rewards": [0.5, -1.0]}


PNG = base64_frames(clip(1))
BMP = base64_frames(clip(1), "BMP")
OTHER_SIZE = base64_frames(clip(1, height=8))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"video": None}, "video must be a list of lists of base64 frames"),
        ({"video": [PNG[0]]}, "video must be a list of lists of base64 frames"),
        ({"prompt": "a"}, "prompt must be a list of texts, got str"),
        ({"prompt": []}, "prompts must hold one text for each of 1 videos, got 0"),
        ({"prompt": [7]}, "prompts must be texts, got int"),
        ({"kwargs": []}, "kwargs must be an object or null, got list"),
        ({"kwargs": {"fps": 0}}, "fps must be above 0, got 0"),
        ({"kwargs": {"fps": "8"}}, "fps must be above 0, got '8'"),
        ({"video": [[PNG[0], 7]]}, r"video\[0\]\[1\] must be base64 text, got int"),
        ({"video": [[PNG[0], "***"]]}, r"video\[0\]\[1\] must be a base64 PNG or JPEG picture"),
        ({"video": [[PNG[0], "AAAA"]]}, r"video\[0\]\[1\] must be a base64 PNG or JPEG picture"),
        ({"video": [[PNG[0], BMP[0]]]}, r"video\[0\]\[1\] must be a base64 PNG or JPEG picture"),
        ({"video": [[PNG[0], PNG[1][:68]]]}, r"video\[0\]\[1\] must be a base64 PNG or JPEG"),
        ({"video": [[PNG[0]]]}, r"video\[0\] must have at least 2 frames, got 1"),
        ({"video": [[]]}, r"video\[0\] must have at least 2 frames, got 0"),
        ({"video": [[PNG[0], OTHER_SIZE[0]]]}, "frames must be pictures of one size"),
    ],
)
def test_wrong_requests_are_refused(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_compute(payload(clip(1), **changes))


def test_what_is_no_object_is_refused() -> None:
    with pytest.raises(ValueError, match="payload must be an object, got list"):
        parse_compute([])


def test_limits_are_checked_before_pixels_are_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    body = payload(clip(1))
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("decoded"))
    for limits, message in [
        (VideoLimits(max_pixels=23), r"max_pixels=23, got 24 in video\[0\]\[0\]"),
        (VideoLimits(max_frames=2), r"max_frames=2, got 3 in video\[0\]\[0\]"),
        (VideoLimits(max_bytes=200), r"max_bytes=200, got 216 in video\[0\]\[0\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            parse_compute(body, limits=limits)


def test_the_toy_judge_through_the_class(
    reward_class: type, toy_judge_folder: Path, toy_videos: torch.Tensor
) -> None:
    model = make(reward_class, judge=str(toy_judge_folder), dtype="float32", mode="fast", fps=8.0)
    rewards = model(prompt=["a", "b"], video=list(toy_videos)).rewards
    assert rewards.shape == (2,)
    assert ((rewards >= 0) & (rewards <= 1)).all()
