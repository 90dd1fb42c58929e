"""An evaluation for programs (JSON), documents (Markdown), a browser and a terminal."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path

from cac_reward.evaluation.intervals import Estimate
from cac_reward.evaluation.measuring import Evaluation, Measurement
from cac_reward.page_assets import STYLE
from cac_reward.whole_files import whole_file

SCHEMA_VERSION = 2
_HEAD = ("measure", "value", "interval", "clips")
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"
_BAR_STYLE = """
table { border-collapse: collapse; margin: 16px 0; background: var(--paper); }
th, td { text-align: left; padding: 4px 14px; border-bottom: 1px solid var(--rule); }
td { font-variant-numeric: tabular-nums; }
.bar { position: relative; width: 220px; height: 12px; background: var(--track); }
.bar i { position: absolute; height: 4px; top: 4px; background: var(--asked); }
.bar b { position: absolute; height: 12px; width: 3px; margin-left: -1px;
  background: var(--accent); }
"""


def write_json(path: str | Path, evaluation: Evaluation) -> None:
    """Write everything, whole or not at all; a number that there is none of is null."""
    protocol = evaluation.protocol
    plain = {
        "schema_version": SCHEMA_VERSION,
        "protocol": None if protocol is None else asdict(protocol),
        "judges": list(evaluation.judges),
        "counts": dict(evaluation.counts),
        "settings": dict(evaluation.settings),
        "measures": {one.name: _plain(one) for one in evaluation.measurements},
    }
    with whole_file(path) as opened:
        opened.write(json.dumps(plain, allow_nan=False, indent=1) + "\n")


def write_markdown(path: str | Path, evaluation: Evaluation) -> None:
    """Write the measures and the counts as two tables, whole or not at all."""
    with whole_file(path) as opened:
        opened.write(markdown(evaluation))


def markdown(evaluation: Evaluation) -> str:
    """The measures that have a value and the counts, as two tables with a line above."""
    lines = [f"# {_cell(_title(evaluation))}", ""]
    lines += [_interval_words(evaluation), ""]
    for words, listed in _tables(evaluation):
        lines += [_cell(words), ""] if words else []
        lines += [_row(_HEAD), _row(["---"] * len(_HEAD))]
        lines += [_row([_cell(cell) for cell in _words(one)]) for one in listed]
        lines += [""]
    lines += [f"* {_cell(rule)}" for rule in _rules(evaluation)]
    lines += ["", _row(["clips", "number"]), _row(["---"] * 2)]
    lines += [_row([name, str(count)]) for name, count in evaluation.counts.items()]
    missing = without_value(evaluation)
    if missing:
        lines += ["", "Without a value: " + _cell(", ".join(missing)) + "."]
    return "\n".join(lines) + "\n"


def write_html(path: str | Path, evaluation: Evaluation) -> None:
    """Write a page with the same tables, whole or not at all.

    Measures from 0 to 1 are drawn: a mark at the value, a line over the interval. The page has no
    script and fetches nothing; every name in it is escaped.
    """
    title = _title(evaluation)
    head = "".join(f"<th>{name}</th>" for name in (*_HEAD, "0 to 1"))
    body = "".join(
        (f"<p>{escape(words)}</p>" if words else "")
        + f"<table><thead><tr>{head}</tr></thead><tbody>{_body(listed)}</tbody></table>\n"
        for words, listed in _tables(evaluation)
    )
    rules = "".join(f"<li>{escape(rule)}</li>" for rule in _rules(evaluation))
    counts = "".join(
        f"<tr><td>{escape(name)}</td><td>{count}</td></tr>"
        for name, count in evaluation.counts.items()
    )
    missing = ", ".join(without_value(evaluation))
    with whole_file(path) as opened:
        opened.write(
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">\n'
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f"<title>{escape(title)}</title><style>{STYLE}{_BAR_STYLE}</style></head>\n"
            f"<body><main><h1>{escape(title)}</h1>\n"
            f'<p class="summary">{escape(_interval_words(evaluation))}</p>\n'
            + body
            + (f"<ul>{rules}</ul>\n" if rules else "")
            + f"<table><tbody>{counts}</tbody></table>\n"
            + (f"<p>Without a value: {escape(missing)}.</p>\n" if missing else "")
            + "</main></body></html>\n"
        )


def table(evaluation: Evaluation) -> str:
    """The same for a terminal, without the rules of the benchmark."""
    tables = [(words, [_words(one) for one in listed]) for words, listed in _tables(evaluation)]
    every = [_HEAD, *(row for _, listed in tables for row in listed)]
    widths = [max(len(row[column]) for row in every) for column in range(len(_HEAD))]
    lines: list[str] = []
    for words, listed in tables:
        lines += ([""] if lines else []) + ([words] if words else [])
        lines += [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in (_HEAD, *listed)
        ]
    lines += ["", *(f"{count:>8}  {name}" for name, count in evaluation.counts.items())]
    missing = without_value(evaluation)
    if missing:
        lines += ["", f"without a value: {', '.join(missing)}"]
    return "\n".join([*lines, "", _interval_words(evaluation)])


def _title(evaluation: Evaluation) -> str:
    protocol = evaluation.protocol
    title = f"Evaluation of {', '.join(evaluation.judges) or 'no judge'}"
    return title if protocol is None else f"{title} on {protocol.benchmark}"


def _tables(evaluation: Evaluation) -> list[tuple[str, list[Measurement]]]:
    """A line of words and the measures that have a value: the benchmark's figures, the others."""
    shown = [one for one in evaluation.measurements if not math.isnan(one.estimate.value)]
    protocol = evaluation.protocol
    if protocol is None:
        return [("", shown)]
    head = [one for one in shown if one.name in protocol.head]
    about = f"{protocol.benchmark}, split {protocol.split} ({protocol.source})"
    return [(about, head), ("Everything else", [one for one in shown if one not in head])]


def _rules(evaluation: Evaluation) -> tuple[str, ...]:
    return () if evaluation.protocol is None else evaluation.protocol.rules


def _words(one: Measurement) -> tuple[str, str, str, str]:
    """Name, value, interval and number of clips."""
    return one.name, f"{one.estimate.value:.4f}", _interval(one.estimate), str(one.num_clips)


def _body(listed: Sequence[Measurement]) -> str:
    return "".join(
        "<tr>"
        + "".join(f"<td>{escape(cell)}</td>" for cell in _words(one))
        + f"<td>{_bar(one)}</td></tr>"
        for one in listed
    )


def without_value(evaluation: Evaluation) -> list[str]:
    """Names of the measures that nothing was there for, those of the benchmark first."""
    known = {one.name: one.estimate.value for one in evaluation.measurements}
    head = evaluation.protocol.head if evaluation.protocol else ()
    every = dict.fromkeys([*head, *known])
    return [name for name in every if math.isnan(known.get(name, math.nan))]


def _bar(one: Measurement) -> str:
    """The value and its interval on a line from 0 to 1; what has no such range has none."""
    if one.name.startswith(("cost.", "vau_eval.")):
        return ""
    estimate = one.estimate
    spread = ""
    if not math.isnan(estimate.low):
        width = 100 * (estimate.high - estimate.low)
        spread = f'<i style="left:{100 * estimate.low:.2f}%;width:{width:.2f}%"></i>'
    return f'<div class="bar">{spread}<b style="left:{100 * estimate.value:.2f}%"></b></div>'


def _interval(estimate: Estimate) -> str:
    return "" if math.isnan(estimate.low) else f"{estimate.low:.4f} to {estimate.high:.4f}"


def _interval_words(evaluation: Evaluation) -> str:
    settings = evaluation.settings
    if not settings["draws"]:
        return "No intervals were asked for."
    return (
        f"Intervals hold {settings['level']:.0%} of {settings['draws']:.0f} bootstrap draws over "
        f"{settings['recordings']:.0f} recordings (seed {settings['seed']:.0f})."
    )


def _plain(one: Measurement) -> dict[str, object]:
    numbers = {"value": one.estimate.value, "low": one.estimate.low, "high": one.estimate.high}
    plain: dict[str, object] = {
        name: None if math.isnan(value) else value for name, value in numbers.items()
    }
    return {**plain, "clips": one.num_clips}


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _cell(text: str) -> str:
    """Names of types and judges come from outside and must stay inside their cell."""
    kept = "".join(character if character.isprintable() else " " for character in text)
    return kept.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
