"""A run that was killed goes on as if nothing had been: same losses, same weights, bit for bit."""

import json
import logging
import multiprocessing
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from cac_reward.__main__ import main
from cac_reward.training import stages
from cac_reward.training.checkpoints import last_checkpoint
from cac_reward.training.learning import LearningMixin
from cac_reward.training.settings import to_tree
from cac_reward.training.stages import run_stage
from tests.killing import die, die_before_the_mark, die_in_update, train_apart
from tests.tiny_judge import build_tiny_judge
from tests.tiny_stage import CALL, CLEAN, sharpen, tiny_stage

pytestmark = pytest.mark.usefixtures("single_thread")

KILLED = -signal.SIGKILL
LORA = {"lora": {"rank": 2, "alpha": 4, "dropout": 0.2}}
GRPO: dict[str, Any] = {
    "trainer": "grpo",
    "rewards": {"format": 1.0, "accuracy": 1.0},
    "rollout": {"group": 4, "max_call_tokens": 3, "max_answer_tokens": 3},
    "batch": 8,
}
KINDS: dict[str, dict[str, Any]] = {
    "words and heads": {
        "lessons": {"scan": 1.0, "inspect": 1.0, "alignment": 1.0},
        "loss": {"frames": 1.0, "clip": 1.0},
        "model": {"learns": "all"},
        "options": {"compressed": 0.5},
        "accumulation": 2,
    },
    "heads alone": {
        "lessons": {"scan": 1.0},
        "loss": {"words": 0.0, "frames": 1.0, "clip": 1.0},
        "model": {"learns": "heads"},
    },
    "adapter": {"model": LORA, "loss": {"frames": 0.5}},
    "frames": {"lessons": {"frame": 1.0, "caption": 1.0}, "options": {"turns": 2}},
    "reasoning and reflection": {
        "lessons": {"qa": 1.0, "grounding": 1.0, "description": 1.0},
        "options": {"thinking": 0.5, "reflection": 0.5},
        "batch": 4,
    },
    "muon": {"optimizer": {"name": "muon", "schedule": "cosine", "warmup": 2}},
    "rewards": {**GRPO, "grpo": {"kl_weight": 0.1}},
    "rewards of one turn": {
        **GRPO,
        "lessons": {"qa": 1.0},
        "rewards": {"question_answer": 1.0, "format": 1.0},
        "options": {"thinking": 0.0},
    },
    "rewards, adapter, two updates a rollout": {
        **GRPO,
        "model": LORA,
        "grpo": {"updates_per_rollout": 2},
    },
}


@pytest.fixture(scope="module")
def answering(clips: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A judge of few tokens an answer that was taught some, so that rewards move it."""
    folder = tmp_path_factory.mktemp("answering")
    answers = [f"<answer>{letter}</answer>" for letter in "ABC"]
    start = sharpen(build_tiny_judge(folder / "start", whole_tokens=[CLEAN, CALL, *answers]))
    settings: dict[str, Any] = {"lessons": {"scan": 1.0, "qa": 1.0}, "options": {"thinking": 0.0}}
    settings |= {"updates": 24, "batch": 8, "save_every": 24}
    settings["optimizer"] = {"learning_rate": 1e-2, "schedule": "constant"}
    return run_stage(tiny_stage(start, clips, folder / "taught", **settings)).judge


def judge_of(kind: str, request: pytest.FixtureRequest) -> Path:
    """Where a stage of a kind begins."""
    name = "answering" if "trainer" in KINDS[kind] else "judge"
    return Path(request.getfixturevalue(name))


def assert_moved(kind: str, output: Path) -> None:
    """Else a run that goes on would be compared with one that stood still."""
    behind = [line["grad_norm"] for line in losses(output) if line["step"] > 2 and "loss" in line]
    assert any(behind), kind


def losses(output: Path) -> list[dict[str, Any]]:
    """The log without what a clock says."""
    last = last_checkpoint(output)
    assert last is not None
    lines = json.loads((last / "trainer_state.json").read_text())["log_history"]
    clock = ("time", "runtime", "per_second")
    return [{k: v for k, v in line.items() if not k.endswith(clock)} for line in lines]


def assert_same(one: Path, other: Path) -> None:
    """Two finished runs agree in every number that they logged, learnt or keep for going on."""
    assert losses(one) == losses(other)
    assert len(losses(one)) >= 4
    files = [path.name for path in (one / "judge").glob("*.safetensors")]
    assert files
    for name in files:
        first, second = load_file(one / "judge" / name), load_file(other / "judge" / name)
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first), name
    for name in ("optimizer.pt", "scheduler.pt"):
        states = [torch.load(last_checkpoint(path) / name) for path in (one, other)]
        assert _flat(states[0]) == _flat(states[1]), name


def _flat(tree: Any) -> Any:
    if isinstance(tree, torch.Tensor):
        return tree.tolist()
    if isinstance(tree, dict):
        return {key: _flat(value) for key, value in tree.items()}
    return [_flat(one) for one in tree] if isinstance(tree, list | tuple) else tree


@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_run_goes_on_as_if_it_had_not_been(
    kind: str, clips: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    judge = judge_of(kind, request)
    data = [f"data.held_out=[{clips}]", "evaluation.every=2", "evaluation.clips=2"]
    evaluated = data if kind in ("words and heads", "rewards") else []
    whole, cut = (
        tiny_stage(judge, clips, tmp_path / name, evaluated, **KINDS[kind])
        for name in ("whole", "cut")
    )
    run_stage(whole)
    assert train_apart(cut, prepare=partial(die_in_update, 4)) == [KILLED]
    assert last_checkpoint(tmp_path / "cut") == tmp_path / "cut" / "checkpoint-2"
    run_stage(cut)
    assert_same(tmp_path / "whole", tmp_path / "cut")
    assert_moved(kind, tmp_path / "whole")


@pytest.mark.parametrize("kind", ["words and heads", "rewards"])
def test_two_processes_go_on_too(
    kind: str, clips: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """With measurements in between, of which each process takes its part."""
    judge = judge_of(kind, request)
    data = [f"data.held_out=[{clips}]", "evaluation.every=2", "evaluation.clips=3"]
    whole, cut = (
        tiny_stage(judge, clips, tmp_path / name, data, **KINDS[kind]) for name in ("whole", "cut")
    )
    assert train_apart(whole, processes=2) == [0, 0]
    assert KILLED in train_apart(cut, processes=2, prepare=partial(die_in_update, 4))
    assert last_checkpoint(tmp_path / "cut") == tmp_path / "cut" / "checkpoint-2"
    with pytest.raises(ValueError, match="processes must be 2, as .* began with, got 1"):
        run_stage(cut)
    assert train_apart(cut, processes=2) == [0, 0]
    assert_same(tmp_path / "whole", tmp_path / "cut")
    assert_moved(kind, tmp_path / "whole")


def test_a_curriculum_goes_on_in_the_stage_that_was_killed(
    judge: Path, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stage before is not trained again, the one behind begins with what comes of it."""
    configs = {}
    for name in ("whole", "cut"):
        tree = to_tree(tiny_stage(judge, clips, tmp_path / "unused"))
        del tree["output"]
        later = {**tree, "model": {**tree["model"], "path": "previous"}, "seed": 1}
        configs[name] = tmp_path / f"{name}.yaml"
        plain = {"output": str(tmp_path / name), "stages": [tree, later]}
        configs[name].write_text(OmegaConf.to_yaml(OmegaConf.create(plain)))
    assert main(["train", str(configs["whole"])]) == 0
    killed = multiprocessing.get_context("fork").Process(
        target=_train_and_die_in_stage_2, args=(configs["cut"],)
    )
    killed.start()
    killed.join(120)
    assert killed.exitcode == KILLED
    first, second = tmp_path / "cut" / "1_stage", tmp_path / "cut" / "2_stage"
    assert last_checkpoint(second) == second / "checkpoint-2"
    made = (first / "judge" / "model.safetensors").stat()
    trained: list[str] = []
    step = LearningMixin.training_step

    def note(self: Any, *arguments: Any, **more: Any) -> Any:
        trained.append(self.args.output_dir)
        return step(self, *arguments, **more)

    monkeypatch.setattr(LearningMixin, "training_step", note)
    assert main(["train", str(configs["cut"])]) == 0
    assert trained == [str(second)] * 2
    assert (first / "judge" / "model.safetensors").stat().st_mtime_ns == made.st_mtime_ns
    for stage in ("1_stage", "2_stage"):
        assert_same(tmp_path / "whole" / stage, tmp_path / "cut" / stage)


def _train_and_die_in_stage_2(config: Path) -> None:
    torch.set_num_threads(1)
    step = LearningMixin.training_step

    def step_or_die(self: Any, *arguments: Any, **more: Any) -> Any:
        if "2_stage" in self.args.output_dir and self.state.global_step == 3:
            die()
        return step(self, *arguments, **more)

    LearningMixin.training_step = step_or_die  # type: ignore[method-assign]
    main(["train", str(config)])


def test_what_was_cut_off_while_it_was_written_is_not_taken(
    judge: Path, clips: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole, cut = (tiny_stage(judge, clips, tmp_path / name) for name in ("whole", "cut"))
    run_stage(whole)
    assert train_apart(cut, prepare=partial(die_before_the_mark, 4)) == [KILLED]
    assert (tmp_path / "cut" / "checkpoint-4" / "model.safetensors").is_file()
    assert last_checkpoint(tmp_path / "cut") == tmp_path / "cut" / "checkpoint-2"
    with caplog.at_level(logging.WARNING, logger=stages.__name__):
        run_stage(cut)
    assert "checkpoint-4 was cut off while it was written; it is not taken" in caplog.text
    assert_same(tmp_path / "whole", tmp_path / "cut")


def _die_before_the_result() -> None:
    from cac_reward.training import stages

    stages._write_result = die


def test_a_run_that_was_killed_at_its_very_end_is_not_trained_again(
    judge: Path, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = (tiny_stage(judge, clips, tmp_path / name) for name in ("whole", "cut"))
    run_stage(whole)
    assert train_apart(cut, prepare=_die_before_the_result) == [KILLED]
    monkeypatch.setattr(LearningMixin, "training_step", die)
    assert run_stage(cut).updates == 4
    assert_same(tmp_path / "whole", tmp_path / "cut")


def test_a_finished_stage_is_read_and_other_settings_are_refused(
    judge: Path, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = tiny_stage(judge, clips, tmp_path, updates=2)
    first = run_stage(stage)
    monkeypatch.setattr("cac_reward.training.stages.load_pupil", die)
    assert run_stage(stage) == first
    with pytest.raises(ValueError, match="got .*, finished with updates 3 where it was 2"):
        run_stage(tiny_stage(judge, clips, tmp_path, updates=3))
    # How often it saves does not change what it learns.
    assert run_stage(tiny_stage(judge, clips, tmp_path, updates=2, save_every=1)) == first


def test_a_run_goes_on_by_the_settings_it_began_with(
    judge: Path, clips: Path, tmp_path: Path
) -> None:
    train_apart(tiny_stage(judge, clips, tmp_path), prepare=partial(die_in_update, 4))
    with pytest.raises(ValueError, match="seed 1 where it was 0; name another output"):
        run_stage(tiny_stage(judge, clips, tmp_path, seed=1))
