"""Whole runs whose rewards live elsewhere: the same result, and nothing lost when they fail."""

from __future__ import annotations

import dataclasses
import json
import shutil
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion_rl.checkpoint import latest_checkpoint
from diffusion_rl.configuration import RunSettings, build, load_config
from diffusion_rl.held_out import EvaluationSettings
from diffusion_rl.launch import CHECKPOINTS, CONFIG_FILE, PROMPTS_FILE, prepare, train
from diffusion_rl.lora import lora_state
from diffusion_rl.rewards import Reward, RewardFailed, RewardSettings
from diffusion_rl.run_lock import LOCK_FILE
from diffusion_rl.tracking import read_metrics
from tests.score_server import ScoreServer, by_redness, score_server
from tests.tiny_wan import save_tiny_wan


def redness(videos: Tensor, prompts: list[str], *, fps: float) -> Tensor:
    """The mean of each clip's red."""
    return videos[:, :, 0].mean((1, 2, 3))


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_wan(tmp_path_factory.mktemp("wan") / "pipeline")


def tree(wan: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    (folder / "prompts.txt").write_text("a red circle\nthe blue square\na cup\n")
    (folder / "unseen.txt").write_text("a green ball\n")
    here = {"name": "red", "target": f"{__name__}:redness"}
    return {
        "generator": {
            **{"path": str(wan), "height": 16, "width": 16, "num_frames": 5, "fps": 8.0},
            "max_sequence_length": 12,
        },
        "lora": {"rank": 2, "alpha": 4},
        "algorithm": {"name": "grpo", "transition": "cps", "clip_range": 0.02},
        "rollout": {
            **{"num_inference_steps": 3, "stochastic_steps": 1},
            **{"prompts_per_update": 2, "videos_per_prompt": 2},
        },
        "optimizer": {"learning_rate": 1e-2},
        "rewards": [here],
        "guards": [{"statistic": "contrast"}],
        "prompts": str(folder / "prompts.txt"),
        "updates": 4,
        "save_every": 2,
        "output": str(folder / "run"),
        **changes,
    }


def remote(server: ScoreServer, **changes: Any) -> dict[str, Any]:
    return {"name": "red", "where": "http", "target": server.url, "retry_seconds": 0.0, **changes}


def finish(settings: RunSettings, stop: int | None = None) -> dict[str, Tensor]:
    """Weights after the run, or after `stop` updates of it."""
    run = prepare(settings)
    with closing(train(run)) as reports:
        for report in reports:
            if report.step == stop:
                break
    return lora_state(run.generator.transformer)


def metrics(settings: RunSettings) -> list[dict[str, Any]]:
    lines = read_metrics(Path(settings.output) / "metrics.jsonl")
    return [{k: v for k, v in line.items() if not k.endswith("seconds")} for line in lines]


def same(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def moved(settings: RunSettings, folder: Path, name: str) -> RunSettings:
    return dataclasses.replace(settings, output=str(folder / name))


def test_a_stale_run_over_http_goes_on_bit_for_bit_with_a_server_of_another_address(
    wan: Path, tmp_path: Path
) -> None:
    evaluation = {
        "rewards": [{"name": "judge", "target": f"{__name__}:redness"}],
        "prompts": str(tmp_path / "unseen.txt"),
        "every": 2,
    }
    more = {"staleness": 1, "prompt_sampling": {"name": "informative"}, "evaluation": evaluation}
    with score_server() as server:
        settings = build(tree(wan, tmp_path, rewards=[remote(server)], **more))
        whole = moved(settings, tmp_path, "whole")
        expected = finish(whole)
        finish(settings, stop=3)
    with score_server() as server:
        other = build(tree(wan, tmp_path, rewards=[remote(server, videos_per_call=2)], **more))
        with pytest.raises(ValueError, match=r"made with rewards\[0\].videos_per_call=None, now 2"):
            prepare(other)
        again = build(tree(wan, tmp_path, rewards=[remote(server, retries=1)], **more))
        assert same(finish(again), expected)
    assert metrics(again) == metrics(whole)
    assert [line["staleness"] for line in metrics(again)] == [0, 1, 1, 1]
    assert ["evaluation/judge" in line for line in metrics(again)] == [True, True, False, True]
    found = json.loads((tmp_path / "run" / PROMPTS_FILE).read_text())
    assert found == json.loads((tmp_path / "whole" / PROMPTS_FILE).read_text())
    assert [one["prompt"] for one in found] == ["a red circle", "the blue square", "a cup"]
    assert sum(one["groups"] for one in found) == 8
    assert load_config(tmp_path / "run" / CONFIG_FILE) == again


def test_a_server_that_dies_mid_run_stops_it_with_the_last_update_kept(
    wan: Path, tmp_path: Path
) -> None:
    settings: RunSettings
    with score_server() as server:
        answered = []

        def until_it_dies(body: dict[str, Any]) -> Any:
            answered.append(1)
            return by_redness(body) if len(answered) < 3 else (500, {"error": "no GPU"}, {})

        server.reply = until_it_dies
        settings = build(tree(wan, tmp_path, rewards=[remote(server, retries=1)]))
        with pytest.raises(RewardFailed, match="answered 500: .*no GPU.* from what is saved"):
            finish(settings)
        assert len(answered) == 4  # The third request was tried again.
        assert latest_checkpoint(tmp_path / "run" / CHECKPOINTS).name == "step-000002"
    # Now nobody listens there at all.
    with pytest.raises(RewardFailed, match="Connection"):
        finish(settings)
    assert latest_checkpoint(tmp_path / "run" / CHECKPOINTS).name == "step-000002"
    with score_server() as server:
        again = build(tree(wan, tmp_path, rewards=[remote(server)]))
        resumed = finish(again)
        shutil.rmtree(tmp_path / "run")
        assert same(resumed, finish(again))
    assert [line["step"] for line in metrics(again)] == [1, 2, 3, 4]


def test_videos_of_failed_calls_are_counted_and_their_limit_stops_the_run(
    wan: Path, tmp_path: Path
) -> None:
    calls = []

    def worse_and_worse(body: dict[str, Any]) -> Any:
        calls.append(1)
        lost = len(calls) in (4, 10, 11, 12)
        return (503, {}, {}) if lost else by_redness(body)

    with score_server(worse_and_worse) as server:
        reward = remote(server, on_error="missing", retries=0, videos_per_call=1)
        settings = build(tree(wan, tmp_path, rewards=[reward]))
        with pytest.raises(RuntimeError, match="'red' returned NaN for 3 of 4 .*answered 503"):
            finish(settings)
    lines = metrics(settings)
    assert [line["unanswered"] for line in lines] == [1, 0]
    assert [line["missing_share"] for line in lines] == [0.25, 0.0]
    assert latest_checkpoint(tmp_path / "run" / CHECKPOINTS).name == "step-000002"


def test_rewards_do_not_outlive_a_run_that_could_not_be_prepared(
    wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[str] = []

    def made(one: RewardSettings) -> Reward:
        if one.target == "no:where":
            raise ImportError("no module named no")
        return Reward(one.name, redness, end=lambda: ended.append(one.name))

    monkeypatch.setattr("diffusion_rl.rewards.build_reward", made)
    here, gone = (
        RewardSettings(name=name, target=f"{__name__}:redness") for name in ("red", "second")
    )
    gone = dataclasses.replace(gone, target="no:where")
    settings = build(tree(wan, tmp_path))
    held_out = EvaluationSettings(rewards=(here,), prompts=str(tmp_path / "unseen.txt"))
    for broken, closed in (
        (dataclasses.replace(settings, rewards=(here, gone)), ["red"]),
        (
            dataclasses.replace(
                settings, evaluation=dataclasses.replace(held_out, rewards=(here, gone))
            ),
            ["red", "red"],
        ),
    ):
        ended.clear()
        with pytest.raises(ImportError, match="no module named no"):
            prepare(broken)
        assert ended == closed
    ended.clear()
    list(train(prepare(dataclasses.replace(settings, evaluation=held_out, updates=2))))
    assert ended == ["red", "red"]
    (tmp_path / "prompts.txt").write_text("another\n")
    ended.clear()
    with pytest.raises(ValueError, match="prompts must be those that the run began with"):
        prepare(settings)
    assert ended == ["red"]


def test_one_that_cannot_be_closed_leaves_no_other_open(
    wan: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[str] = []

    def stuck() -> None:
        ended.append("stuck")
        raise OSError("it does not end")

    settings = build(tree(wan, tmp_path, updates=1))
    run = prepare(settings)
    (red,) = run.rewards
    run.rewards[:] = [
        dataclasses.replace(red, end=stuck),
        dataclasses.replace(red, name="other", end=lambda: ended.append("other")),
    ]
    tracker = SimpleNamespace(write=lambda report: None, close=lambda: ended.append("tracker"))
    monkeypatch.setattr("diffusion_rl.launch.build_trackers", lambda own: [tracker])
    with pytest.raises(OSError, match="it does not end"):
        list(train(run))
    assert sorted(ended) == ["other", "stuck", "tracker"]
    assert not (Path(settings.output) / LOCK_FILE).exists()
    assert latest_checkpoint(Path(settings.output) / CHECKPOINTS).name == "step-000001"


def test_staleness_without_a_reward_elsewhere_is_refused(wan: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="staleness must be 0 where every reward is asked here"):
        build(tree(wan, tmp_path, staleness=1))
