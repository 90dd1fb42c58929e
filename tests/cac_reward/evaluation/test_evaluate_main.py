"""The command: files in, table and files out, what is wrong in one line."""

import json
import re
from pathlib import Path

import pytest
import torch

from cac_reward.__main__ import main
from cac_reward.data.annotations import AnnotatedClip
from cac_reward.data.storage import annotation_writer
from cac_reward.records import RecordWriter, read_records
from cac_reward.report import Finding, TimeWindow
from cac_reward.scorer import CaCScorer
from cac_reward.video import Video
from tests.cac_reward.evaluation.test_measuring import CLIPS, RECORDS
from tests.cac_reward.test_main_many import StubScorer


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    annotations, reports = tmp_path / "clips.jsonl", tmp_path / "reports.jsonl"
    with annotation_writer(annotations) as write:
        for clip in CLIPS:
            write(clip)
    with RecordWriter(reports) as writer:
        for record in RECORDS:
            writer.write(record)
    return annotations, reports


def arguments(files: tuple[Path, Path], *more: object) -> list[str]:
    given = ["evaluate", "--annotations", files[0], "--predictions", files[1], *more]
    return [str(one) for one in given]


def test_answers_made_elsewhere_are_measured(
    files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    out = files[0].with_name("out.json"), files[0].with_name("out.md")
    status = main(arguments(files, "--draws", 20, "--json", out[0], "--markdown", out[1]))
    assert status == 3  # Two clips have no score.
    printed = capsys.readouterr().out
    assert "clip.accuracy" in printed
    assert "0.6667" in printed
    assert json.loads(out[0].read_text())["measures"]["clip.accuracy"]["clips"] == 6
    assert "clip.accuracy" in out[1].read_text()


def test_a_whole_split_exits_with_zero(
    files: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    with annotation_writer(files[0]) as write:
        write(CLIPS[0])
    assert main(arguments(files, "--draws", 0)) == 0
    assert "No intervals" in capsys.readouterr().out
    with annotation_writer(files[0]) as write:
        write(CLIPS[0])
        write(AnnotatedClip(path="other.mp4", verdict="clean"))
    assert main(arguments(files, "--draws", 0)) == 3
    assert "1  without a prediction" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--output", "x.jsonl"], "output must be left out with predictions"),
        (["--device", "cpu"], "device must be left out with predictions"),
        (["--split", "test"], "clips of split 'test', got none"),
        (["--json", "/nowhere/x.json"], "folder of /nowhere/x.json must exist"),
        (["--level", "2"], "level must be in"),
        (["--answers", "/nowhere/x"], "answers must be an existing file"),
    ],
)
def test_wrong_use_is_one_line(
    files: tuple[Path, Path], capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    assert main(arguments(files, *more)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> StubScorer:
    """Says that clips of at most four frames jump from 0 to 0.25 s."""
    stub = StubScorer("stub", "full")
    monkeypatch.setattr(CaCScorer, "from_pretrained", lambda *_, **__: stub)
    return stub


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """Annotations of two readable clips and one that is missing, beside the clips."""
    for name, frames in (("short.mp4", 4), ("long.mp4", 8)):
        Video(torch.full((frames, 3, 16, 16), 128, dtype=torch.uint8), 8.0).save(tmp_path / name)
    jump = Finding("jump", TimeWindow(0.0, 0.25))
    with annotation_writer(tmp_path / "clips.jsonl") as write:
        write(AnnotatedClip(path="short.mp4", prompt="a ball", findings=(jump,)))
        write(AnnotatedClip(path="long.mp4", prompt="a cup", verdict="clean"))
        write(AnnotatedClip(path="gone.mp4", verdict="clean"))
    return tmp_path


def judged(folder: Path, *more: object) -> list[str]:
    given = ["evaluate", "--annotations", folder / "clips.jsonl", "--judge", "stub", *more]
    return [str(one) for one in (*given, "--draws", 10)]


def test_a_judge_is_scored_first_and_the_run_goes_on(
    videos: Path, judge: StubScorer, capsys: pytest.CaptureFixture[str]
) -> None:
    output, page = videos / "reports.jsonl", videos / "page.html"
    command = judged(videos, "--output", output, "--html", page, "--batch", 1)
    judge.stop_before = 1
    assert main(command) == 130
    assert len(read_records(output)) == 1
    assert not page.exists()
    judge.stop_before = -1
    assert main(command) == 3  # One file is missing.
    assert judge.prompts == ["a ball", "a cup"]
    printed = capsys.readouterr().out
    assert re.search(r"clip\.accuracy +1\.0000", printed)
    assert "1  not judged: file not readable" in printed
    text = page.read_text(encoding="utf-8")
    assert "<td>clip.accuracy</td><td>1.0000</td>" in text
    assert "<script" not in text
    assert main(command) == 3
    assert len(judge.prompts) == 2


def test_a_judge_needs_an_output_and_files(
    videos: Path, judge: StubScorer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(judged(videos)) == 2
    assert "output must be given with judge" in capsys.readouterr().err
    with annotation_writer(videos / "clips.jsonl") as write:
        write(AnnotatedClip(path="shard.tar", key="7", verdict="clean"))
    assert main(judged(videos, "--output", videos / "out.jsonl")) == 2
    assert "shard.tar#7 in a shard" in capsys.readouterr().err
