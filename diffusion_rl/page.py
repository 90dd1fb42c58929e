"""The report a person opens: one HTML file, no script, nothing fetched from anywhere."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from diffusion_rl.charts import BarChart, LineChart, draw_chart, format_number
from diffusion_rl.clips import Clip, data_uri, draw_clip
from diffusion_rl.comparison import Comparison, Estimate
from diffusion_rl.style import STYLE
from diffusion_rl.whole_files import write_whole

PERCENT_WORDS = ("rate", "match", "share", "reduction")
"""A measure with one of these words in its name is a share of 1, and is written in percent."""
CI_SUFFIX = "_ci95"
MOST_KEPT = 10
"""Times its level before up to which a measure's level after is given as a share of it."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """Rows of text and numbers under headings."""

    title: str
    """What it shows."""
    columns: Sequence[str]
    """Headings; the first column holds the names of the rows."""
    rows: Sequence[Sequence[str | float | int]]
    """One entry per column each."""
    caption: str = ""
    """A sentence below the title."""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(
                    f"rows of table '{self.title}' must have {len(self.columns)} entries, "
                    f"got {len(row)}"
                )


@dataclass(frozen=True, kw_only=True)
class VideoPair:
    """The same prompt and seed before and after."""

    prompt: str
    """What was asked for."""
    base: Clip
    """From the base generator."""
    tuned: Clip
    """From the tuned one."""
    others: Mapping[str, Clip] = field(default_factory=dict)
    """From further ones, by name."""


@dataclass(frozen=True, kw_only=True)
class Section:
    """A part of a page: text, then tables, charts and videos."""

    title: str
    """Heading; empty where those of its tables are enough."""
    paragraphs: Sequence[str] = ()
    """Text below it."""
    tables: Sequence[Table] = ()
    """In order."""
    charts: Sequence[LineChart | BarChart] = ()
    """In order."""
    video_pairs: Sequence[VideoPair] = ()
    """Side by side, in order."""


def write_report(
    path: str | Path,
    *,
    title: str,
    summary: Mapping[str, Any],
    curves: Sequence[LineChart | BarChart] = (),
    tables: Sequence[Table] = (),
    video_pairs: Sequence[VideoPair] = (),
    notes: Sequence[str] = (),
) -> Path:
    """Write one self-contained HTML page about a run.

    Args:
        path: The file to write; folders are made, and a file there is replaced in one step.
        title: Heading of the page.
        summary: Shown as cards and kept whole at the end. `base` and `tuned` hold the same measures
            of both generators; a number whose name ends in _ci95 is the interval [low, high] of the
            number without it; other plain numbers become facts of the run.
        curves: Charts, in order.
        tables: Tables, in order.
        video_pairs: Side by side, in order.
        notes: Paragraphs: how it was measured, what to beware of.

    Returns:
        The path written.
    """
    sections = [
        Section(title="", tables=tables),
        Section(title="Curves", charts=curves),
        Section(title="Videos before and after", video_pairs=video_pairs),
        Section(title="Notes", paragraphs=notes),
    ]
    return write_page(path, title=title, summary=summary, sections=sections)


def write_page(
    path: str | Path,
    *,
    title: str,
    summary: Mapping[str, Any],
    sections: Sequence[Section],
    lead: str = "",
) -> Path:
    """Write one self-contained HTML page made of sections; `write_report` lays out the usual ones.

    Args:
        path: The file to write; folders are made, and a file there is replaced in one step.
        title: Heading of the page.
        summary: See `write_report`.
        sections: In order; empty ones are left out.
        lead: The result in a sentence or two, below the heading.

    Returns:
        The path written.
    """
    parts = [
        f'<p class="lead">{escape(lead)}</p>' if lead else "",
        _cards(summary),
        _facts(summary),
        *map(_draw_section, sections),
        _section(
            "Everything in numbers",
            f"<details><summary>summary.json</summary><pre>{escape(_json(summary))}</pre></details>",
        ),
    ]
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # The page may load nothing, whatever text has found its way into it.
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
        "img-src data:; media-src data:; style-src 'unsafe-inline'\">"
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>"
        f"<body><main><h1>{escape(title)}</h1>{''.join(parts)}</main></body></html>\n"
    )
    return write_whole(path, page)


def comparison_table(
    comparisons: Mapping[str, Comparison],
    *,
    title: str = "Before and after",
    percent: Collection[str] = (),
    caption: str = "",
    sides: tuple[str, str] = ("base", "tuned"),
) -> Table:
    """Lay out comparisons as a table with intervals.

    Args:
        comparisons: Measure's name to its comparison.
        title: Of the table.
        percent: Names of measures that are shares of 1: their change is given in points. Names
            that hold one of PERCENT_WORDS are taken as such too.
        caption: A sentence below the title.
        sides: Names of the two generators.
    """
    rows: list[list[str | float | int]] = []
    for name, found in comparisons.items():
        share = name in percent or _is_share(name)
        if share:
            change, interval = _points(found.difference)
        elif found.ratio is not None:
            shifted = Estimate(found.ratio.value - 1, found.ratio.low - 1, found.ratio.high - 1)
            change, interval = _percent(shifted)
        else:
            change, interval = _plain_estimate(found.difference)
        base, tuned = (format_number(v, percent=share) for v in (found.base, found.tuned))
        rows.append([_words(name), base, tuned, change, interval, found.pairs])
    columns = ["measure", *sides, "change", "95% interval", "pairs"]
    return Table(title=title, columns=columns, rows=rows, caption=caption)


def markdown_table(table: Table) -> str:
    """A table as Markdown with its title and its caption."""
    rows = [table.columns, [":--", *["--:"] * (len(table.columns) - 1)], *table.rows]
    lines = []
    for row in rows:
        cells = [format_number(float(c)) if _is_number(c) else str(c) for c in row]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    caption = [table.caption, ""] if table.caption else []
    return "\n".join([f"## {table.title}", "", *caption, *lines])


def _points(estimate: Estimate) -> tuple[str, str]:
    low, high = (f"{100 * value:+.1f}" for value in (estimate.low, estimate.high))
    return f"{100 * estimate.value:+.1f} points", f"{low} to {high}"


def _percent(estimate: Estimate) -> tuple[str, str]:
    low, high = (f"{100 * value:+.1f}%" for value in (estimate.low, estimate.high))
    return f"{100 * estimate.value:+.1f}%", f"{low} to {high}"


def _plain_estimate(estimate: Estimate) -> tuple[str, str]:
    value, low, high = (f"{one:+.3g}" for one in (estimate.value, estimate.low, estimate.high))
    return value, f"{low} to {high}"


def _cards(summary: Mapping[str, Any]) -> str:
    """The measured effects first, then every measure of both generators."""
    cards = []
    for name, value in summary.items():
        interval = summary.get(name + CI_SUFFIX)
        if interval is None or not _is_number(value):
            continue
        share = _is_share(name)
        ends = " to ".join(format_number(float(end), percent=share) for end in interval)
        number = format_number(float(value), percent=share)
        cards.append(_card(_words(name), number, f"95% interval {ends}", "card effect"))
    base, tuned = summary.get("base"), summary.get("tuned")
    if isinstance(base, Mapping) and isinstance(tuned, Mapping):
        for name, before in base.items():
            after: Any = tuned.get(name)
            if not (_is_number(before) and _is_number(after)) or name == "videos":
                continue
            share = _is_share(name)
            numbers = [format_number(float(value), percent=share) for value in (before, after)]
            detail = f"before {numbers[0]}"
            if 0 < before and after <= MOST_KEPT * before and not share:
                detail += f", {100 * after / before:.0f}% of it kept"
            cards.append(_card(_words(name), numbers[1], detail, "card"))
    return f'<section class="cards">{"".join(cards)}</section>' if cards else ""


def _card(label: str, number: str, detail: str, kind: str) -> str:
    return (
        f'<div class="{kind}"><span class="label">{escape(label)}</span>'
        f'<span class="number">{escape(number)}</span>'
        f'<span class="detail">{escape(detail)}</span></div>'
    )


def _facts(summary: Mapping[str, Any]) -> str:
    facts = []
    for name, value in summary.items():
        if name + CI_SUFFIX in summary or not isinstance(value, str | int | float):
            continue
        shown = format_number(float(value)) if _is_number(value) else str(value)
        facts.append(f"<div><dt>{escape(_words(name))}</dt><dd>{escape(shown)}</dd></div>")
    return f'<dl class="facts">{"".join(facts)}</dl>' if facts else ""


def _draw_section(section: Section) -> str:
    content = "".join(f"<p>{escape(text)}</p>" for text in section.paragraphs)
    content += "".join(_table(table, 3 if section.title else 2) for table in section.tables)
    if section.charts:
        content += f'<div class="charts">{"".join(map(draw_chart, section.charts))}</div>'
    content += _videos(section.video_pairs)
    return _section(section.title, content) if section.title and content else content


def _table(table: Table, level: int) -> str:
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in table.columns)
    body = ""
    for row in table.rows:
        cells = [format_number(float(c)) if _is_number(c) else str(c) for c in row]
        rest = "".join(f"<td>{escape(cell)}</td>" for cell in cells[1:])
        body += f'<tr><th scope="row">{escape(cells[0])}</th>{rest}</tr>'
    caption = f'<p class="caption">{escape(table.caption)}</p>' if table.caption else ""
    content = (
        f'{caption}<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )
    return _section(table.title, content, level)


def _videos(pairs: Sequence[VideoPair]) -> str:
    if not pairs:
        return ""
    shown = "".join(
        f'<article class="pair"><h3>{escape(pair.prompt)}</h3><div class="sides">'
        f"{''.join(_clip(*one) for one in _clips(pair).items())}</div></article>"
        for pair in pairs
    )
    key = '<p class="caption">Same prompt and same noise on all sides.'
    if any(clip.score is not None for pair in pairs for clip in _clips(pair).values()):
        key += (
            ' Time line below each video: <span class="key again"></span> the judge looked again, '
            '<span class="key fault"></span> it found a fault (boxed in the picture).'
        )
    key += "</p>"
    return f'{key}<div class="pairs">{shown}</div>'


def _clips(pair: VideoPair) -> dict[str, Clip]:
    return {"base": pair.base, "tuned": pair.tuned, **pair.others}


def _clip(side: str, clip: Clip) -> str:
    drawn = draw_clip(clip)
    uri = data_uri(drawn, clip.fps)
    size = f'width="{drawn.shape[3]}" height="{drawn.shape[2]}"'
    if uri.startswith("data:image"):
        picture = f'<img src="{uri}" {size} alt="video of the {side} generator">'
    else:
        picture = f'<video src="{uri}" {size} autoplay loop muted playsinline controls></video>'
    verdict = ""
    if clip.score is not None and math.isfinite(clip.score):
        kind = "clean" if clip.score >= 0.5 else "broken"
        verdict = f'<span class="verdict {kind}">P(clean) {clip.score:.2f}</span>'
    marks = "".join(
        f"<li><b>{escape(mark.type)}</b> {mark.window[0]:.2f}-{mark.window[1]:.2f} s"
        f"{': ' + escape(mark.why) if mark.why else ''}</li>"
        for mark in clip.marks
    )
    findings = f"<ul>{marks}</ul>" if marks else ""
    note = f'<p class="note">{escape(clip.note)}</p>' if clip.note else ""
    return (
        f"<figure>{picture}<figcaption><b>{escape(side)}</b>{verdict}</figcaption>"
        f"{findings}{note}</figure>"
    )


def _section(title: str, content: str, level: int = 2) -> str:
    return f"<section><h{level}>{escape(title)}</h{level}>{content}</section>"


def _words(name: str) -> str:
    return name.replace("_", " ")


def _is_share(name: str) -> bool:
    return any(word in name for word in PERCENT_WORDS)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _json(value: Any) -> str:
    return json.dumps(plain_numbers(value), indent=2, allow_nan=False)


def plain_numbers(value: Any) -> Any:
    """As JSON can hold it: NaN and infinity, which browsers refuse, are null."""
    if isinstance(value, Mapping):
        return {str(key): plain_numbers(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain_numbers(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)
