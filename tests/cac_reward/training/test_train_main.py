"""`cac-reward train`: what is wrong is said in one line, before any training."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from cac_reward.__main__ import main
from cac_reward.training import beforehand, command, grpo
from cac_reward.training.checkpoints import MARK, mark_whole
from cac_reward.training.settings import build_stage, to_tree
from tests.tiny_judge import build_tiny_judge
from tests.training_clips import write_clips


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a judge and clips."""
    folder = tmp_path_factory.mktemp("parts")
    build_tiny_judge(folder / "base")
    write_clips(folder / "clips", 4)
    (folder / "empty.jsonl").write_text("")
    return folder


def tree(parts: Path, output: Path, **more: Any) -> dict[str, Any]:
    return {
        "model": {"path": str(parts / "base"), "dtype": "float32"},
        "data": {"train": [str(parts / "clips" / "clips.jsonl")], "workers": 0},
        "lessons": {"scan": 1.0},
        "updates": 1,
        "output": str(output),
        **more,
    }


def train(tmp_path: Path, plain: dict[str, Any], *overrides: str) -> int:
    path = tmp_path / "stage.yaml"
    path.write_text(OmegaConf.to_yaml(OmegaConf.create(plain)))
    return main(["train", str(path), *overrides])


def refused(capsys: pytest.CaptureFixture[str]) -> str:
    """What is wrong, as the command says it."""
    said = capsys.readouterr().err
    assert "Traceback" not in said
    start, _, message = said.rpartition("error: ")
    assert not start or start.endswith("\n")
    assert message
    return message


def test_a_config_that_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "stage.yaml").write_text("")
    assert main(["train", str(tmp_path / "stagee.yaml")]) == 2
    line = refused(capsys)
    assert "stagee.yaml; did you mean 'stage.yaml'?" in line
    assert main(["train", str(tmp_path / "stage.yaml")]) == 2
    assert "model must be given, got nothing" in refused(capsys)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["updatse=3"],
            "updatse must be a known key, got none of that name; did you mean 'updates'",
        ),
        (["updates=few"], "updates: Value 'few' of type 'str' could not be converted to Integer"),
        (["lessons.sacn=1"], "got 'sacn'; did you mean 'scan'?"),
        (["lessons.scan=0"], "lessons must have at least one with a share above 0"),
        (["options.turnz=2"], "got 'turnz'; did you mean 'turns'?"),
        (
            ["trainer=grpo", "lessons={scan: 0, inspect: 1}", "rewards={acuracy: 1}"],
            "got 'acuracy'; did you mean 'accuracy'?",
        ),
        (["data.train=[none.jsonl]"], "annotations must be an existing file or folder, got none"),
        (["data.split=test"], "lessons.scan must fit at least one clip, got none among 0"),
        (["model.path=nowhere"], "judge 'nowhere' is no folder here"),
        (["data.train=[]"], "data.train must name at least one file, got none"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(
    parts: Path,
    tmp_path: Path,
    overrides: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert train(tmp_path, tree(parts, tmp_path / "out"), *overrides) == 2
    assert message in refused(capsys)
    assert not (tmp_path / "out" / "judge").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("2.data.train=[none.jsonl]", "data.train: annotations must be an existing file or folder"),
        ("2.data.held_out=[a.txt]", "data.held_out: annotations must be an existing file or"),
        ("2.data.train=[{file}]", "data.train: annotations must end in one of"),
        ("2.data.videos=nowhere", "data.videos must be an existing folder, got nowhere; leave"),
        ("2.model.path=/no/judge", "model.path must be an existing folder or a hub id, got /no"),
        ("2.model.base=runs/no/judge", "model.base must be an existing folder or a hub id, got"),
        ("2.evaluation.best=nonsense", "evaluation.best must be one of clip.accuracy, "),
        (
            "2.model.dtype=bf16",
            "model.dtype must be one of ['float32', 'bfloat16', 'float16'], got",
        ),
        ("2.model.attention=fast", "model.attention must be one of"),
        ("2.trackers=[tensorbord]", "trackers must be one of azure_ml, "),
        ("2.trackers=[dvclive]", "trackers must be installed, got 'dvclive', which is not; inst"),
        ("2.optimizer.name=adamw_8bit", "optimizer.name 'adamw_8bit' needs bitsandbytes; inst"),
        ("2.per_update=3", "per_update must be a multiple of batch * processes, got 3 with 2 * 1"),
        ("2.model.learns=heads", "loss.frames or loss.clip must be above 0 where model.learns is"),
        ("3.batch=3", "batch * accumulation * processes must be a multiple of rollout.group 2"),
        ("3.rollout.vllm=true", "rollout.vllm needs vllm; install it with"),
    ],
)
def test_what_is_wrong_with_a_later_stage_is_said_before_the_first(
    parts: Path,
    tmp_path: Path,
    override: str,
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Judges that an earlier stage will make are no part of it."""
    monkeypatch.setattr(command, "run_stage", lambda stage: pytest.fail("it was trained"))
    monkeypatch.setattr(beforehand, "get_available_reporting_integrations", list)
    find = importlib.util.find_spec
    missing = ("bitsandbytes", "vllm", "dvclive")
    monkeypatch.setattr(beforehand, "find_spec", lambda name: name not in missing or None)
    monkeypatch.setattr(grpo, "find_spec", lambda name: None if name in missing else find(name))
    (tmp_path / "a.md").write_text("")
    stage = tree(parts, tmp_path / "out", batch=2)
    del stage["output"]
    later = {**stage, "model": {"path": "previous"}}
    rewarded = {"trainer": "grpo", "lessons": {"inspect": 1.0}, "rewards": {"format": 1.0}}
    last = {**later, **rewarded, "rollout": {"group": 2}}
    stages = {"output": str(tmp_path / "out"), "stages": [stage, later, last]}
    written = override.format(file=tmp_path / "a.md")
    assert train(tmp_path, stages, written) == 2
    assert refused(capsys).startswith(f"stage {override[0]}: {message}")
    assert not (tmp_path / "out").exists()


def test_finished_stages_are_not_looked_at_again(parts: Path, tmp_path: Path) -> None:
    stage = build_stage(tree(parts, tmp_path / "out"), "x", ["data.train=[gone.jsonl]"])
    with pytest.raises(FileNotFoundError, match=r"stage 1: data.train: annotations must be an exi"):
        beforehand.check_stages([stage], 1)
    finished(to_tree(stage), tmp_path / "out")
    beforehand.check_stages([stage], 1)


def test_data_without_clips(
    parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = str(parts / "empty.jsonl")
    assert train(tmp_path, tree(parts, tmp_path / "out"), f"data.train=[{empty}]") == 2
    line = refused(capsys)
    assert "lessons.scan must fit at least one clip, got none among 0 in" in line
    assert "empty.jsonl" in line


def test_a_broken_line_is_named(
    parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clips = tmp_path / "broken.jsonl"
    clips.write_text((parts / "clips" / "clips.jsonl").read_text() + "{\n")
    assert train(tmp_path, tree(parts, tmp_path / "out"), f"data.train=[{clips}]") == 2
    assert "broken.jsonl: line 5: clip must be JSON" in refused(capsys)


def finished(plain: dict[str, Any], output: Path) -> None:
    """An output as a stage that is done leaves it."""
    output.mkdir()
    settings = to_tree(build_stage(plain, "x"))
    (output / "stage.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(settings)))
    record = {"updates": 1, "measured": {"clip.f1": 0.5}, "seconds": 3.0, "skipped": None}
    (output / "result.json").write_text(json.dumps(record))


def test_a_finished_stage_is_only_read(
    parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = tree(parts, tmp_path / "out")
    finished(plain, tmp_path / "out")
    # What does not change what is learnt may be another.
    assert train(tmp_path, plain, "save_every=7", "data.workers=1", "evaluation.clips=3") == 0
    said = capsys.readouterr().out
    assert "stage 1 of 1: sft on" in said
    assert "clip.f1" in said
    assert "1 updates in 3 s" in said


def test_an_output_of_other_settings_is_refused(
    parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = tree(parts, tmp_path / "out")
    finished(plain, tmp_path / "out")
    changes = ["seed=5", "lessons={scan: 0.5, frame: 2}", "data.split=train"]
    assert train(tmp_path, plain, *changes) == 2
    line = refused(capsys)
    assert "output must be a new folder for other settings" in line
    for change in (
        "seed 5 where it was 0",
        "lessons.scan 0.5 where it was 1.0",
        "lessons.frame 2.0 where it was None",
        "data.split 'train' where it was None",
    ):
        assert change in line
    assert "workers" not in line


def begun(plain: dict[str, Any], output: Path, processes: int = 1) -> None:
    """An output as a stage that was stopped leaves it."""
    (output / "checkpoint-1").mkdir(parents=True)
    settings = to_tree(build_stage(plain, "x"))
    (output / "stage.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(settings)))
    mark_whole(output / "checkpoint-1", updates=1, processes=processes)


def test_a_run_goes_on_with_its_own_settings_only(
    parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = tree(parts, tmp_path / "out")
    begun(plain, tmp_path / "out")
    assert train(tmp_path, plain, "optimizer.learning_rate=1e-3", "keep=5") == 2
    line = refused(capsys)
    assert "settings must be those that" in line
    assert "got optimizer.learning_rate 0.001 where it was 1e-05; name another output" in line
    # Nothing was noted over what the run began with.
    assert "0.001" not in (tmp_path / "out" / "stage.yaml").read_text()
    # A checkpoint that was not finished binds nobody.
    (tmp_path / "out" / "checkpoint-1" / MARK).unlink()
    assert train(tmp_path, plain, "data.split=none", "seed=3") == 2
    assert "lessons.scan must fit at least one clip" in refused(capsys)
    assert "seed: 3" in (tmp_path / "out" / "stage.yaml").read_text()


def test_a_run_goes_on_with_as_many_processes(
    parts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = tree(parts, tmp_path / "out")
    begun(plain, tmp_path / "out", processes=4)
    assert train(tmp_path, plain) == 2
    assert "processes must be 4, as" in refused(capsys)
