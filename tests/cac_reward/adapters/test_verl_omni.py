"""The contract of verl-omni's visual reward managers.

Source: verl-project/verl-omni, verl_omni/reward_loop/reward_manager/{visual,multi}.py.
"""

import asyncio
import inspect
import threading
from pathlib import Path

import pytest
import torch

from cac_reward import CaCScorer
from cac_reward.adapters import verl_omni
from cac_reward.adapters.verl_omni import compute_score
from cac_reward.frames import JudgeSettings
from cac_reward.judges.endpoint import EndpointOptions
from tests.cac_reward.adapters.stub_scorer import FPS, UNJUDGED, StubScorer, clip


def run_single(video: torch.Tensor, entry: dict, extra_info: dict | None = None, **more) -> dict:
    """How the multi-reward manager calls a function: by keyword, with those that it declares."""
    assert inspect.iscoroutinefunction(compute_score)
    available = {
        "data_source": "videos",
        "solution_image": video,
        "ground_truth": "a cup",
        "extra_info": {"num_turns": None, **(extra_info or {})},
        "reward_router_address": "127.0.0.1:1",
        "model_name": "another",  # Their own reward router's; not our `model`.
        **entry,
        **more,
    }
    declared = inspect.signature(compute_score).parameters
    taken = {name: value for name, value in available.items() if name in declared}
    return asyncio.run(compute_score(**taken))


@pytest.mark.parametrize("num_frames", [3, 5])
def test_one_sample_of_bytes(num_frames: int) -> None:
    scorer = StubScorer()
    result = run_single(clip(51, num_frames), {"judge": scorer, "fps": FPS})
    assert result == {"score": pytest.approx(0.2), "failed": 0}
    assert isinstance(result["score"], float)
    ((videos, prompts, fps),) = scorer.seen
    torch.testing.assert_close(videos[0], clip(51, num_frames).float() / 255)
    assert (prompts, fps) == (["a cup"], FPS)


def test_the_rate_comes_from_the_configuration_or_the_sample() -> None:
    scorer = StubScorer()
    run_single(clip(1), {"judge": scorer}, {"fps": 24})
    run_single(clip(1), {"judge": scorer, "fps": 16}, {"fps": 24})
    assert [fps for _, _, fps in scorer.seen] == [24, 16]
    with pytest.raises(ValueError, match="fps must be given .*extra_info.'fps'., got neither"):
        run_single(clip(1), {"judge": scorer})
    with pytest.raises(ValueError, match="fps must be above 0, got 'fast'"):
        run_single(clip(1), {"judge": scorer, "fps": "fast"})


def test_a_ground_truth_that_is_no_text_is_no_prompt() -> None:
    scorer = StubScorer()
    run_single(clip(1), {"judge": scorer, "fps": FPS}, ground_truth={"answer": 1})
    assert scorer.seen[0][1] == [""]


def test_failures() -> None:
    with pytest.raises(RuntimeError, match="1 of 1 videos could not be judged: too red"):
        run_single(clip(UNJUDGED), {"judge": StubScorer(), "fps": FPS})
    entry = {"judge": StubScorer(), "fps": FPS, "on_failure": "mask"}
    result = run_single(clip(UNJUDGED), entry)
    assert result == {"score": pytest.approx(float("nan"), nan_ok=True), "failed": 1}
    result = run_single(clip(UNJUDGED), {**entry, "on_failure": 0})
    assert result == {"score": 0, "failed": 1}


def test_floats_are_refused() -> None:
    with pytest.raises(ValueError, match="videos must be in 0..255, got values from -"):
        run_single(clip(9).float() * 2 - 255, {"judge": StubScorer(), "fps": FPS})


def test_the_event_loop_goes_on_meanwhile() -> None:
    looked, release = threading.Event(), threading.Event()

    def slow(videos: torch.Tensor, prompts: list[str], *, fps: float) -> torch.Tensor:
        looked.set()
        assert release.wait(20)
        return torch.zeros(len(videos))

    async def both() -> dict:
        task = asyncio.create_task(compute_score(None, clip(1), "", judge=slow, fps=FPS))
        while not looked.is_set():
            await asyncio.sleep(0.001)
        release.set()  # Reached only because the loop was free while the judge looked.
        return await task

    assert asyncio.run(both())["score"] == 0


def test_the_judge_is_loaded_as_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(
        verl_omni, "scorer_of", lambda *judge, **how: asked.append((judge, how)) or StubScorer()
    )
    how = {"device": "cuda:1", "dtype": "float16", "mode": "fast", "revision": "main"}
    run_single(clip(1), {"judge": "some/judge", "fps": FPS, **how}, model="qwen")
    assert asked == [(("some/judge",), {**how, "model": "qwen"})]


def test_the_toy_judge_by_its_folder(toy_judge_folder: Path, toy_videos: torch.Tensor) -> None:
    entry = {"judge": str(toy_judge_folder), "device": "cpu", "dtype": "float32", "mode": "fast"}
    video = (toy_videos[0] * 255).round().to(torch.uint8)
    result = run_single(video, {**entry, "fps": 8.0})
    assert 0 <= result["score"] <= 1
    assert result["failed"] == 0


def test_a_running_server_named_in_the_configuration(reward_server) -> None:
    entry = {"judge": reward_server.url, "fps": FPS, "on_failure": "mask"}
    assert run_single(clip(60), entry) == {"score": pytest.approx(60 / 255), "failed": 0}
    assert run_single(clip(10), entry)["failed"] == 1


def test_an_openai_server_named_in_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(
        CaCScorer, "from_endpoint", lambda *judge, **how: asked.append((judge, how)) or StubScorer()
    )
    entry = {"judge": "http://127.0.0.1:1/v1", "model": "qwen", "mode": "fast", "fps": FPS}
    assert run_single(clip(51), entry)["score"] == pytest.approx(0.2)
    how = {"options": EndpointOptions(), "settings": JudgeSettings(), "cache": None}
    assert asked == [(("http://127.0.0.1:1/v1", "qwen"), {"mode": "fast", **how})]
