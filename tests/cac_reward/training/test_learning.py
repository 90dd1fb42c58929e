"""What stops a run, what is measured on the way, and which judge it ends with."""

import json
import random
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from cac_reward.__main__ import main
from cac_reward.judges.rendering import ControlTokenError, Renderer
from cac_reward.scorer import CaCScorer
from cac_reward.training.checkpoints import MARK, seconds_of
from cac_reward.training.clips import ClipStore, Skipped
from cac_reward.training.learning import SkippedClips, TrainingError
from cac_reward.training.measuring import HeldOut
from cac_reward.training.models import load_pupil
from cac_reward.training.settings import to_tree
from cac_reward.training.sft import JudgeSFTTrainer
from cac_reward.training.stages import run_stage
from cac_reward.training.stopping import StopRequest
from tests.killing import die_in_update, train_apart
from tests.tiny_stage import history, tiny_stage, weights
from tests.training_clips import write_clips


def break_clips(file: Path, *numbers: int) -> None:
    for number in numbers:
        (file.parent / f"videos/{number:04}.mkv").write_bytes(b"no video")


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_clips_are_skipped_counted_and_listed(
    workers: int, judge: Path, tmp_path: Path
) -> None:
    file = write_clips(tmp_path / "clips", 6)
    break_clips(file, 1, 4)
    stage = tiny_stage(judge, file, tmp_path / "out", [f"data.workers={workers}"], batch=6)
    result = run_stage(stage)
    lines = (tmp_path / "out" / "skipped_clips.jsonl").read_text().splitlines()
    listed = {json.loads(line)["clip"]: json.loads(line)["reason"] for line in lines}
    assert set(listed) == {"videos/0001.mkv", "videos/0004.mkv"}
    assert len(lines) == 2
    assert all(listed.values())
    assert result.skipped is not None
    assert result.skipped.startswith("2 clips could not be read")
    assert result.updates == 4


@pytest.mark.parametrize(
    "settings",
    [
        {"lessons": {"inspect": 1.0}, "options": {"verdict_only": 0.0}},
        {"lessons": {"caption": 1.0}},
        {"lessons": {"scan": 1.0}, "loss": {"captions": 1.0}},
    ],
    ids=["why", "caption", "frame's caption"],
)
@pytest.mark.parametrize("workers", [0, 1])
def test_clips_with_control_tokens_are_as_unreadable_ones(
    settings: dict[str, Any], workers: int, judge: Path, tmp_path: Path
) -> None:
    file = write_clips(tmp_path / "clips", 6)
    lines = file.read_text().splitlines()
    lines[3] = lines[3].replace('"why": "', '"why": "<|im_end|>')
    lines[3] = lines[3].replace('"text": "', '"text": "<|im_end|>')
    assert lines[3].count("<|im_end|>") >= 3
    file.write_text("\n".join(lines) + "\n")
    stage = tiny_stage(
        judge, file, tmp_path / "out", [f"data.workers={workers}"], batch=6, updates=2, **settings
    )
    result = run_stage(stage)
    (line,) = (tmp_path / "out" / "skipped_clips.jsonl").read_text().splitlines()
    listed = json.loads(line)
    assert listed["clip"] == "videos/0003.mkv"
    assert "must not hold the model's control tokens, got '<|im_end|>'" in listed["reason"]
    assert result.skipped is not None
    assert result.skipped.startswith("1 clips could not be read")
    assert result.updates == 2


def test_questions_with_control_tokens_are_as_unreadable_clips(
    judge: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of those that remain when a question was cleaned, as some models' `</s>`."""
    file = write_clips(tmp_path / "clips", 6)
    lines = file.read_text().splitlines()
    lines[3] = lines[3].replace('"question": "', '"question": "[END]')
    file.write_text("\n".join(lines) + "\n")
    plain = Renderer.check_text

    def check(self: Any, text: str) -> None:
        if "[END]" in text:
            raise ControlTokenError("messages must not hold the model's control tokens, got [END]")
        plain(self, text)

    monkeypatch.setattr(Renderer, "check_text", check)
    settings: dict[str, Any] = {"trainer": "grpo", "lessons": {"qa": 1.0}}
    settings |= {"rewards": {"question_answer": 1.0}, "batch": 12, "updates": 1}
    settings["rollout"] = {"group": 2, "max_answer_tokens": 1}
    result = run_stage(tiny_stage(judge, file, tmp_path / "out", **settings))
    assert result.skipped is not None
    assert result.skipped.startswith("1 clips could not be read")
    assert "videos/0003.mkv: messages must not hold the model's control" in result.skipped


@pytest.mark.parametrize("trainer", ["sft", "grpo"])
def test_too_many_unreadable_clips_stop_a_run_and_say_what_to_do(
    trainer: str, judge: Path, tmp_path: Path
) -> None:
    file = write_clips(tmp_path / "clips", 6)
    break_clips(file, 0, 1, 2)
    settings: dict[str, Any] = {"updates": 40, "batch": 4, "save_every": 40}
    if trainer == "grpo":
        settings |= {"trainer": "grpo", "rewards": {"format": 1.0}}
        settings["rollout"] = {"group": 2, "max_call_tokens": 1, "max_answer_tokens": 1}
    stage = tiny_stage(judge, file, tmp_path / "out", **settings)
    message = r"data.max_skipped_share must not be passed, it is 0.02, got \d+ unreadable of \d+ .*"
    with pytest.raises(TrainingError, match=message + "skipped_clips.jsonl. Mend or remove them"):
        run_stage(stage)


def test_a_limit_of_0_stops_at_the_first_unreadable_clip(judge: Path, tmp_path: Path) -> None:
    file = write_clips(tmp_path / "clips", 6)
    break_clips(file, 1)
    stage = tiny_stage(judge, file, tmp_path / "out", ["data.max_skipped_share=0"], batch=6)
    with pytest.raises(TrainingError, match=r"it is 0, got 1 unreadable of \d clips, last .*0001"):
        run_stage(stage)


def test_seconds_are_those_of_all_parts_of_a_run(
    judge: Path, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = tiny_stage(judge, clips, tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(StopRequest, "agreed", lambda self: True)
        with pytest.raises(KeyboardInterrupt):
            run_stage(stage)
    (saved,) = tmp_path.glob("checkpoint-*")
    mark = json.loads((saved / MARK).read_text())
    assert 0 < mark["seconds"] < 500
    assert seconds_of(saved) == mark["seconds"]
    (saved / MARK).write_text(json.dumps({**mark, "seconds": 5000.0}))
    assert 5000 < run_stage(stage).seconds < 5500
    (tmp_path / MARK).write_text(json.dumps({"updates": 1, "processes": 1}))
    assert seconds_of(tmp_path) == 0  # Of an earlier version.


def test_clips_are_counted_on_behind_a_checkpoint(
    judge: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write_clips(tmp_path / "clips", 6)
    break_clips(file, 1)
    counts = []
    plain = SkippedClips.count

    def count(self: SkippedClips, read: int, skipped: Any) -> None:
        plain(self, read, skipped)
        counts.append((self.read, self.skipped))

    monkeypatch.setattr(SkippedClips, "count", count)
    whole, cut = (tiny_stage(judge, file, tmp_path / name, batch=6) for name in ("whole", "cut"))
    run_stage(whole)
    expected = list(counts)
    counts.clear()
    assert [read for read, _ in expected] == [6, 12, 18, 24]
    assert expected[-1][1] > expected[1][1] > 0
    assert train_apart(cut, prepare=partial(die_in_update, 4)) == [-signal.SIGKILL]
    counts.clear()
    run_stage(cut)
    assert counts == expected[2:]
    # A checkpoint from before they were kept is gone on with, too.
    fresh = SkippedClips(tmp_path / "skipped.jsonl", 0.5)
    fresh.restore(tmp_path, 0)
    assert (fresh.read, fresh.skipped) == (0, 0)


def test_a_line_that_was_cut_off_is_no_end(tmp_path: Path) -> None:
    """In the middle of a letter, too; what is written behind it is whole."""
    file = tmp_path / "skipped.jsonl"
    whole = json.dumps({"clip": "a", "reason": "no video"})
    torn = json.dumps({"clip": "b", "reason": "\u00e9"}, ensure_ascii=False).encode()
    file.write_bytes(whole.encode() + b"\n" + torn[:-3])
    skipped = SkippedClips(file, 1.0)
    assert list(skipped.names) == ["a"]
    skipped.count(1, [Skipped("b", "gone")])
    assert SkippedClips(file, 1.0).names == {"a": "no video", "b": "gone"}


def test_no_readable_clip_at_all_is_said_at_once(judge: Path, tmp_path: Path) -> None:
    file = write_clips(tmp_path / "clips", 2)
    break_clips(file, 0, 1)
    with pytest.raises(TrainingError, match="must have at least one clip that can be read, got no"):
        run_stage(tiny_stage(judge, file, tmp_path / "out"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_before_it_reaches_the_weights(
    value: float, judge: Path, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = JudgeSFTTrainer.compute_loss

    def spoilt(self: Any, *arguments: Any, **more: Any) -> Any:
        loss = plain(self, *arguments, **more)
        return loss * value if self.state.global_step == 2 else loss

    monkeypatch.setattr(JudgeSFTTrainer, "compute_loss", spoilt)
    with pytest.raises(TrainingError, match="loss must be finite, got .* in update 3; no weight"):
        run_stage(tiny_stage(judge, clips, tmp_path))
    assert (tmp_path / "checkpoint-2" / "whole.json").is_file()
    assert not (tmp_path / "checkpoint-4").exists()


def test_a_gradient_that_is_no_number_stops_it_too(
    judge: Path, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = JudgeSFTTrainer.compute_loss

    def spoilt(self: Any, model: Any, *arguments: Any, **more: Any) -> Any:
        loss = plain(self, model, *arguments, **more)
        weight = next(one for one in model.parameters() if one.requires_grad)
        # Zero, with a slope that is infinite.
        return loss + (weight.flatten()[0] * 0).sqrt()

    monkeypatch.setattr(JudgeSFTTrainer, "compute_loss", spoilt)
    with pytest.raises(TrainingError, match="gradient norm must be finite, got .* in update 1"):
        run_stage(tiny_stage(judge, clips, tmp_path))


class Staged:
    """Measures in the place of `HeldOut.measure`: what it was told, and what it was given."""

    def __init__(self, *values: dict[str, float]) -> None:
        self.values = list(values)

    def measure(self, held_out: HeldOut, model: Any, pupil: Any, **_: Any) -> dict[str, float]:
        return self.values.pop(0)


def test_the_best_measured_judge_is_what_it_ends_with(
    judge: Path, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured where no checkpoint was due; nothing to measure is never the best."""
    name = "clip.balanced_accuracy"
    staged = Staged({}, {name: 0.7}, {name: 0.9, "clip.f1": 0.5}, {name: 0.6}, {name: 0.8})
    monkeypatch.setattr(HeldOut, "measure", lambda *a, **b: staged.measure(*a, **b))
    settings = [f"data.held_out=[{clips}]", "evaluation.every=1", "keep=1", "save_every=5"]
    result = run_stage(tiny_stage(judge, clips, tmp_path, settings, updates=5))
    assert result.measured == {name: 0.9, "clip.f1": 0.5}
    assert sorted(one.name for one in tmp_path.glob("checkpoint-*")) == [
        "checkpoint-3",
        "checkpoint-5",
    ]
    best, last, kept = (
        weights(tmp_path / one) for one in ("checkpoint-3", "checkpoint-5", "judge")
    )
    assert all(torch.equal(best[name], kept[name]) for name in best)
    assert any(not torch.equal(last[name], kept[name]) for name in last)
    card = (result.judge / "README.md").read_text()
    assert "| clip.balanced_accuracy | 0.9000 |" in card


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("evaluation.every=0", {"clip.f1": 0.3}),
        ("evaluation.best=clip.f1", {"clip.balanced_accuracy": 0.1, "clip.f1": 0.2}),
        ("evaluation.clips=3", {"clip.balanced_accuracy": 0.9, "clip.f1": 0.5}),
    ],
)
def test_a_run_goes_on_with_another_evaluation(
    change: str,
    expected: dict[str, float],
    judge: Path,
    clips: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What was best by a measure that chooses no longer is not the best by another."""
    name = "clip.balanced_accuracy"
    staged = Staged({name: 0.9, "clip.f1": 0.5}, {name: 0.8, "clip.f1": 0.4})
    monkeypatch.setattr(HeldOut, "measure", lambda *a, **b: staged.measure(*a, **b))
    settings = [f"data.held_out=[{clips}]", "evaluation.every=1", "keep=1"]
    with monkeypatch.context() as patched:
        patched.setattr(StopRequest, "agreed", lambda self: len(staged.values) < 2)
        with pytest.raises(KeyboardInterrupt):
            run_stage(tiny_stage(judge, clips, tmp_path, settings))
    first = tmp_path / "checkpoint-1"
    assert [first.is_dir(), (tmp_path / "checkpoint-2").is_dir()] == [True, True]
    staged.values = [{name: 0.1, "clip.f1": 0.2}, {name: 0.2, "clip.f1": 0.1}]
    if change == "evaluation.every=0":
        staged.values = [expected]
    result = run_stage(tiny_stage(judge, clips, tmp_path, [*settings, change]))
    assert result.measured == expected
    assert not staged.values
    assert first.is_dir() == (change == "evaluation.clips=3")


def test_measuring_leaves_the_training_as_it_was(judge: Path, clips: Path, tmp_path: Path) -> None:
    """Mode, random generators and checkpointing of activations, and with them all later losses."""
    common = {"model": {"gradient_checkpointing": True, "lora": {"rank": 2, "dropout": 0.3}}}
    plain = tiny_stage(judge, clips, tmp_path / "plain", **common)
    held_out = [f"data.held_out=[{clips}]", "evaluation.every=1", "evaluation.clips=2"]
    measured = tiny_stage(judge, clips, tmp_path / "measured", held_out, **common)
    run_stage(plain)
    result = run_stage(measured)
    losses = [[line["loss"] for line in history(tmp_path / name)] for name in ("plain", "measured")]
    assert losses[0] == losses[1]
    found = history(tmp_path / "measured", key="eval_unjudged")
    assert [line["step"] for line in found] == [1, 2, 3, 4]
    assert result.measured["unjudged"] == found[-1]["eval_unjudged"]


def test_random_generators_stay_where_they_were(judge: Path, clips: Path, tmp_path: Path) -> None:
    pupil = load_pupil(tiny_stage(judge, clips, tmp_path), "cpu")
    pupil.model.train()
    held_out = HeldOut(ClipStore([clips], split=None), 2, 2)
    before = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())
    held_out.measure(pupil.model, pupil)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]
    assert pupil.model.training


@pytest.mark.parametrize("lora", [None, {"rank": 2}])
def test_the_finished_judge_loads_and_scores(
    lora: Any, judge: Path, clips: Path, tmp_path: Path
) -> None:
    result = run_stage(tiny_stage(judge, clips, tmp_path, model={"lora": lora}, updates=1))
    scorer = CaCScorer.from_pretrained(result.judge, mode="fast")
    assert scorer.judge.settings.scan.pixels == 256
    videos = torch.rand(2, 13, 3, 32, 32)
    scores = scorer(videos, ["", ""], fps=8.0)["score"]
    assert scores.shape == (2,)
    assert all((0 < one < 1) or one.isnan() for one in scores)


def test_a_measure_that_cannot_choose_is_refused(judge: Path, clips: Path, tmp_path: Path) -> None:
    stage = tiny_stage(judge, clips, tmp_path, ["evaluation.best=clip.calibration_error"])
    with pytest.raises(ValueError, match="evaluation.best must be one of clip.accuracy, .*, got"):
        run_stage(stage)


def test_ctrl_c_saves_and_the_same_command_goes_on(
    judge: Path, clips: Path, tmp_path: Path
) -> None:
    """The command itself: exit status 130 after one Ctrl-C, with a checkpoint that is not due."""
    stage = tiny_stage(judge, clips, tmp_path / "out", updates=400, save_every=400)
    config = tmp_path / "stage.yaml"
    config.write_text(OmegaConf.to_yaml(OmegaConf.create(to_tree(stage))))
    command = [sys.executable, "-u", "-m", "cac_reward", "train", str(config)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if "'loss'" in line:
            break
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == 130, errors
    assert f"stopped; the same command goes on from {stage.output}" in errors
    (saved,) = (tmp_path / "out").glob("checkpoint-*")
    assert (saved / "whole.json").is_file()


def test_a_request_to_stop_ends_in_a_checkpoint_and_the_rest_is_the_same(
    judge: Path, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = (
        tiny_stage(judge, clips, tmp_path / name, save_every=4) for name in ("whole", "cut")
    )
    run_stage(whole)
    step = JudgeSFTTrainer.training_step
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def interrupted(self: Any, *arguments: Any, **more: Any) -> Any:
        if self.state.global_step == 2:
            signal.raise_signal(signal.SIGINT)
        return step(self, *arguments, **more)

    with monkeypatch.context() as patched:
        patched.setattr(JudgeSFTTrainer, "training_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_stage(cut)
    assert [one.name for one in (tmp_path / "cut").glob("checkpoint-*")] == ["checkpoint-3"]
    assert not (tmp_path / "cut" / "judge").exists()
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler
    run_stage(cut)
    one, other = (weights(tmp_path / name / "judge") for name in ("whole", "cut"))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_request_in_the_last_update_stops_before_the_next_stage(
    number: int, judge: Path, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command says that it goes on, ends with 130, and does go on."""
    tree = to_tree(tiny_stage(judge, clips, tmp_path / "unused", updates=2))
    del tree["output"]
    later = {**tree, "model": {**tree["model"], "path": "previous"}}
    config = tmp_path / "stages.yaml"
    stages = {"output": str(tmp_path / "out"), "stages": [tree, later]}
    config.write_text(OmegaConf.to_yaml(OmegaConf.create(stages)))
    step = JudgeSFTTrainer.training_step

    def interrupted(self: Any, *arguments: Any, **more: Any) -> Any:
        if self.state.global_step == 1:
            signal.raise_signal(number)
        return step(self, *arguments, **more)

    with monkeypatch.context() as patched:
        patched.setattr(JudgeSFTTrainer, "training_step", interrupted)
        assert main(["train", str(config)]) == 130
    first, second = tmp_path / "out" / "1_stage", tmp_path / "out" / "2_stage"
    assert (first / "checkpoint-2" / "whole.json").is_file()
    assert not (first / "judge").exists()
    assert not second.exists()
    assert main(["train", str(config)]) == 0
    assert (second / "judge").is_dir()


def test_a_request_to_one_of_two_processes_in_the_last_update_stops_both(
    judge: Path, clips: Path, tmp_path: Path
) -> None:
    stage = tiny_stage(judge, clips, tmp_path)
    assert train_apart(stage, processes=2, prepare=_ask_in_the_last_update) == [1, 1]
    assert (tmp_path / "checkpoint-4" / "whole.json").is_file()
    assert not (tmp_path / "judge").exists()


def _ask_in_the_last_update() -> None:
    step = JudgeSFTTrainer.training_step

    def asked(self: Any, *arguments: Any, **more: Any) -> Any:
        if self.state.global_step == 3:
            signal.raise_signal(signal.SIGINT)
        return step(self, *arguments, **more)

    JudgeSFTTrainer.training_step = asked  # type: ignore[method-assign]


def test_a_second_request_stops_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with StopRequest() as stop:
        assert not stop.agreed()
        signal.raise_signal(signal.SIGTERM)
        # A launcher passes it on: no second request.
        signal.raise_signal(signal.SIGINT)
        assert stop.agreed()
        now = time.monotonic()
        monkeypatch.setattr("time.monotonic", lambda: now + 10)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
