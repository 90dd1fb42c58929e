"""Records as files for other programs: a table with a row for each clip, and mp4s with outlines."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path

from cac_reward.drawing import write_overlay
from cac_reward.records import ClipRecord
from cac_reward.whole_files import whole_file

COLUMNS = (
    *("path", "score", "verdict", "error", "findings", "types", "worst_severity", "windows"),
    *("prompt", "judge", "mode", "seconds", "fps", "frames", "width", "height"),
)


def write_table(path: str | Path, records: Sequence[ClipRecord]) -> None:
    """Write a CSV file (UTF-8) with `COLUMNS`, a row for each clip, whole or not at all.

    Scores are P(clean) with all their digits, empty where there is none; types and windows
    ("0.25-0.50", in seconds) are separated by semicolons, one for each finding.
    """
    with whole_file(path, newline="") as opened:
        table = csv.writer(opened, lineterminator="\n")
        table.writerow(COLUMNS)
        table.writerows(_row(record) for record in records)


def write_overlays(folder: str | Path, records: Sequence[ClipRecord]) -> list[Path]:
    """Write an mp4 with the findings drawn over it for each readable clip.

    Names are those of the clips below the folder that holds them all, with .mp4 added where they
    end otherwise.

    Returns:
        The files written.

    Raises:
        FileNotFoundError: If a clip is gone.
        ValueError: If a clip is not the one that was judged, or would be overwritten.
    """
    judged = [record for record in records if record.report is not None]
    places = [Path(record.path).resolve() for record in judged]
    root = Path(os.path.commonpath([place.parent for place in places])) if places else Path()
    written = []
    for record, place in zip(judged, places, strict=True):
        target = Path(folder) / place.relative_to(root)
        if target.suffix.lower() != ".mp4":
            target = target.with_name(target.name + ".mp4")
        if target.resolve() in places:
            raise ValueError(
                f"overlays must go to a folder without the clips, got {folder}, which holds "
                f"{target.name}; name another"
            )
        assert record.report is not None
        write_overlay(target, record.decode(), record.report.findings)
        written.append(target)
    return written


def _row(record: ClipRecord) -> list[object]:
    report = record.report
    if report is None:
        return [record.path, "", "", record.error, *[""] * (len(COLUMNS) - 4)]
    findings = report.findings
    spans = [(one.window.start_seconds, one.window.end_seconds) for one in findings]
    return [
        *(record.path, "" if report.score is None else report.score, report.verdict or ""),
        *(report.error or "", len(findings), ";".join(finding.type for finding in findings)),
        max((finding.severity for finding in findings), default=""),
        ";".join(f"{start:.2f}-{end:.2f}" for start, end in spans),
        *(report.prompt, report.judge_id, report.mode, report.duration_seconds, report.fps),
        *(report.num_frames, record.width, record.height),
    ]
