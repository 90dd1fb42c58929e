"""The contract of Flow-Factory's reward models.

Flow-Factory is not installed here: a stand-in with its documented base class takes its place.
Source: X-GenGroup/Flow-Factory, src/flow_factory/rewards/{abc,registry}.py.
"""

import importlib
import pickle
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from PIL import Image

from cac_reward.adapters import flow_factory
from cac_reward.adapters.settings import ScorerSettings
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


def test_a_running_server_named_in_the_yaml(reward_class, reward_server) -> None:
    model = make(reward_class, judge=reward_server.url, on_failure="mask")
    video = [as_float(clip(60)), as_float(clip(10)), as_float(clip(180, height=8))]
    output = model(prompt=["a", "b", "c"], video=video)
    assert output.rewards.tolist() == pytest.approx(
        [60 / 255, float("nan"), 180 / 255], nan_ok=True
    )
    assert [error is None for error in output.extra_info["errors"]] == [True, False, True]
    assert "the reward returned nan" in output.extra_info["errors"][1]  # The server's own words.


def test_the_toy_judge_through_the_class(
    reward_class: type, toy_judge_folder: Path, toy_videos: torch.Tensor
) -> None:
    model = make(reward_class, judge=str(toy_judge_folder), dtype="float32", mode="fast", fps=8.0)
    rewards = model(prompt=["a", "b"], video=list(toy_videos)).rewards
    assert rewards.shape == (2,)
    assert ((rewards >= 0) & (rewards <= 1)).all()
