"""Records survive a round trip, a torn end and a second writer."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from cac_reward.records import ClipRecord, RecordWriter, read_records
from cac_reward.report import AnomalyReport, Box, Finding, TimeWindow


def judged(path: str = "a.mp4", score: float = 0.25) -> ClipRecord:
    finding = Finding("jump", TimeWindow(0.1, 0.3), (Box(0.2, 0.1, 0.2, 0.3, 1 / 3),), 3, "why")
    report = AnomalyReport(
        score=score, judge_id="j", fps=8.0, num_frames=8, findings=(finding,), prompt="caf\u00e9\n"
    )
    return ClipRecord(path=path, width=64, height=48, report=report)


def test_records_are_read_as_written(tmp_path: Path) -> None:
    failed = ClipRecord(path="b \u00e9.mp4", error="zero bytes\nin two lines")
    with RecordWriter(tmp_path / "r.jsonl") as writer:
        for record in (judged(), failed):
            writer.write(record)
            assert (tmp_path / "r.jsonl").read_text().endswith(record.to_json() + "\n")
    assert read_records(tmp_path / "r.jsonl") == {"a.mp4": judged(), "b \u00e9.mp4": failed}
    assert (judged().failure, failed.failure) == (None, failed.error)
    report = AnomalyReport(score=None, error="nonsense", judge_id="j", fps=8.0, num_frames=8)
    assert ClipRecord(path="c", width=2, height=2, report=report).failure == "nonsense"


def test_the_last_line_on_a_clip_counts(tmp_path: Path) -> None:
    with RecordWriter(tmp_path / "r") as writer:
        writer.write(ClipRecord(path="a.mp4", error="no"))
        writer.write(judged(score=0.75))
    assert read_records(tmp_path / "r") == {"a.mp4": judged(score=0.75)}


@pytest.mark.parametrize("torn", [1, 100, 70_000])
def test_a_torn_line_is_left_out_and_cut_away(
    tmp_path: Path, torn: int, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "r"
    whole = judged().to_json() + "\n"
    path.write_text(whole + "x" * torn)
    with caplog.at_level(logging.WARNING):
        assert list(read_records(path)) == ["a.mp4"]
    assert "line 2 was cut off in writing" in caplog.text
    with RecordWriter(path) as writer:
        assert path.read_text() == whole
        writer.write(judged("b.mp4"))
    assert list(read_records(path)) == ["a.mp4", "b.mp4"]


def test_a_file_that_is_all_one_torn_line_starts_anew(tmp_path: Path) -> None:
    (tmp_path / "r").write_text("{")
    with RecordWriter(tmp_path / "r"):
        assert (tmp_path / "r").read_bytes() == b""


def test_two_writers_do_not_share_a_file(tmp_path: Path) -> None:
    with (
        RecordWriter(tmp_path / "r"),
        pytest.raises(ValueError, match=r"written by one process, got .*r, which another one is"),
    ):
        RecordWriter(tmp_path / "r")
    with RecordWriter(tmp_path / "r") as writer:
        writer.write(judged())


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="records must be an existing file, got"):
        read_records(tmp_path / "r")
    other = json.dumps({"path": "a"})
    for line, why in (("{", "Expecting"), (other, "the keys"), ("[]", "the keys"), ("\xff", "")):
        (tmp_path / "r").write_text(judged().to_json() + f"\n{line}\n", encoding="latin-1")
        with pytest.raises(ValueError, match=rf"r must hold one record per line, .* 2: .*{why}"):
            read_records(tmp_path / "r")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"path": ""}, "path must name a file, got ''"),
        ({"path": 3}, "path must name a file, got 3"),
        ({"error": "x"}, "record of a.mp4 must hold a report or an error, got both"),
        ({"report": None}, "record of a.mp4 must hold a report or an error, got neither"),
        ({"width": 0}, "width of a.mp4 must be a number of pixels .*, got 0"),
        ({"height": None}, "height of a.mp4 must be .*, got None"),
        ({"height": True}, "height of a.mp4 must be .*, got True"),
        ({"report": None, "error": "x", "width": None}, "height of a.mp4 must be .*, got 48"),
        ({"report": None, "error": "x", "width": -1}, "width of a.mp4 must be .*, got -1"),
    ],
)
def test_a_record_checks_itself(changes: dict[str, Any], message: str) -> None:
    values = {"path": "a.mp4", "width": 64, "height": 48, "report": judged().report}
    with pytest.raises(ValueError, match=message):
        ClipRecord(**{**values, **changes})
