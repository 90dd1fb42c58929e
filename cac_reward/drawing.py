"""What a person looks at: findings drawn over frames, and a page with everything a judge said.

The page is one HTML file that needs no network: pictures and clips are inside it, it runs no
script, and every text that comes from a prompt, a file name or a judge is escaped. Axes: F frames,
C channels (3), H height, W width.
"""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Sequence
from html import escape
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import interpolate, pad

from cac_reward.report import AnomalyReport, Finding, TimeWindow
from cac_reward.video import Video

COLOURS = ("#e6194b", "#ffb000", "#00b4d8", "#8ac926", "#c77dff", "#ff7f51")
"""One for each finding of a clip, in turn; the same in frames, timeline and table."""

_LEAST_SIDE = 192
_MOST_SIDE = 480
_MOST_PICTURES = 12

_STYLE = """
body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:1100px;padding:0 1rem;
background:#fafafa;color:#1b1b1b}
article{background:#fff;border:1px solid #ddd;border-radius:8px;padding:1rem 1.25rem;margin:1rem 0}
h1{font-size:1.4rem}h2{font-size:1.05rem;margin:0 0 .5rem;overflow-wrap:anywhere}
.clean{color:#1a7f37}.anomalous{color:#b3261e}.unjudged{color:#8a6d00}
.note{background:#fff3cd;border-radius:6px;padding:.5rem .75rem}
.clip{display:flex;gap:1rem;flex-wrap:wrap}video{max-width:100%;border-radius:4px;background:#000}
.line{position:relative;height:12px;background:#e8e8e8;border-radius:3px;margin:3px 0;width:100%}
.line i{position:absolute;top:0;bottom:0;border-radius:3px;min-width:2px}
.line i.asked{background:#9aa0a6}
.shots{display:flex;flex-wrap:wrap;gap:6px;margin:.75rem 0}
figure{margin:0}figure img{display:block;max-width:200px;image-rendering:auto;border-radius:3px}
figcaption{font-size:12px;color:#555}
table{border-collapse:collapse;width:100%;margin:.5rem 0}
td,th{border-bottom:1px solid #e5e5e5;padding:.25rem .5rem;text-align:left;vertical-align:top}
pre{white-space:pre-wrap;overflow-wrap:anywhere;background:#f4f4f4;padding:.5rem;border-radius:4px}
small{color:#666}
"""


def draw_findings(frames: Tensor, findings: Sequence[Finding], fps: float) -> Tensor:
    """Outline every finding's boxes in the frames of its window.

    A finding without boxes outlines the whole frame. Each finding has its colour from `COLOURS`.

    Args:
        frames: [F 3 H W] uint8, all frames of the clip.
        findings: What to draw.
        fps: Frames per second of the clip.

    Returns:
        [F 3 H W] uint8, a copy.
    """
    if frames.ndim != 4 or frames.shape[1] != 3 or frames.dtype != torch.uint8:
        raise ValueError(
            "frames must be uint8 [frames, 3, height, width], got "
            f"{frames.dtype} {tuple(frames.shape)}"
        )
    drawn = frames.clone()
    height, width = frames.shape[-2:]
    for number, finding in enumerate(findings):
        colour = _rgb(COLOURS[number % len(COLOURS)])
        for index in finding.window.frame_indices(len(frames), fps):
            boxes = [box.coordinates for box in finding.boxes_at(index / fps)]
            for x1, y1, x2, y2 in boxes or [(0.0, 0.0, 1.0, 1.0)]:
                corners = (x1 * width, y1 * height, x2 * width, y2 * height)
                _outline(drawn[index], corners, colour)
    return drawn


def picture_uri(frame: Tensor) -> str:
    """One frame [3 H W] uint8 as a PNG inside a data URI."""
    return "data:image/png;base64," + base64.b64encode(_png(frame)).decode("ascii")


def video_uri(video: Video) -> str:
    """A clip as an mp4 inside a data URI; odd sides are padded by repeating the edge."""
    frames = video.frames
    odd = (0, frames.shape[-1] % 2, 0, frames.shape[-2] % 2)
    if any(odd):
        frames = pad(frames.float(), odd, mode="replicate").to(torch.uint8)
    mp4 = Video(frames, video.fps, video.source).encode()
    return "data:video/mp4;base64," + base64.b64encode(mp4).decode("ascii")


def fit_for_display(video: Video) -> Video:
    """Bring a clip to a size to look at: tiny ones grow by whole pixels, large ones shrink."""
    height, width = video.height, video.width
    if min(height, width) < _LEAST_SIDE and max(height, width) * 2 <= _MOST_SIDE:
        times = min(-(-_LEAST_SIDE // min(height, width)), _MOST_SIDE // max(height, width))
        grown = video.frames.repeat_interleave(times, 2).repeat_interleave(times, 3)
        return Video(grown, video.fps, video.source)
    if max(height, width) <= _MOST_SIDE:
        return video
    scale = _MOST_SIDE / max(height, width)
    size = (max(2, round(height * scale)), max(2, round(width * scale)))
    small = torch.stack([_shrink(frame, size) for frame in video.frames])
    return Video(small, video.fps, video.source)


def report_page(
    reports: Sequence[AnomalyReport], videos: Sequence[Video], title: str = "CaC report"
) -> str:
    """Write the page for some reports as HTML text.

    Args:
        reports: What was judged.
        videos: The clip of each report, in the same order.
        title: Heading of the page.

    Raises:
        ValueError: If a report has no clip of its length.
    """
    if len(reports) != len(videos):
        raise ValueError(
            f"videos must be one for each of {len(reports)} reports, got {len(videos)}"
        )
    articles = "\n".join(
        _article(report, video) for report, video in zip(reports, videos, strict=True)
    )
    policy = "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body><h1>{escape(title)}</h1>\n{articles}\n</body></html>\n"
    )


def write_page(
    path: str | Path,
    reports: Sequence[AnomalyReport],
    videos: Sequence[Video],
    title: str = "CaC report",
) -> None:
    """Write `report_page` to a file."""
    Path(path).write_text(report_page(reports, videos, title), encoding="utf-8")


def _article(report: AnomalyReport, video: Video) -> str:
    if video.num_frames != report.num_frames:
        raise ValueError(
            f"video of a report must have its {report.num_frames} frames, "
            f"got {video.num_frames} in {video.source}"
        )
    shown = fit_for_display(video)
    drawn = Video(draw_findings(shown.frames, report.findings, report.fps), report.fps)
    verdict = report.verdict or "unjudged"
    score = "not judged" if report.score is None else f"P(clean) {report.score:.3f}"
    notes = [note for note in (report.note, report.error) if note]
    return "\n".join(
        [
            f"<article><h2>{escape(video.source)}: "
            f'<span class="{verdict}">{verdict}</span> <small>{score}</small></h2>',
            f"<p>{escape(report.prompt)}</p>" if report.prompt else "",
            *(f'<p class="note">{escape(note)}</p>' for note in notes),
            f'<div class="clip"><video controls loop muted playsinline width="{drawn.width}" '
            f'src="{video_uri(drawn)}"></video></div>',
            _timeline(report),
            _shots(report, drawn),
            _table(report),
            _details(report),
            "</article>",
        ]
    )


def _timeline(report: AnomalyReport) -> str:
    """A bar for what turn 1 asked to see, and one for each finding."""
    rows = []
    if report.windows:
        bars = "".join(
            f'<i class="asked" style="{_span(window, report)}"></i>' for window in report.windows
        )
        rows.append(f'<div class="line" title="asked to see again">{bars}</div>')
    for number, finding in enumerate(report.findings):
        colour = COLOURS[number % len(COLOURS)]
        bar = f'<i style="{_span(finding.window, report)};background:{colour}"></i>'
        rows.append(f'<div class="line" title="{escape(finding.type)}">{bar}</div>')
    return "".join(rows)


def _span(window: TimeWindow, report: AnomalyReport) -> str:
    left = min(100.0, 100 * window.start_seconds / report.duration_seconds)
    right = min(100.0, 100 * window.end_seconds / report.duration_seconds)
    return f"left:{left:.2f}%;width:{right - left:.2f}%"


def _shots(report: AnomalyReport, drawn: Video) -> str:
    """A few of the frames that the judge saw last, with what it found in them."""
    seen = report.inspect_frames or report.scan_frames
    step = max(1, -(-len(seen) // _MOST_PICTURES))
    figures = "".join(
        f'<figure><img alt="frame {index}" src="{picture_uri(drawn.frames[index])}">'
        f"<figcaption>{index / report.fps:.2f} s</figcaption></figure>"
        for index in seen[::step]
    )
    return f'<div class="shots">{figures}</div>' if figures else ""


def _table(report: AnomalyReport) -> str:
    if not report.findings:
        return ""
    rows = []
    for number, finding in enumerate(report.findings):
        colour = COLOURS[number % len(COLOURS)]
        window = finding.window
        rows.append(
            f'<tr><td style="color:{colour}">&#9632; {escape(finding.type)}</td>'
            f"<td>{window.start_seconds:.2f} to {window.end_seconds:.2f} s</td>"
            f"<td>{finding.severity}</td><td>{len(finding.boxes)}</td>"
            f"<td>{escape(finding.why)}</td></tr>"
        )
    head = "<tr><th>kind</th><th>when</th><th>severity</th><th>boxes</th><th>why</th></tr>"
    return f"<table>{head}{''.join(rows)}</table>"


def _details(report: AnomalyReport) -> str:
    """Raw answers and circumstances, folded away."""
    timings = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in report.timings.items())
    facts = (
        f"judge {report.judge_id}, mode {report.mode}, {report.num_frames} frames at "
        f"{report.fps:g} fps" + (f"; {timings}" if timings else "")
    )
    texts = "".join(
        f"<p>{turn}</p><pre>{escape(text)}</pre>"
        for turn, text in (("Turn 1", report.scan_text), ("Turn 2", report.judge_text))
        if text
    )
    return f"<details><summary><small>{escape(facts)}</small></summary>{texts}</details>"


def _rgb(colour: str) -> Tensor:
    return torch.tensor(list(bytes.fromhex(colour[1:])), dtype=torch.uint8)


def _outline(frame: Tensor, corners: tuple[float, float, float, float], colour: Tensor) -> None:
    """Draw a rectangle into [3 H W] uint8, in place; it stays inside the frame."""
    height, width = frame.shape[-2:]
    thick = max(1, round(min(height, width) / 120))
    left = min(max(0, int(corners[0])), width - 1)
    top = min(max(0, int(corners[1])), height - 1)
    right = max(left + 1, min(width, round(corners[2])))
    bottom = max(top + 1, min(height, round(corners[3])))
    paint = colour[:, None, None]
    frame[:, top : min(top + thick, bottom), left:right] = paint
    frame[:, max(bottom - thick, top) : bottom, left:right] = paint
    frame[:, top:bottom, left : min(left + thick, right)] = paint
    frame[:, top:bottom, max(right - thick, left) : right] = paint


def _shrink(frame: Tensor, size: tuple[int, int]) -> Tensor:
    """[3 H W] uint8 to another size."""
    small = interpolate(
        frame[None].float(), size=size, mode="bilinear", antialias=True, align_corners=False
    )
    return small[0].round().clamp(0, 255).to(torch.uint8)


def _png(frame: Tensor) -> bytes:
    """[3 H W] uint8 as a PNG: header, one deflated block of unfiltered rows, end."""
    if frame.ndim != 3 or frame.shape[0] != 3 or frame.dtype != torch.uint8:
        raise ValueError(
            f"frame must be uint8 [3, height, width], got {frame.dtype} {tuple(frame.shape)}"
        )
    height, width = frame.shape[1:]
    rows = frame.permute(1, 2, 0).reshape(height, width * 3).cpu()
    unfiltered = torch.zeros(height, 1, dtype=torch.uint8)
    pixels = torch.cat([unfiltered, rows], 1).contiguous().numpy().tobytes()
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(pixels, 6)), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )
