"""Stages whose weights are split over two processes: the same losses and judges as in one piece."""

import importlib.util
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from cac_reward.training import stages
from cac_reward.training.checkpoints import last_checkpoint
from cac_reward.training.grpo import JudgeGRPOTrainer
from cac_reward.training.processes import check_launcher
from tests.killing import die_in_update, train_apart
from tests.tiny_stage import history, tiny_stage

pytestmark = pytest.mark.usefixtures("single_thread")

FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}
ZERO_2 = {
    "DS_ACCELERATOR": "cpu",
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2",
}
ZERO_3 = {
    **ZERO_2,
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
    "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
}
# Not imported here: it would find out about this machine before a test says what to take.
needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"
)
LAUNCHERS = [
    pytest.param(FSDP, id="fsdp2"),
    pytest.param(ZERO_2, id="zero2", marks=needs_deepspeed),
    pytest.param(ZERO_3, id="zero3", marks=needs_deepspeed),
]
KINDS: dict[str, dict[str, Any]] = {
    "words and heads": {
        "lessons": {"scan": 1.0, "inspect": 1.0, "alignment": 1.0},
        "loss": {"frames": 1.0, "clip": 1.0},
        "model": {"learns": "all"},
        "accumulation": 2,
    },
    "heads alone": {
        "lessons": {"scan": 1.0},
        "loss": {"words": 0.0, "frames": 1.0, "clip": 1.0},
        "model": {"learns": "heads"},
    },
    "adapter": {"model": {"lora": {"rank": 2, "alpha": 4}}, "loss": {"frames": 0.5}},
    "rewards": {
        "trainer": "grpo",
        "rewards": {"format": 1.0, "accuracy": 1.0},
        "rollout": {"group": 2, "max_call_tokens": 3, "max_answer_tokens": 3},
    },
}


def steps(output: Path) -> Tensor:
    """[updates 2] loss and norm of the gradient."""
    return torch.tensor([[line["loss"], line["grad_norm"]] for line in history(output)])


def assert_alike(one: Path, other: Path) -> None:
    """Two finished runs took the same steps, to the digits that are logged, to the same judge."""
    assert len(steps(one)) == 4
    torch.testing.assert_close(steps(one), steps(other), rtol=1e-3, atol=1e-6)
    names = {path.name for path in (one / "judge").iterdir()}
    assert names == {path.name for path in (other / "judge").iterdir()}
    for name in names:
        if name.endswith(".safetensors"):
            torch.testing.assert_close(
                load_file(one / "judge" / name),
                load_file(other / "judge" / name),
                rtol=0,
                atol=1e-4,
            )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_split_judge_learns_what_a_whole_one_does(
    launcher: dict[str, str], kind: str, judge: Path, clips: Path, tmp_path: Path
) -> None:
    """With measurements in between, and killed and gone on with."""
    data = [f"data.held_out=[{clips}]", "evaluation.every=2", "evaluation.clips=3"]
    whole, split, cut = (
        tiny_stage(judge, clips, tmp_path / name, data, **KINDS[kind])
        for name in ("whole", "split", "cut")
    )
    assert train_apart(whole, processes=2) == [0, 0]
    assert train_apart(split, processes=2, launcher=launcher) == [0, 0]
    assert_alike(tmp_path / "whole", tmp_path / "split")
    killed = train_apart(cut, processes=2, launcher=launcher, prepare=partial(die_in_update, 4))
    assert -signal.SIGKILL in killed
    assert last_checkpoint(tmp_path / "cut") == tmp_path / "cut" / "checkpoint-2"
    assert train_apart(cut, processes=2, launcher=launcher) == [0, 0]
    assert_alike(tmp_path / "whole", tmp_path / "cut")


def test_weights_are_in_parts(
    judge: Path, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the tests above would compare a run with itself."""
    write = stages._write_judge

    def note(result: Any, stage: Any, pupil: Any, *more: Any) -> None:
        layers = sum(isinstance(one, FSDPModule) for one in pupil.model.modules())
        (tmp_path / "layers").write_text(str(layers))
        write(result, stage, pupil, *more)

    monkeypatch.setattr(stages, "_write_judge", note)
    stage = tiny_stage(judge, clips, tmp_path / "run", updates=2)
    assert train_apart(stage, processes=2, launcher=FSDP) == [0, 0]
    assert int((tmp_path / "layers").read_text()) > 1


def test_processes_may_have_unlike_numbers_of_answers_that_move(
    judge: Path, clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score = JudgeGRPOTrainer._generate_and_score_completions

    def some(self: Any, inputs: Any) -> dict[str, Any]:
        scored = score(self, inputs)
        moving = 1 if self.accelerator.process_index else 3
        scored["advantages"] = (torch.arange(len(scored["advantages"])) < moving).float()
        scored["tool_mask"].fill_(1)
        return scored

    monkeypatch.setattr(JudgeGRPOTrainer, "_generate_and_score_completions", some)
    stage = tiny_stage(judge, clips, tmp_path / "run", batch=4, **KINDS["rewards"])
    assert train_apart(stage, processes=2) == [0, 0]
    assert (steps(tmp_path / "run")[:, 1] > 0).all()


def test_an_optimizer_that_needs_matrices_is_refused_with_deepspeed() -> None:
    check_launcher("muon", FSDP)
    check_launcher("adamw", ZERO_2)
    with pytest.raises(ValueError, match=r"another than 'muon' with DeepSpeed, .*fsdp2_8gpu"):
        check_launcher("muon", ZERO_2)
