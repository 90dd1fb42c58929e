"""`cac-reward export`: from reports to every format, and from every format to every other."""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from cac_reward.__main__ import main
from cac_reward.exporting import FORMATS, export_clips, read_clips
from cac_reward.exports.base import LabelledClip
from cac_reward.records import ClipRecord, RecordWriter
from cac_reward.report import AnomalyReport, Box, Finding, TimeWindow
from cac_reward.video import Video

FINDING = Finding("jump", TimeWindow(0.0, 0.5), (Box(0.1, 0.1, 0.2, 0.3, 0.4),), 3, "it jumps")


@pytest.fixture
def reports(tmp_path: Path) -> Path:
    """Two files of reports: one clip each, and one that could not be read."""
    for number, name in enumerate("ab"):
        video = Video(torch.zeros(8, 3, 16, 32, dtype=torch.uint8), 8.0)
        video.save(tmp_path / f"{name}.mp4")
        report = AnomalyReport(
            score=number / 4, judge_id="j", fps=8.0, num_frames=8, findings=(FINDING,)
        )
        path = str(tmp_path / f"{name}.mp4")
        with RecordWriter(tmp_path / f"{name}.jsonl") as writer:
            writer.write(ClipRecord(path=path, width=32, height=16, report=report))
    with RecordWriter(tmp_path / "b.jsonl") as writer:
        writer.write(ClipRecord(path="bad.mp4", error="zero bytes"))
    return tmp_path


def convert(*arguments: object) -> int:
    return main(["export", *map(str, arguments)])


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize("name", [*FORMATS, "cvat"])
def test_findings_go_through_every_format(
    reports: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = [reports / "a.jsonl", reports / "b.jsonl"]
    assert convert(*inputs, "--to", name, "--output", reports / "out") == 0
    assert f"{name}: {reports / 'out'}" in capsys.readouterr().out
    written = sorted((reports / "out").iterdir()) if name == "cvat" else [reports / "out"]
    if name == "cvat":
        assert [one.name for one in written] == ["00000_a.mp4.xml", "00001_b.mp4.xml"]
    back = [*written, "--from", name, "--to", "findings", "--output", reports / "back.jsonl"]
    assert convert(*back) == 0
    assert convert(*inputs, "--to", "findings", "--output", reports / "straight.jsonl") == 0
    assert lines(reports / "back.jsonl") == lines(reports / "straight.jsonl")
    assert [one["findings"] for one in lines(reports / "back.jsonl")] == [[FINDING.to_json()]] * 2
    assert list(reports.rglob("*.partial")) == []


def test_reports_become_views(reports: Path) -> None:
    inputs = [reports / "a.jsonl", reports / "b.jsonl"]
    for target in ("html", "csv", "overlays"):
        assert convert(*inputs, "--to", target, "--output", reports / target) == 0
    assert (reports / "html").read_text(encoding="utf-8").count("<article") == 3
    assert len((reports / "csv").read_text(encoding="utf-8").splitlines()) == 4
    assert sorted(one.name for one in (reports / "overlays").iterdir()) == ["a.mp4", "b.mp4"]
    linked = ["--to", "html", "--output", reports / "linked", "--videos", "link"]
    assert convert(*inputs, *linked) == 0
    assert 'src="a.mp4"' in (reports / "linked").read_text(encoding="utf-8")


def test_a_file_that_cvat_wrote_needs_path_and_rate(
    reports: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(reports / "a.jsonl", "--to", "cvat", "--output", reports / "x")
    (path,) = (reports / "x").iterdir()
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace("<cac ", "<other "), encoding="utf-8")
    back = [path, "--from", "cvat", "--to", "findings", "--output", reports / "f.jsonl"]
    assert convert(*back) == 2
    assert (
        f"error: {path}: path must be given for a file that CVAT wrote" in capsys.readouterr().err
    )
    assert convert(*back, "--path", "a.mp4", "--fps", 8) == 0
    assert lines(reports / "f.jsonl")[0]["path"] == "a.mp4"


def test_wrong_use_is_one_line(reports: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, out = reports / "a.jsonl", ["--output", reports / "out"]
    (reports / "coco").write_text("[]")
    for given, message in (
        ([first, "--to", "csv", "--output", reports / "no" / "x"], "folder of .* must exist; make"),
        ([reports / "no", "--to", "csv", *out], "records must be an existing file, got"),
        ([reports / "no", "--from", "coco", "--to", "cvat", *out], "No such file"),
        (
            [reports / "coco", "--to", "csv", *out],
            "reports must hold at least one clip, got",
        ),
        ([reports / "coco", "--from", "coco", "--to", "cvat", *out], "coco: COCO file must be an"),
        ([reports / "coco", "--from", "fiftyone", "--to", "html", *out], "to must be a format of"),
        ([first, "--to", "csv", *out, "--fps", 3], "fps and path must be left out unless --from c"),
    ):
        assert convert(*given) == 2
        printed = capsys.readouterr()
        with pytest.raises(ValueError, match=f"error: .*({message})"):
            raise ValueError(printed.err)


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"to must be one of \('html', .*, got 'yolo'"):
        export_clips([], "yolo", tmp_path / "x")
    with pytest.raises(FileNotFoundError):
        read_clips([tmp_path / "x"], "coco")
    clip = LabelledClip(path="a", width=2, height=2, fps=1.0, num_frames=2)
    export_clips([clip], "coco", tmp_path / "x")
    assert read_clips([tmp_path / "x"], "coco") == [clip]


def test_serve_is_imported_only_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    server = ModuleType("cac_reward.server")
    server.add_serve_arguments = lambda parser: parser.add_argument("--port", type=int)  # type: ignore
    server.run_server = lambda options: seen.append(options.port) or 7  # type: ignore
    monkeypatch.setitem(sys.modules, "cac_reward.server", server)
    assert main(["serve", "--port", "8123"]) == 7
    assert seen == [8123]
    with pytest.raises(SystemExit, match="0"):
        main(["serve", "--help"])


def test_one_path_is_not_that_of_several_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"path must be left out for several files, got 'x' for 2"):
        read_clips([tmp_path / "a.xml", tmp_path / "b.xml"], "cvat", path="x")
