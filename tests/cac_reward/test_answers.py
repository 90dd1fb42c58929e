"""The judge's text: what is written is read back, and nothing else is."""

import json
import pickle
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cac_reward.answers import (
    AnswerError,
    parse_findings,
    parse_scan_answer,
    parse_tool_call,
    read_thousandths,
    write_findings,
    write_scan_answer,
    write_thousandths,
    write_tool_call,
)
from cac_reward.report import Box, Finding, TimeWindow

DURATION = 6.0
LINE = st.text(st.characters(exclude_categories=["Cc", "Cs", "Zl", "Zp"]), max_size=30)
GOOD_CALL = write_tool_call([TimeWindow(0.25, 1.0)])
GOOD_FINDING = Finding(
    "vanish",
    TimeWindow(0.25, 1.0),
    (Box(0.25, 0.312, 0.25, 0.64, 0.588),),
    2,
    "red circle vanishes",
)
GOOD_ANSWER = write_findings([GOOD_FINDING])


@st.composite
def written_windows(draw: Any) -> TimeWindow:
    """Windows on the grid of 0.01 s that answers are written in."""
    start = draw(st.integers(0, 599))
    return TimeWindow(start / 100, draw(st.integers(start + 1, 600)) / 100)


@st.composite
def written_findings(draw: Any) -> Finding:
    window = draw(written_windows())
    hundredths = st.integers(round(window.start_seconds * 100), round(window.end_seconds * 100))
    boxes = []
    for _ in range(draw(st.integers(0, 3))):
        x1, y1 = draw(st.integers(0, 999)), draw(st.integers(0, 999))
        x2, y2 = draw(st.integers(x1 + 1, 1000)), draw(st.integers(y1 + 1, 1000))
        boxes.append(Box(draw(hundredths) / 100, x1 / 1000, y1 / 1000, x2 / 1000, y2 / 1000))
    kind = draw(LINE.filter(str.strip))
    return Finding(kind, window, tuple(boxes), draw(st.sampled_from((1, 2, 3))), draw(LINE))


def test_the_tool_call_is_the_protocol_to_the_letter() -> None:
    assert GOOD_CALL == (
        '<tool_call>\n{"name": "inspect", "arguments": {"windows": [[0.25, 1.00]]}}\n</tool_call>'
    )
    assert write_scan_answer([]) == "Verdict: clean"
    assert write_scan_answer([TimeWindow(0.25, 1.0)]) == GOOD_CALL


def test_the_findings_are_the_protocol_to_the_letter() -> None:
    assert GOOD_ANSWER == (
        '{"findings": [{"type": "vanish", "window": [0.25, 1.00], "boxes": '
        '[{"time": 0.25, "box": [312, 250, 640, 588]}], "severity": 2, '
        '"why": "red circle vanishes"}]}\nVerdict: anomalous'
    )
    assert write_findings([]) == '{"findings": []}\nVerdict: clean'


@settings(max_examples=100, deadline=None)
@given(st.lists(written_windows(), min_size=1, max_size=6))
def test_windows_make_the_round_trip(windows: list[TimeWindow]) -> None:
    assert parse_tool_call(write_tool_call(windows), DURATION) == tuple(windows)
    assert parse_scan_answer(write_scan_answer(windows), DURATION) == tuple(windows)


@settings(max_examples=100, deadline=None)
@given(st.lists(written_findings(), max_size=4))
def test_findings_make_the_round_trip(findings: list[Finding]) -> None:
    text = write_findings(findings)
    assert text.count("\n") == 1
    assert parse_findings(text, DURATION) == tuple(findings)
    assert parse_findings(text.partition("\n")[0], DURATION) == tuple(findings)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 47), st.integers(1, 48), st.sampled_from([8.0, 16.0, 23.976, 24.0, 30.0]))
def test_windows_of_frames_cover_the_same_frames_once_read(
    first: int, last: int, fps: float
) -> None:
    stop = max(first + 1, last)
    window = TimeWindow(first / fps, stop / fps)
    (read,) = parse_tool_call(write_tool_call([window]), 48 / fps)
    assert read.frame_indices(48, fps) == range(first, stop)


def test_a_window_of_no_length_on_paper_gets_one() -> None:
    text = write_tool_call([TimeWindow(1.001, 1.002), TimeWindow(0.994, 0.996)])
    assert "[[1.00, 1.01], [0.99, 1.00]]" in text


def test_boxes_follow_the_family() -> None:
    def write(box: tuple[float, float, float, float]) -> list[int]:
        return [round(value * 64) for value in box]

    def read(numbers: list[float]) -> tuple[float, float, float, float]:
        x1, y1, x2, y2 = (number / 64 for number in numbers)
        return (x1, y1, x2, y2)

    finding = Finding("text", TimeWindow(0, 1), (Box(0.5, 0.25, 0.5, 0.75, 1.0),))
    text = write_findings([finding], box_writer=write)
    assert '"box": [16, 32, 48, 64]' in text
    assert parse_findings(text, 1.0, box_reader=read) == (finding,)
    with pytest.raises(AnswerError, match="box must have 0 <= x1 < x2 <= 1"):
        parse_findings(text.replace("48", "65"), 1.0, box_reader=read)


@settings(max_examples=100, deadline=None)
@given(st.tuples(*[st.floats(0, 1)] * 4))
def test_thousandths_always_make_a_box(numbers: tuple[float, float, float, float]) -> None:
    x1, x2 = sorted((numbers[0], numbers[2]))
    y1, y2 = sorted((numbers[1], numbers[3]))
    written = write_thousandths((x1, y1, x2, y2))
    read = Box(0.0, *read_thousandths([float(number) for number in written]))
    worst = max(abs(a - b) for a, b in zip(read.coordinates, (x1, y1, x2, y2)))
    assert worst <= 0.0015


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must be one <tool_call> ... </tool_call> and nothing else"),
        ("Verdict: clean", "must be one <tool_call>"),
        (GOOD_CALL[:-1], "must be one <tool_call>"),
        ("I see. " + GOOD_CALL, "must be one <tool_call>"),
        (GOOD_CALL + GOOD_CALL, "must be JSON"),
        ("<tool_call></tool_call>", r"must be JSON \(Expecting value at character 0\)"),
        (GOOD_CALL.replace("}}", "}"), "must be JSON"),
        (GOOD_CALL.replace("inspect", "delete"), 'must call the tool "inspect"'),
        (
            GOOD_CALL.replace('"name"', '"nome"'),
            "call must be an object with exactly the keys name",
        ),
        (GOOD_CALL.replace("windows", "window"), "arguments must be an object with exactly"),
        (GOOD_CALL.replace("[[0.25, 1.00]]", "[]"), "windows must be a list of 1 to 16 entries"),
        (GOOD_CALL.replace("[[0.25, 1.00]]", "{}"), "windows must be a list of 1 to 16 entries"),
        (write_tool_call([TimeWindow(0, 1)] * 17), "windows must be a list of 1 to 16 entries"),
        (GOOD_CALL.replace("[0.25, 1.00]", "[0.25]"), "window must be a list of 2 to 2 entries"),
        (GOOD_CALL.replace("1.00", "0.25"), "window must have 0 <= start < end"),
        (GOOD_CALL.replace("0.25", "-0.25"), "window must have 0 <= start < end"),
        (GOOD_CALL.replace("1.00", "6.02"), r"window must lie within the clip's 6.00 s"),
        (GOOD_CALL.replace("0.25, 1.00", "6.00, 6.01"), r"window must lie within the clip's 6"),
        (GOOD_CALL.replace("1.00", '"1.00"'), "window must be a number;"),
        (GOOD_CALL.replace("1.00", "true"), "window must be a number;"),
        (GOOD_CALL.replace("1.00", "NaN"), "must hold finite numbers, got NaN"),
        (GOOD_CALL.replace("1.00", "-Infinity"), "must hold finite numbers, got -Infinity"),
        (GOOD_CALL.replace("1.00", "1e999"), "window must be a number of ordinary size"),
        (GOOD_CALL.replace("1.00", "9" * 400), "window must be a number of ordinary size"),
        (GOOD_CALL.replace("1.00", "9" * 5000), "integer string conversion"),
        (GOOD_CALL.replace("[[0.25, 1.00]]", "[" * 5000), "must be JSON of little depth"),
        (GOOD_CALL.replace('"name"', '"name": "inspect", "name"'), "the same key twice"),
        (" " * 20_000 + GOOD_CALL, "must have at most 20000 characters, got"),
    ],
)
def test_a_wrong_tool_call_is_refused(text: str, message: str) -> None:
    assert parse_tool_call(GOOD_CALL, DURATION) == (TimeWindow(0.25, 1.0),)
    with pytest.raises(AnswerError, match=r"(?s)^tool call: .*" + message):
        parse_tool_call(text, DURATION)


LINE_ONLY = GOOD_ANSWER.partition("\n")[0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "must be JSON"),
        ("Verdict: clean", "must be JSON"),
        (LINE_ONLY[:-1], "must be JSON"),
        ("```json\n" + LINE_ONLY, "must be one line of JSON, then 'Verdict: clean' or"),
        (LINE_ONLY + "\nVerdict: fine", "must be one line of JSON, then"),
        (LINE_ONLY + "\nVerdict: anomalous\nVerdict: clean", "must be one line of JSON, then"),
        (LINE_ONLY + "\nVerdict: clean", "verdict 'clean' contradicts its 1 findings"),
        ('{"findings": []}\nVerdict: anomalous', "verdict 'anomalous' contradicts its 0 findings"),
        ("[]", "answer must be an object with exactly the keys findings"),
        ('{"findings": {}}', "findings must be a list of 0 to 64 entries"),
        ('{"findings": [3]}', "finding must be an object with exactly the keys type, window"),
        (LINE_ONLY.replace('"why"', '"because"'), "finding must be an object with exactly"),
        (LINE_ONLY.replace("312", "1001"), "box must be in thousandths of the frame"),
        (LINE_ONLY.replace("312", "-1"), "box must be in thousandths of the frame"),
        (LINE_ONLY.replace("312", "640"), "box must have 0 <= x1 < x2"),
        (LINE_ONLY.replace("312", '"312"'), "box must be a number"),
        (LINE_ONLY.replace("312, ", ""), "box must be a list of 4 to 4 entries"),
        (LINE_ONLY.replace('"box"', '"bbox"'), "box must be an object with exactly the keys time"),
        (LINE_ONLY.replace('"time": 0.25', '"time": 3.0'), "box time must be inside its window"),
        (LINE_ONLY.replace('"time": 0.25', '"time": null'), "time must be a number"),
        (LINE_ONLY.replace("2, ", "4, "), "severity must be one of"),
        (LINE_ONLY.replace("2, ", "2.0, "), "severity must be an integer, got 2.0"),
        (LINE_ONLY.replace('"vanish"', "7"), "type must be text, got 7"),
        (LINE_ONLY.replace('"vanish"', '""'), "type must name the kind of fault"),
        (LINE_ONLY.replace('"red circle vanishes"', "null"), "why must be text, got None"),
        (LINE_ONLY.replace("red circle", "\\ud800"), "why must be one printable line"),
        (LINE_ONLY.replace("red circle", "two\\nlines"), "why must be one printable line"),
        (LINE_ONLY.replace("red circle", "x" * 1000), "why must have at most 1000 characters"),
        (LINE_ONLY.replace("1.00", "7.00"), "window must lie within the clip's 6.00 s"),
    ],
)
def test_wrong_findings_are_refused(text: str, message: str) -> None:
    assert parse_findings(GOOD_ANSWER, DURATION) == (GOOD_FINDING,)
    with pytest.raises(AnswerError, match=r"(?s)^findings: .*" + message):
        parse_findings(text, DURATION)


def test_only_known_kinds_where_they_are_given() -> None:
    assert parse_findings(GOOD_ANSWER, DURATION, types=["vanish", "freeze"]) == (GOOD_FINDING,)
    with pytest.raises(AnswerError, match="findings: type must be one of freeze, flicker; the"):
        parse_findings(GOOD_ANSWER, DURATION, types=["freeze", "flicker"])
    with pytest.raises(AnswerError, match="type must be one of freeze"):
        parse_findings(LINE_ONLY.replace('"vanish"', "[]"), DURATION, types=["freeze"])


def test_the_other_turn_s_answers_are_told_apart() -> None:
    assert parse_scan_answer(" Verdict: clean\n", DURATION) == ()
    with pytest.raises(AnswerError, match="tool call: must be one <tool_call>"):
        parse_scan_answer("Verdict: anomalous", DURATION)
    with pytest.raises(
        ValueError, match="windows must hold at least one window, got none; a clean"
    ):
        write_tool_call([])


def test_an_error_quotes_at_most_200_characters_and_travels_between_processes() -> None:
    with pytest.raises(AnswerError, match="the answer was ") as caught:
        parse_findings("~" * 5000, DURATION)
    assert str(caught.value).count("~") == 200
    again = pickle.loads(pickle.dumps(caught.value))
    assert type(again) is AnswerError
    assert str(again) == str(caught.value)


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=80))
@example("<tool_call>\ud800</tool_call>")
@example('{"findings": [{}]}')
def test_hostile_text_is_an_answer_error_and_nothing_else(text: str) -> None:
    for parse in (parse_tool_call, parse_findings):
        with pytest.raises(AnswerError, match="the answer was"):
            parse(text, DURATION)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["type", "window", "boxes", "time", "box"]), inner)
    ),
    max_leaves=8,
)
PLACES = ("type", "window", "boxes", "severity", "why")


def read_or_refused(parse: Callable, text: str) -> tuple:
    """What was read, nothing where the text was refused; any other error is a failure."""
    try:
        return parse(text, DURATION)
    except AnswerError:
        return ()


@settings(max_examples=100, deadline=None)
@given(JSON_VALUES, st.sampled_from(PLACES))
def test_hostile_values_are_an_answer_error_or_a_finding(value: object, place: str) -> None:
    record = json.loads(LINE_ONLY)["findings"][0]
    text = json.dumps({"findings": [{**record, place: value}]})
    for finding in read_or_refused(parse_findings, text):
        assert finding.window.end_seconds <= DURATION + 0.02


@settings(max_examples=100, deadline=None)
@given(
    st.sampled_from([GOOD_CALL, GOOD_ANSWER]),
    st.integers(0, 200),
    st.integers(0, 20),
    st.text(max_size=6),
)
def test_damaged_answers_are_read_whole_or_refused(
    good: str, place: int, length: int, patch: str
) -> None:
    text = good[:place] + patch + good[place + length :]
    parse = parse_tool_call if good is GOOD_CALL else parse_findings
    assert all(isinstance(one, TimeWindow | Finding) for one in read_or_refused(parse, text))


@pytest.mark.parametrize("place", PLACES)
def test_an_error_about_a_huge_value_stays_short(place: str) -> None:
    record = json.loads(LINE_ONLY)["findings"][0]
    text = json.dumps({"findings": [{**record, place: [["x" * 5000]] * 3}]})
    with pytest.raises(AnswerError, match="findings: ") as caught:
        parse_findings(text, DURATION)
    assert len(str(caught.value)) < 500
