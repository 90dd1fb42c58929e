"""Sound findings, reports, records and clips at random, to be written and damaged."""

from __future__ import annotations

import random

from cac_reward.exports.base import LabelledClip
from cac_reward.records import ClipRecord
from cac_reward.report import AnomalyReport, Box, Finding, TimeWindow

SECONDS = 6.0
"""Length of the clip that answers are about."""


def some_line(chance: random.Random, least: int = 0) -> str:
    letters = 'abc xyz<>&"\\{}[]:,\u00e9\u4e2d\U0001f600\ufffe'
    text = "".join(chance.choice(letters) for _ in range(chance.randint(least, 20)))
    return text if text.strip() or not least else "jump"


def some_finding(chance: random.Random, seconds: float = SECONDS) -> Finding:
    """A finding on the grid that answers are written in, so that it makes the round trip."""
    last = round(seconds * 100)
    start, end = sorted(chance.sample(range(last + 1), 2))
    boxes = []
    for _ in range(chance.choice((0, 0, 1, 2, 3))):
        (x1, x2), (y1, y2) = (sorted(chance.sample(range(1001), 2)) for _ in range(2))
        time = chance.randint(start, end) / 100
        boxes.append(Box(time, x1 / 1000, y1 / 1000, x2 / 1000, y2 / 1000))
    window = TimeWindow(start / 100, end / 100)
    severity = chance.randint(1, 3)
    return Finding(some_line(chance, 1), window, tuple(boxes), severity, some_line(chance))


def some_findings(chance: random.Random) -> tuple[Finding, ...]:
    return tuple(some_finding(chance) for _ in range(chance.randint(0, 3)))


def some_report(chance: random.Random) -> AnomalyReport:
    findings = some_findings(chance)
    score = None if chance.random() < 0.2 else chance.random()
    return AnomalyReport(
        score=score,
        judge_id=some_line(chance, 1),
        fps=chance.choice((8.0, 16.0, 23.976)),
        num_frames=chance.randint(96, 200),
        findings=findings,
        windows=tuple(finding.window for finding in findings),
        scan_frames=tuple(range(0, 96, 12)),
        judge_text=chance.choice((None, some_line(chance))),
        prompt=some_line(chance),
        settings=chance.choice((None, {"family": "qwen3_vl", "scan.fps": 2.0, "domain": None})),
        timings={"scan": chance.random()},
        error="no answer" if score is None else None,
    )


def some_record(chance: random.Random) -> ClipRecord:
    if chance.random() < 0.2:
        return ClipRecord(path="clips/a.mp4", error=some_line(chance, 1))
    return ClipRecord(path="clips/a.mp4", width=64, height=48, report=some_report(chance))


def some_clip(chance: random.Random) -> LabelledClip:
    return LabelledClip(
        path="clips/a & b.mp4",
        width=chance.randint(1, 2000),
        height=chance.randint(1, 2000),
        fps=chance.choice((8.0, 16.0, 29.97)),
        num_frames=chance.randint(48, 200),
        findings=some_findings(chance),
    )
