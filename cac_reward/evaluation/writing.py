"""An evaluation for programs (JSON), for documents (Markdown) and for a terminal."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from cac_reward.evaluation.intervals import Estimate
from cac_reward.evaluation.measuring import Evaluation, Measurement
from cac_reward.whole_files import whole_file

SCHEMA_VERSION = 1
_HEAD = ("measure", "value", "interval", "clips")


def write_json(path: str | Path, evaluation: Evaluation) -> None:
    """Write everything, whole or not at all; a number that there is none of is null."""
    plain = {
        "schema_version": SCHEMA_VERSION,
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
    lines = [f"# Evaluation of {_cell(', '.join(evaluation.judges) or 'no judge')}", ""]
    lines += [_interval_words(evaluation), ""]
    lines += [_row(_HEAD), _row(["---"] * len(_HEAD))]
    lines += [_row([_cell(cell) for cell in row]) for row in rows(evaluation)]
    lines += ["", _row(["clips", "number"]), _row(["---"] * 2)]
    lines += [_row([name, str(count)]) for name, count in evaluation.counts.items()]
    missing = without_value(evaluation)
    if missing:
        lines += ["", "Without a value: " + _cell(", ".join(missing)) + "."]
    return "\n".join(lines) + "\n"


def table(evaluation: Evaluation) -> str:
    """The same for a terminal."""
    listed = [_HEAD, *rows(evaluation)]
    widths = [max(len(row[column]) for row in listed) for column in range(len(_HEAD))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in listed
    ]
    lines += ["", *(f"{count:>8}  {name}" for name, count in evaluation.counts.items())]
    missing = without_value(evaluation)
    if missing:
        lines += ["", f"without a value: {', '.join(missing)}"]
    return "\n".join([*lines, "", _interval_words(evaluation)])


def rows(evaluation: Evaluation) -> list[tuple[str, str, str, str]]:
    """Name, value, interval and number of clips of each measure that has a value."""
    return [
        (one.name, f"{one.estimate.value:.4f}", _interval(one.estimate), str(one.num_clips))
        for one in evaluation.measurements
        if not math.isnan(one.estimate.value)
    ]


def without_value(evaluation: Evaluation) -> list[str]:
    """Names of the measures that nothing was there for."""
    return [one.name for one in evaluation.measurements if math.isnan(one.estimate.value)]


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
