"""From a YAML to a run that can be stopped anywhere and gone on with."""

import dataclasses
import errno
import os
from contextlib import closing
from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffusion_rl.checkpoint import checkpoints, latest_checkpoint
from diffusion_rl.configuration import RunSettings, build, load_config
from diffusion_rl.finetune import StepReport
from diffusion_rl.launch import (
    CHECKPOINTS,
    CONFIG_FILE,
    LORA,
    build_generator,
    check_same_run,
    differences,
    prepare,
    set_aside,
    train,
)
from diffusion_rl.lora import lora_state
from diffusion_rl.tracking import read_metrics
from tests.tiny_wan import save_tiny_wan

CALLS = {"count": 0, "fail_at": 0}


def redness(videos: Tensor, prompts: list[str], *, fps: float) -> Tensor:
    """A reward that breaks at the call it is told to."""
    CALLS["count"] += 1
    if CALLS["count"] == CALLS["fail_at"]:
        raise OSError("the judge is gone")
    return videos[:, :, 0].mean((1, 2, 3))


@pytest.fixture(autouse=True)
def fresh_reward() -> None:
    CALLS.update(count=0, fail_at=0)


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_wan(tmp_path_factory.mktemp("wan") / "pipeline")


@pytest.fixture
def settings(wan: Path, tmp_path: Path) -> RunSettings:
    (tmp_path / "prompts.txt").write_text("a red circle\nthe blue square\n")
    return build(
        {
            "generator": {
                "path": str(wan),
                "height": 16,
                "width": 16,
                "num_frames": 5,
                "fps": 8.0,
                "max_sequence_length": 12,
            },
            "lora": {"rank": 2, "alpha": 4},
            "algorithm": {"name": "nft"},
            "rollout": {"num_inference_steps": 3, "prompts_per_update": 2, "videos_per_prompt": 2},
            "optimizer": {"learning_rate": 1e-2},
            "rewards": [{"name": "red", "target": f"{__name__}:redness"}],
            "guards": [{"statistic": "contrast"}],
            "prompts": str(tmp_path / "prompts.txt"),
            "updates": 4,
            "save_every": 2,
            "output": str(tmp_path / "run"),
        }
    )


def finish(settings: RunSettings) -> tuple[dict[str, Tensor], list[StepReport]]:
    run = prepare(settings)
    reports = list(train(run))
    return lora_state(run.generator.transformer), reports


def steps(settings: RunSettings) -> list[int]:
    return [line["step"] for line in read_metrics(Path(settings.output) / "metrics.jsonl")]


def test_a_finished_run_leaves_everything_a_reader_needs(settings: RunSettings) -> None:
    state, reports = finish(settings)
    output = Path(settings.output)
    assert [report.step for report in reports] == steps(settings) == [1, 2, 3, 4]
    assert load_config(output / CONFIG_FILE) == settings
    assert [path.name for path in checkpoints(output / CHECKPOINTS)] == [
        "step-000002",
        "step-000004",
    ]
    tuned = build_generator(settings.generator, lora=output / LORA)
    saved = lora_state(tuned.transformer)
    assert all(torch.equal(saved[name], state[name]) for name in state)


def test_a_run_closed_early_is_saved_where_it_stood_and_goes_on_bit_for_bit(
    settings: RunSettings, tmp_path: Path
) -> None:
    other = dataclasses.replace(settings, output=str(tmp_path / "whole"))
    expected, _ = finish(other)
    with closing(train(prepare(settings))) as reports:
        for report in reports:
            if report.step == 3:
                break
    assert latest_checkpoint(Path(settings.output) / CHECKPOINTS).name == "step-000003"
    resumed = prepare(settings)
    assert resumed.resumed
    assert [report.step for report in train(resumed)] == [4]
    assert steps(settings) == [1, 2, 3, 4]
    state = lora_state(resumed.generator.transformer)
    assert all(torch.equal(state[name], expected[name]) for name in expected)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_what_a_caller_raises_saves_too(settings: RunSettings, error: type) -> None:
    def interrupted() -> None:
        with closing(train(prepare(settings))) as reports:
            next(reports)
            raise error

    with pytest.raises(error):
        interrupted()
    assert latest_checkpoint(Path(settings.output) / CHECKPOINTS).name == "step-000001"


def test_a_reward_that_breaks_loses_no_update(settings: RunSettings) -> None:
    CALLS["fail_at"] = 4
    with pytest.raises(RuntimeError, match="reward 'red' raised OSError: the judge is gone"):
        finish(settings)
    assert latest_checkpoint(Path(settings.output) / CHECKPOINTS).name == "step-000003"
    CALLS["fail_at"] = 0
    _, reports = finish(settings)
    assert [report.step for report in reports] == [4]


def test_a_disk_that_fills_up_keeps_the_last_checkpoint(
    settings: RunSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    reports = train(prepare(settings))
    next(reports)
    next(reports)

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="step 4 .* the last complete one is .*step-000002"):
        list(reports)
    monkeypatch.undo()
    _, rest = finish(settings)
    assert [report.step for report in rest] == [3, 4]


def test_a_finished_run_may_be_made_longer(settings: RunSettings) -> None:
    finish(settings)
    assert finish(settings)[1] == []
    longer = dataclasses.replace(settings, updates=5)
    assert [report.step for report in finish(longer)[1]] == [5]


def test_other_settings_do_not_go_on_with_this_run(settings: RunSettings) -> None:
    finish(settings)
    other = dataclasses.replace(settings, seed=1)
    message = "same settings, got .* made with seed=0, now 1; choose another output, or --restart"
    with pytest.raises(ValueError, match=message):
        prepare(other)
    config = Path(settings.output) / CONFIG_FILE
    config.rename(config.with_suffix(".away"))
    with pytest.raises(
        ValueError, match="must hold a config.yaml beside its checkpoints, got none"
    ):
        prepare(settings)
    config.with_suffix(".away").rename(config)
    gentler = dataclasses.replace(settings.optimizer, learning_rate=1e-4)
    check_same_run(dataclasses.replace(settings, optimizer=gentler, updates=9, save_every=1))


def test_restarting_keeps_the_earlier_run(settings: RunSettings) -> None:
    finish(settings)
    output = Path(settings.output)
    for number in (1, 2):
        run = prepare(dataclasses.replace(settings, seed=number), restart=True)
        assert run.state.step == 0
        assert (output.with_name(f"run.previous-{number}") / CONFIG_FILE).is_file()
    assert (output.with_name("run.previous-1") / LORA).is_dir()
    assert set_aside(output).name == "run.previous-3"
    assert not output.exists()


def test_the_text_encoder_is_released_unless_it_is_needed(settings: RunSettings) -> None:
    run = prepare(settings)
    assert len(run.embeddings) == len(run.prompts) == 2
    with pytest.raises(RuntimeError, match="encode_prompts must be called before"):
        run.generator.encode_prompts(["again"])
    kept = prepare(settings, keep_text_encoder=True)
    assert len(kept.generator.encode_prompts(["again"])) == 1


def test_differences_name_their_place() -> None:
    before = {"a": {"b": 1, "c": [1, {"d": 2}]}, "e": [1]}
    now = {"a": {"b": 1, "c": [1, {"d": 3}]}, "e": [1, 2], "f": None, "g": 0}
    assert list(differences(before, now)) == [
        ("a.c[1].d", 2, 3),
        ("e", [1], [1, 2]),
        ("g", None, 0),
    ]
    assert list(differences(before, before)) == []
