"""From a folder or hub id to a judge: shared weights, settings, and every way it can fail."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import load_file, save_file

from cac_reward.frames import JudgeSettings
from cac_reward.judges.local import LocalJudge
from cac_reward.questions import INSPECT_TOOL, Message, scan_message
from tests.tiny_judge import build_tiny_judge


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return build_tiny_judge(tmp_path / "judge")


def conversation(num_frames: int) -> tuple[Message, ...]:
    times = [index / 8 for index in range(num_frames)]
    return scan_message(torch.rand(num_frames, 3, 16, 24), times, "brief")


def test_the_same_files_are_loaded_once(folder: Path) -> None:
    judge = LocalJudge.from_pretrained(folder)
    assert LocalJudge.from_pretrained(str(folder)) is judge
    assert LocalJudge.from_pretrained(folder, dtype="bfloat16") is not judge
    build_tiny_judge(folder, seed=1)
    retrained = LocalJudge.from_pretrained(folder)
    clip = conversation(2)
    old = judge.choice_log_probs([clip], choices=("Yes", "No"))
    new = retrained.choice_log_probs([clip], choices=("Yes", "No"))
    assert not torch.equal(old, new)


def test_reports_name_judge_and_revision(folder: Path) -> None:
    judge = LocalJudge.from_pretrained(folder)
    assert judge.name == str(folder)
    model, processor = judge._reader.model, judge._reader.processor
    hub = LocalJudge(model, processor, judge_id="Qwen/Qwen3-VL-4B", revision="abc")
    assert hub.name == "Qwen/Qwen3-VL-4B@abc"


def test_settings_come_with_the_folder(folder: Path) -> None:
    plain = LocalJudge.from_pretrained(folder)
    assert plain.settings == JudgeSettings()
    assert plain.tools == [INSPECT_TOOL]
    assert plain.domain_note is None
    JudgeSettings(wording="brief", domain="toy_world").save(folder)
    trained = LocalJudge.from_pretrained(folder)
    assert trained.settings.wording == "brief"
    assert trained.tools == []
    assert "'toy_world' only; on other footage its verdict means nothing" in trained.domain_note


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_agrees_roughly(folder: Path, dtype: str) -> None:
    clips = [conversation(2), conversation(3)]
    exact = LocalJudge.from_pretrained(folder).choice_log_probs(clips, choices=("Yes", "No"))
    half = LocalJudge.from_pretrained(folder, dtype=dtype)
    assert half._reader.model.dtype == getattr(torch, dtype)
    found = half.choice_log_probs(clips, choices=("Yes", "No"))
    # bfloat16 carries 8 bits: log-probabilities near -6 are rounded to 0.03 in the logits.
    torch.testing.assert_close(found, exact, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", ["Qwen/Qwen3-VL-4B-Instruct", "no/such folder", "missing"])
def test_a_judge_that_cannot_be_fetched_names_the_way_out(name: str) -> None:
    with pytest.raises(FileNotFoundError) as caught:
        LocalJudge.from_pretrained(name)
    for part in (repr(name), str(constants.HF_HUB_CACHE), "hf download", "--judge FOLDER"):
        assert part in str(caught.value)


def test_a_folder_must_hold_a_judge(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="judge must be a folder with a config.json, got"):
        LocalJudge.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="revision must be None for a folder, got 'main'"):
        LocalJudge.from_pretrained(folder, revision="main")
    with pytest.raises(ValueError, match="dtype must be one of .*float32.*, got 'float8'"):
        LocalJudge.from_pretrained(folder, dtype="float8")


def test_other_families_are_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "qwen2_vl"}))
    with pytest.raises(ValueError, match="family in .*qwen3_vl.*, got 'qwen2_vl'"):
        LocalJudge.from_pretrained(folder)


def test_half_written_checkpoints_are_refused(folder: Path, tmp_path: Path) -> None:
    cut = shutil.copytree(folder, tmp_path / "cut")
    weights = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    missing = shutil.copytree(folder, tmp_path / "missing")
    (missing / "model.safetensors").unlink()
    for path in (cut, missing):
        with pytest.raises(ValueError, match=f"must be a complete checkpoint, got {path}"):
            LocalJudge.from_pretrained(path)


def test_missing_weights_are_not_made_up(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    name = "model.visual.pos_embed.weight"
    del weights[name]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"complete checkpoint, got .* without '{name}'"):
        LocalJudge.from_pretrained(folder)
