"""The command: files in, table and files out, what is wrong in one line."""

import json
from pathlib import Path

import pytest

from cac_reward.__main__ import main
from cac_reward.data.storage import annotation_writer
from cac_reward.records import RecordWriter
from tests.cac_reward.evaluation.test_measuring import CLIPS, RECORDS


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


@pytest.mark.parametrize(
    ("more", "message"),
    [
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
