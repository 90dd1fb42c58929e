"""The page on which a person checks a judge: each clip with its windows, boxes, reasons and score.

It is one HTML file that fetches nothing from the network. Every text that comes from a prompt, a
file name or a judge is escaped, and a policy in the page lets no script run but its own.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

from cac_reward.drawing import COLOURS, MOST_SIDE, fit_for_display, video_uri
from cac_reward.page_assets import SCRIPT, STYLE
from cac_reward.records import ClipRecord
from cac_reward.report import AnomalyReport, Finding, TimeWindow
from cac_reward.whole_files import whole_file

VIDEOS = ("embed", "link")

_SMALL = 300
"""Pixels; a clip that is narrower is enlarged pixel by pixel."""


def write_page(
    path: str | Path,
    records: Sequence[ClipRecord],
    *,
    videos: str = "embed",
    title: str = "CaC report",
) -> None:
    """Write the page for some records; a half-written page never carries the final name.

    Args:
        path: Of the page; its folder must exist.
        records: What was judged, in the order of the page. Paths are relative to the working
            directory.
        videos: 'embed' copies each clip into the page, at most 480 pixels wide or high, so that the
            file can be sent around; 'link' names the files relative to the page, so that a page of
            thousands of clips stays small (the browser must be able to play them, and at the rate
            at which they were judged).
        title: Heading of the page.

    Raises:
        FileNotFoundError: If the folder or a clip is missing.
        ValueError: If `videos` is unknown, or a clip is not the one that was judged.
    """
    if videos not in VIDEOS:
        raise ValueError(f"videos must be one of {VIDEOS}, got {videos!r}")
    path = Path(path)
    if not path.resolve().parent.is_dir():
        raise FileNotFoundError(f"folder of {path} must exist; make it first")
    with whole_file(path) as opened:
        opened.writelines(_parts(path, records, videos, title))


def _parts(path: Path, records: Sequence[ClipRecord], videos: str, title: str) -> Iterator[str]:
    """The page bit by bit, so that no more than one clip is in memory."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode("utf-8")).digest()).decode("ascii")
    media = "data:" if videos == "embed" else "'self' file:"
    policy = (
        f"default-src 'none'; media-src {media}; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )
    yield (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n"
        f"<body><main><h1>{escape(title)}</h1>\n{_summary(records)}\n{_filters(records)}\n"
        '<div id="clips">\n'
    )
    for number, record in enumerate(records):
        if record.report is None:
            yield _unreadable(record, number)
            continue
        if videos == "embed":
            uri = video_uri(fit_for_display(record.decode(longest_side=MOST_SIDE)))
        else:
            uri = quote(os.path.relpath(record.path, path.resolve().parent).replace(os.sep, "/"))
        yield _article(record, record.report, number, uri)
    yield f"</div></main>\n<script>{SCRIPT}</script></body></html>\n"


def _summary(records: Sequence[ClipRecord]) -> str:
    scores = [one.report.score for one in records if one.report and one.report.score is not None]
    judges = sorted({f"{one.report.judge_id} ({one.report.mode})" for one in records if one.report})
    facts = [f"{len(records)} clips"]
    if scores:
        anomalous = sum(score < 0.5 for score in scores)
        facts += [
            f"{anomalous} of {len(scores)} judged anomalous ({100 * anomalous / len(scores):.1f}%)",
            f"mean P(clean) {sum(scores) / len(scores):.3f}",
        ]
    if len(scores) < len(records):
        facts.append(f"{len(records) - len(scores)} without a score")
    if judges:
        facts.append("judge " + ", ".join(judges))
    return f'<p class="summary">{escape("; ".join(facts))}</p>'


def _filters(records: Sequence[ClipRecord]) -> str:
    types = Counter(
        kind for one in records if one.report for kind in {f.type for f in one.report.findings}
    )
    options = "".join(
        f'<option value="{escape(kind)}">{escape(kind)} ({count})</option>'
        for kind, count in sorted(types.items())
    )
    score = '<input type="number" min="0" max="1" step="0.05" name="{}" aria-label="{}">'
    return (
        "<form><label>verdict <select name=verdict><option value=''>any</option>"
        "<option>anomalous</option><option>clean</option><option>unjudged</option></select></label>"
        f"<label>type <select name=type><option value=''>any</option>{options}</select></label>"
        f"<label>P(clean) from {score.format('low', 'lowest score')} to "
        f"{score.format('high', 'highest score')}</label>"
        '<label>words <input name="words" placeholder="in name, prompt, reasons"></label>'
        "<label>order <select name=order><option value=''>as judged</option>"
        "<option value=worst>worst first</option><option value=best>best first</option></select>"
        "</label><button type=reset>all</button><output name=shown></output>"
        "<noscript>Filters, boxes and seeking need JavaScript.</noscript></form>"
    )


def _unreadable(record: ClipRecord, number: int) -> str:
    return (
        f'<article id="clip-{number}" data-score="" data-types="[]" data-verdict="unjudged">'
        f'<div class="words"><header><h2>{escape(record.path)}</h2>'
        '<span class="verdict unjudged">unjudged</span></header>'
        f'<p class="note">{escape(record.error or "")}</p></div></article>\n'
    )


def _article(record: ClipRecord, report: AnomalyReport, number: int, uri: str) -> str:
    width, height = int(record.width or 0), int(record.height or 0)
    small = " small" if width < _SMALL else ""
    verdict = report.verdict or "unjudged"
    score = "not judged" if report.score is None else f"P(clean) {report.score:.3f}"
    types = json.dumps(sorted({finding.type for finding in report.findings}))
    notes = "".join(
        f'<p class="note">{escape(note)}</p>' for note in (report.note, report.error) if note
    )
    prompt = f'<p class="prompt">{escape(report.prompt)}</p>' if report.prompt else ""
    return (
        f'<article id="clip-{number}" data-score="{"" if report.score is None else report.score}" '
        f'data-types="{escape(types)}" data-verdict="{verdict}" '
        f'data-clip="{escape(_clip_data(report))}"><div class="words">'
        f"<header><h2>{escape(record.path)}</h2>"
        f'<span class="verdict {verdict}">{verdict}</span><span class="score">{score}</span>'
        f'</header>{prompt}{notes}<div class="body"><div>'
        f'<div class="stage{small}" style="max-width:calc(66vh * {width / height:.4f})">'
        f'<video controls loop muted playsinline preload="none" width="{width}" '
        f'height="{height}" src="{escape(uri)}">'
        "</video><canvas></canvas></div>"
        f'<p class="note trouble" hidden>The browser cannot play this file: {escape(record.path)}'
        f"</p>{_timeline(report)}"
        '<div class="clock"><button type="button" data-play>play</button>'
        '<button type="button" data-step="-1" aria-label="frame back">-1</button>'
        '<button type="button" data-step="1" aria-label="frame on">+1</button>'
        f'<span class="now-at"></span></div></div><div>{_findings(report)}</div></div></div>'
        f"{_details(record, report)}</article>\n"
    )


def _clip_data(report: AnomalyReport) -> str:
    """What the script draws: frames of each window and boxes as [time, x1, y1, x2, y2]."""
    findings = []
    for row, finding in enumerate(report.findings):
        frames = finding.window.frame_indices(report.num_frames, report.fps)
        boxes = [[box.time_seconds, *box.coordinates] for box in finding.boxes]
        drawn = {"type": finding.type, "colour": _colour(row), "boxes": boxes}
        findings.append({**drawn, "first": frames.start, "stop": frames.stop})
    return json.dumps({"fps": report.fps, "frames": report.num_frames, "findings": findings})


def _timeline(report: AnomalyReport) -> str:
    """A bar for what turn 1 asked to see again, and one for each finding."""
    rows = ""
    if report.windows:
        bars = "".join(
            f'<i class="asked" {_span(window, report)}"></i>' for window in report.windows
        )
        rows += f'<div class="row" title="asked to see again">{bars}</div>'
    for row, finding in enumerate(report.findings):
        bar = f'<i {_span(finding.window, report)};background:{_colour(row)}"></i>'
        rows += f'<div class="row" title="{escape(finding.type)}">{bar}</div>'
    rows = rows or '<div class="row"></div>'
    return f'<div class="timeline">{rows}<div class="head"></div></div>'


def _span(window: TimeWindow, report: AnomalyReport) -> str:
    """Attributes of a bar, the style left open."""
    left = min(100.0, 100 * window.start_seconds / report.duration_seconds)
    right = min(100.0, 100 * window.end_seconds / report.duration_seconds)
    seek = f'data-frame="{_seek_frame(window, report)}"'
    return f'{seek} style="left:{left:.2f}%;width:{right - left:.2f}%'


def _findings(report: AnomalyReport) -> str:
    if not report.findings:
        return '<p class="soft">No findings.</p>'
    items = "".join(_finding(row, one, report) for row, one in enumerate(report.findings))
    return f"<ol>{items}</ol>"


def _finding(row: int, finding: Finding, report: AnomalyReport) -> str:
    window = finding.window
    count = len(finding.boxes)
    boxes = f"{count} box{'es' * (count > 1)}" if count else "whole frame"
    why = f'<p class="why">{escape(finding.why)}</p>' if finding.why else ""
    return (
        f'<li style="border-color:{_colour(row)}"><b>{escape(finding.type)}</b> '
        f'<button type="button" data-frame="{_seek_frame(window, report)}">'
        f"{window.start_seconds:.2f} to {window.end_seconds:.2f} s</button> "
        f'<span class="soft">severity {finding.severity}, {boxes}</span>{why}</li>'
    )


def _details(record: ClipRecord, report: AnomalyReport) -> str:
    """Raw answers and circumstances, folded away."""
    spent = [f"{name} {seconds:.2f} s" for name, seconds in report.timings.items()]
    spent += [f"{name} {count} tokens" for name, count in (report.tokens or {}).items()]
    facts = (
        f"{report.num_frames} frames of {record.width}x{record.height} at {report.fps:g} fps; "
        f"judge {report.judge_id}, mode {report.mode}; saw {len(report.scan_frames)} frames in "
        f"turn 1 and {len(report.inspect_frames)} in turn 2" + "".join(f"; {one}" for one in spent)
    )
    texts = "".join(
        f"<p>{turn}</p><pre>{escape(text)}</pre>"
        for turn, text in (("Turn 1", report.scan_text), ("Turn 2", report.judge_text))
        if text
    )
    return f'<details><summary class="facts">{escape(facts)}</summary>{texts}</details>'


def _seek_frame(window: TimeWindow, report: AnomalyReport) -> int:
    """First frame of a window; the clip's last one where the window begins behind it."""
    return min(window.frame_indices(report.num_frames, report.fps).start, report.num_frames - 1)


def _colour(row: int) -> str:
    return COLOURS[row % len(COLOURS)]
