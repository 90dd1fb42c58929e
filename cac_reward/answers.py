"""The judge's text to windows and findings, and back: the only parser, and it is strict.

What does not follow the protocol to the letter is an `AnswerError`; nothing is guessed or mended.
The writers are what trainers teach a judge to say, and `parse(write(x))` gives x with times
rounded to 0.01 s and boxes to the judge's grid.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence

from cac_reward.questions import CLEAN_ANSWER, TOOL_CALL_END, TOOL_CALL_PREFIX, VERDICT_PREFIX
from cac_reward.report import TIME_TOLERANCE, VERDICTS, Box, Finding, TimeWindow

Coordinates = tuple[float, float, float, float]
"""x1, y1, x2, y2 relative to the frame."""
BoxWriter = Callable[[Coordinates], list[int]]
"""Relative coordinates to the numbers that a model family writes."""
BoxReader = Callable[[list[float]], Coordinates]
"""The inverse; raises ValueError for numbers that are no box."""

CALL_TAGS: Mapping[str, Sequence[tuple[str, str]]] = {
    "json": ((TOOL_CALL_PREFIX, TOOL_CALL_END),),
    "xml": (
        (TOOL_CALL_PREFIX, TOOL_CALL_END),
        ("<function=inspect>", "</function>"),
        ("<parameter=windows>", "</parameter>"),
    ),
}
"""Ways to write a tool call, by the tags around it: 'json' holds the call's name and arguments in
one object (Qwen2.5 and Qwen3), 'xml' has tags for them and holds the windows alone (Qwen3.5)."""

MAX_ANSWER_CHARACTERS = 20_000
MAX_WINDOWS = 16
MAX_FINDINGS = 64
MAX_BOXES = 256
_QUOTED_CHARACTERS = 200


class AnswerError(ValueError):
    """A judge's answer that does not follow the protocol; the clip gets no score."""


def write_thousandths(coordinates: Coordinates) -> list[int]:
    """Write a box as integers from 0 to 1000, at least 1 wide and high (Qwen3-VL's convention).

    Example:
        >>> write_thousandths((0.312, 0.25, 0.64, 0.588))
        [312, 250, 640, 588]
    """
    x1, x2 = _integer_span(coordinates[0], coordinates[2], 1000)
    y1, y2 = _integer_span(coordinates[1], coordinates[3], 1000)
    return [x1, y1, x2, y2]


def read_thousandths(numbers: list[float]) -> Coordinates:
    """Read a box written as numbers from 0 to 1000.

    Raises:
        ValueError: If a number is outside that range.
    """
    if not all(0 <= number <= 1000 for number in numbers):
        raise ValueError(f"box must be in thousandths of the frame, 0 to 1000, got {numbers}")
    x1, y1, x2, y2 = (number / 1000 for number in numbers)
    return (x1, y1, x2, y2)


def pixel_writer(height: int, width: int) -> BoxWriter:
    """How boxes are written in pixels of a frame of this size, as it is shown (Qwen2.5-VL).

    Example:
        >>> pixel_writer(56, 280)((0.25, 0.5, 0.5, 1.0))
        [70, 28, 140, 56]
    """

    def write(coordinates: Coordinates) -> list[int]:
        x1, x2 = _integer_span(coordinates[0], coordinates[2], width)
        y1, y2 = _integer_span(coordinates[1], coordinates[3], height)
        return [x1, y1, x2, y2]

    return write


def pixel_reader(height: int, width: int) -> BoxReader:
    """The inverse of `pixel_writer`; its reader raises ValueError for a box outside the frame."""

    def read(numbers: list[float]) -> Coordinates:
        x1, y1, x2, y2 = numbers
        if not all(0 <= x <= width for x in (x1, x2)) or not all(
            0 <= y <= height for y in (y1, y2)
        ):
            raise ValueError(
                f"box must be in pixels of a frame {width} wide and {height} high, got {numbers}"
            )
        return (x1 / width, y1 / height, x2 / width, y2 / height)

    return read


def write_tool_call(windows: Sequence[TimeWindow], call_format: str = "json") -> str:
    """Write turn 1's call to see some windows again, in one of the ways of `CALL_TAGS`.

    Raises:
        ValueError: If there are no windows; a clean clip is answered by `write_scan_answer`.

    Example:
        >>> print(write_tool_call([TimeWindow(0.25, 1)], "xml"))
        <tool_call>
        <function=inspect>
        <parameter=windows>
        [[0.25, 1.00]]
        </parameter>
        </function>
        </tool_call>
    """
    if not windows:
        raise ValueError("windows must hold at least one window, got none; a clean clip is no call")
    tags = CALL_TAGS[call_format]
    text = f"[{', '.join(write_window(window) for window in windows)}]"
    if call_format == "json":
        text = f'{{"name": "inspect", "arguments": {{"windows": {text}}}}}'
    for begin, end in reversed(tags):
        text = f"{begin}\n{text}\n{end}"
    return text


def write_scan_answer(windows: Sequence[TimeWindow], call_format: str = "json") -> str:
    """Write turn 1's answer: a clean verdict where nothing is suspicious, a tool call otherwise."""
    return write_tool_call(windows, call_format) if windows else CLEAN_ANSWER


def write_findings(findings: Sequence[Finding], box_writer: BoxWriter = write_thousandths) -> str:
    """Write turn 2's answer: one line of JSON, then the verdict that follows from it.

    Example:
        >>> print(write_findings([]))
        {"findings": []}
        Verdict: clean
    """
    listed = ", ".join(_write_finding(finding, box_writer) for finding in findings)
    verdict = VERDICTS[1] if findings else VERDICTS[0]
    return f'{{"findings": [{listed}]}}\n{VERDICT_PREFIX} {verdict}'


def parse_tool_call(
    text: str, duration_seconds: float, call_format: str = "json"
) -> tuple[TimeWindow, ...]:
    """Read the windows of turn 1's tool call.

    Args:
        text: The whole answer, `<tool_call>` included.
        duration_seconds: Length of the clip; no window may end after it.
        call_format: One of `CALL_TAGS`, the model family's way to write a call.

    Raises:
        AnswerError: If the text is anything but one well-formed call of `inspect`.
    """
    try:
        body = limited(text)
        for begin, end in CALL_TAGS[call_format]:
            body = body.strip()
            if not (body.startswith(begin) and body.endswith(end)):
                raise ValueError(f"must be one {begin} ... {end} and nothing else")
            body = body[len(begin) : -len(end)]
        windows = load_json(body)
        if call_format == "json":
            call = _keys("call", windows, _CALL_KEYS)
            if call["name"] != "inspect":
                raise ValueError('must call the tool "inspect"')
            windows = _keys("arguments", call["arguments"], ("windows",))["windows"]
        return tuple(
            read_window(window, duration_seconds)
            for window in _list("windows", windows, 1, MAX_WINDOWS)
        )
    except ValueError as error:
        raise answer_error("tool call", error, text) from error


def parse_scan_answer(
    text: str, duration_seconds: float, call_format: str = "json"
) -> tuple[TimeWindow, ...]:
    """Read turn 1's answer: no windows for a clean verdict, those of the call otherwise.

    Raises:
        AnswerError: If the text is neither.
    """
    if text.strip() == CLEAN_ANSWER:
        return ()
    return parse_tool_call(text, duration_seconds, call_format)


def parse_findings(
    text: str,
    duration_seconds: float,
    *,
    box_reader: BoxReader = read_thousandths,
    types: Sequence[str] | None = None,
) -> tuple[Finding, ...]:
    """Read turn 2's findings, from its JSON line alone or with the verdict line behind it.

    Args:
        text: `{"findings": [...]}`, optionally followed by a line `Verdict: clean|anomalous`.
        duration_seconds: Length of the clip; no window may end after it.
        box_reader: The model family's box convention.
        types: The kinds of fault allowed, or None for any.

    Raises:
        AnswerError: If the text is anything else, or the verdict contradicts the findings.
    """
    try:
        line, verdict = _split_verdict(limited(text))
        listed = _keys("answer", load_json(line), ("findings",))["findings"]
        findings = tuple(
            _read_finding(one, duration_seconds, box_reader, types)
            for one in _list("findings", listed, 0, MAX_FINDINGS)
        )
        if verdict is not None and verdict != VERDICTS[bool(findings)]:
            raise ValueError(f"verdict {verdict!r} contradicts its {len(findings)} findings")
        return findings
    except ValueError as error:
        raise answer_error("findings", error, text) from error


def limited(text: str) -> str:
    """The text, unless it is longer than any answer may be.

    Raises:
        ValueError: If it has more than `MAX_ANSWER_CHARACTERS`.
    """
    if len(text) > MAX_ANSWER_CHARACTERS:
        raise ValueError(f"must have at most {MAX_ANSWER_CHARACTERS} characters, got {len(text)}")
    return text


def load_json(text: str) -> object:
    """Read JSON without duplicate keys, NaN or infinity.

    Raises:
        ValueError: If it is anything else.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_refuse_constant)
    except json.JSONDecodeError as error:
        raise ValueError(f"must be JSON ({error.msg} at character {error.pos})") from error
    except RecursionError as error:
        raise ValueError("must be JSON of little depth") from error


def write_window(window: TimeWindow) -> str:
    """Write a window as [start, end] in seconds with two decimals, at least 0.01 s long.

    Example:
        >>> write_window(TimeWindow(0.25, 1))
        '[0.25, 1.00]'
    """
    start = f"{window.start_seconds:.2f}"
    end = f"{window.end_seconds:.2f}"
    if float(end) <= float(start):
        end = f"{float(start) + 0.01:.2f}"
    return f"[{start}, {end}]"


def read_window(value: object, duration_seconds: float) -> TimeWindow:
    """Read a window from its value in JSON.

    Raises:
        ValueError: If it is no list of two numbers, or no window of a clip of this length.
    """
    start, end = (_number("window", one) for one in _list("window", value, 2, 2))
    if start >= duration_seconds or end > duration_seconds + 2 * TIME_TOLERANCE:
        raise ValueError(f"window must lie within the clip's {duration_seconds:.2f} s")
    return TimeWindow(start, end)


def answer_error(what: str, error: ValueError, text: str) -> AnswerError:
    """What is wrong with an answer, and how it begins."""
    quote = text[:_QUOTED_CHARACTERS]
    return AnswerError(f"{what}: {error}; the answer was {quote!r}")


_CALL_KEYS = ("name", "arguments")
_FINDING_KEYS = ("type", "window", "boxes", "severity", "why")


def _integer_span(low: float, high: float, grid: int) -> tuple[int, int]:
    """Two different integers of [0, grid] nearest to two relative positions."""
    first, last = round(low * grid), round(high * grid)
    if first < last:
        return first, last
    first = min(first, grid - 1)
    return first, first + 1


def _write_finding(finding: Finding, box_writer: BoxWriter) -> str:
    boxes = ", ".join(
        f'{{"time": {box.time_seconds:.2f}, "box": {json.dumps(box_writer(box.coordinates))}}}'
        for box in finding.boxes
    )
    return (
        f'{{"type": {json.dumps(finding.type, ensure_ascii=False)}, '
        f'"window": {write_window(finding.window)}, "boxes": [{boxes}], '
        f'"severity": {finding.severity}, "why": {json.dumps(finding.why, ensure_ascii=False)}}}'
    )


def _split_verdict(text: str) -> tuple[str, str | None]:
    """The JSON line, and the verdict where a second line carries one."""
    line, newline, rest = text.strip().partition("\n")
    if not newline:
        return line, None
    for verdict in VERDICTS:
        if rest == f"{VERDICT_PREFIX} {verdict}":
            return line, verdict
    raise ValueError("must be one line of JSON, then 'Verdict: clean' or 'Verdict: anomalous'")


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    record = dict(pairs)
    if len(record) != len(pairs):
        raise ValueError("must not say the same key twice")
    return record


def _refuse_constant(name: str) -> object:
    raise ValueError(f"must hold finite numbers, got {name}")


def _keys(what: str, value: object, keys: Sequence[str]) -> dict:
    if not isinstance(value, dict) or set(value) != set(keys):
        raise ValueError(f"{what} must be an object with exactly the keys {', '.join(keys)}")
    return value


def _list(what: str, value: object, least: int, most: int) -> list:
    if not isinstance(value, list) or not least <= len(value) <= most:
        raise ValueError(f"{what} must be a list of {least} to {most} entries")
    return value


def _number(what: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{what} must be a number")
    try:
        number = float(value)
    except OverflowError as error:
        raise ValueError(f"{what} must be a number of ordinary size") from error
    if not math.isfinite(number):
        raise ValueError(f"{what} must be a number of ordinary size")
    return number


def _read_finding(
    value: object, duration_seconds: float, box_reader: BoxReader, types: Sequence[str] | None
) -> Finding:
    record = _keys("finding", value, _FINDING_KEYS)
    if types is not None and record["type"] not in types:
        raise ValueError(f"type must be one of {', '.join(types)}")
    boxes = []
    for one in _list("boxes", record["boxes"], 0, MAX_BOXES):
        entry = _keys("box", one, ("time", "box"))
        numbers = [_number("box", number) for number in _list("box", entry["box"], 4, 4)]
        boxes.append(Box(_number("time", entry["time"]), *box_reader(numbers)))
    return Finding(
        type=record["type"],
        window=read_window(record["window"], duration_seconds),
        boxes=tuple(boxes),
        severity=record["severity"],
        why=record["why"],
    )
