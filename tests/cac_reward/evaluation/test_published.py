"""Answers of other systems, read by the rules of their own evaluation."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest

from cac_reward.evaluation.published import (
    CLASSES,
    grounded_window,
    named_class,
    option_letter,
    read_inline,
    read_skyra,
    read_vau_r1,
)
from cac_reward.report import Box, TimeWindow


@pytest.mark.parametrize(
    ("text", "window"),
    [
        ("<think>at [1, 2]</think><answer>Anomaly</answer><glue>[3.5, 7]</glue>", (3.5, 7.0)),
        ("<glue>(0.5 s, 2 s)</glue>", (0.5, 2.0)),
        ("<glue>[01:05, 1:10.5]</glue>", (65.0, 70.5)),
        ("<glue>[1:00:00, 1:00:02]</glue>", (3600.0, 3602.0)),
        ("<glue>['0:05', '65']</glue>", (5.0, 65.0)),
        ("it happens within [0.5,1.2] or [3,4]", (0.5, 1.2)),
        # The published search does not look over a line's end; the brackets are found all the same.
        ("<glue>\n[2, 3]\n</glue>", (2.0, 3.0)),
        ("<glue>[-0.5, 3]</glue>", (0.0, 3.0)),
        ("<glue>[-1.0, -1.0]</glue>", None),
        ("<glue>[4, 4]</glue>", None),
        ("<glue>[5, 4]</glue>", None),
        ("<glue>none</glue>", None),
        ("<glue>[1, 2, 3]</glue>", None),
        ("<glue>[1.2.3, 4]</glue>", None),
        ("<glue>[, 4]</glue>", None),
        ("nothing happens", None),
    ],
)
def test_an_interval_is_found_as_vau_r1_finds_it(
    text: str, window: tuple[float, float] | None
) -> None:
    assert grounded_window(text) == (None if window is None else TimeWindow(*window))


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("<think>maybe A</think><answer> b </answer>", "B"),
        ("so <C/>", "C"),
        ("<THINK>A or B</THINK> It is D. Not C", "C"),
        ("first A, then (B)", "B"),
        ("<think>A</think> Because", "A"),
        ("D", "D"),
        ("Bad E", None),
        ("", None),
    ],
)
def test_a_letter_is_found_as_vau_r1_finds_it(text: str, letter: str | None) -> None:
    assert option_letter(text) == letter


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("<think>Fire!</think><answer>people  falling</answer>", "People_falling"),
        ("a TRAFFICACCIDENT or a fire", "Traffic_accident"),
        ("<answer>food_safety", "Food Safety"),
        ("<think>Robbery</think><answer>nothing</answer>", None),
        ("Fireworks, Abnormal", None),
    ],
)
def test_a_class_is_found_as_vau_r1_finds_it(text: str, name: str | None) -> None:
    assert named_class(text) == name


def test_there_are_twenty_classes() -> None:
    assert len(set(CLASSES)) == 20
    assert all(named_class(f"<answer>{one}</answer>") == one for one in CLASSES)


def write_csv(path: Path, *rows: dict[str, str]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as opened:
        table = csv.DictWriter(opened, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    return path


def test_the_files_of_four_tasks_make_one_prediction(tmp_path: Path) -> None:
    tag = write_csv(
        tmp_path / "tag.csv",
        {"Video Name": "a", "Temporal Grounding": "<answer>Anomaly</answer><glue>[1, 2]</glue>"},
        {"Video Name": "a.mp4", "Temporal Grounding": "<glue>[5, 6]</glue>"},
        {
            "Video Name": "b.mp4",
            "Temporal Grounding": "<answer>Normal</answer><glue>[-1,0]</glue>",
        },
        {"Video Name": "c.mp4", "Temporal Grounding": "no idea"},
        {"Video Name": "d.mp4", "Temporal Grounding": "[0, 3]"},
    )
    cls = write_csv(
        tmp_path / "cls.csv",
        {"Video Name": "a.mp4", "CLS answer": "Normal"},
        {"Video Name": "d.mp4", "CLS answer": "<answer>Fire</answer>"},
    )
    qa = write_csv(tmp_path / "qa.csv", {"Video Name": "a.mp4", "QA answer": "C"})
    prose = write_csv(
        tmp_path / "text.csv",
        {"Video Name": "a.mp4", "Description": "A man\nruns.", "Analysis": "He flees."},
        {"Video Name": "e.mp4", "Description": "", "Analysis": " "},
    )
    found = read_vau_r1([tag, cls, qa, prose])
    assert set(found) == {"a.mp4", "b.mp4", "c.mp4", "d.mp4", "e.mp4"}
    a = found["a.mp4"]
    assert a.judge == "tag, cls, qa, text"
    assert [one.window for one in a.findings] == [TimeWindow(1, 2)]
    assert (a.verdict, a.category, a.option, a.located) == ("anomalous", "Normal", "C", True)
    assert a.text == "Description: A man\nruns.\nAnalysis: He flees."
    # Nobody asked for boxes or for what the fault is.
    assert (a.boxes_asked, a.types_asked) == (False, False)
    assert (found["b.mp4"].p_clean, found["b.mp4"].findings) == (1.0, ())
    c = found["c.mp4"]
    assert (c.p_clean, c.located, c.findings) == (None, True, ())
    assert c.failure == "nothing in 'no idea'"
    # An interval without a verdict has that of the class, where there is one.
    assert (found["d.mp4"].verdict, found["d.mp4"].failure) == ("anomalous", None)
    assert found["e.mp4"].text is None


def test_answers_that_name_nothing_are_failures(tmp_path: Path) -> None:
    file = write_csv(
        tmp_path / "x.csv",
        {"Video Name": "a.mp4", "CLS answer": "hm", "QA answer": "A"},
        {"Video Name": "b.mp4", "CLS answer": "Normal", "QA answer": ""},
    )
    found = read_vau_r1([file])
    assert found["a.mp4"].failure == "no class in 'hm'"
    assert found["b.mp4"].failure == "no option in ''"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Video Name,Answer\na,b\n", "one of the columns Temporal Grounding, CLS answer"),
        ("Video Name,QA answer\n", "predictions must have one of the columns"),
        ("Name,QA answer\na,b\n", "predictions must have the columns Video Name"),
        ("Video Name,QA answer\n,b\n", "name a video, got none in .*, line 2"),
    ],
)
def test_other_tables_are_refused(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "x.csv"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_vau_r1([file])


def test_two_files_must_not_answer_the_same(tmp_path: Path) -> None:
    one, other = tmp_path / "1.csv", tmp_path / "2.csv"
    for path in (one, other):
        path.write_text("Video Name,QA answer\na.mp4,B\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"QA answer of a\.mp4 must be in one file"):
        read_vau_r1([one, other])


FAKE = (
    "<think>The <type>Shape Distortion</type> in <t>[0.5, 1.5]</t> at <bbox>[.2, 0, .4, 1]</bbox>,"
    " <type>Camera Motion Inconsistency</type> in <t>[1.0s, 2s]</t> at <bbox>[0, 0, 0, 0]</bbox>, "
    "<type>Odd\nThing</type> in <t>[2, 3]</t>, "
    "<type>Shape Distortion</type> in <t>[2, 1]</t> at <bbox>[0, 0, 1, 1]</bbox>, "
    "<type>Shape Distortion</type> in <t>[3, 4]</t> at <bbox>[0.5, 0, 0.4, 1]</bbox>"
    "</think><answer>Fake</answer>"
)


def test_inline_findings_are_read_and_what_is_none_is_counted() -> None:
    found = read_inline(FAKE)
    assert (found.p_clean, found.located, found.failure) == (0.0, True, None)
    assert (found.boxes_asked, found.types_asked) == (True, True)
    assert [one.window for one in found.findings] == [
        TimeWindow(0.5, 1.5),
        TimeWindow(1, 2),
        TimeWindow(2, 3),
        TimeWindow(3, 4),
    ]
    assert [one.boxes for one in found.findings] == [(Box(1.0, 0.2, 0, 0.4, 1),), (), (), ()]
    assert found.findings[0].type == found.findings[3].type == "deformation"
    assert found.findings[2].type == "Odd Thing"
    assert (found.windows_unusable, found.boxes_written, found.boxes_invalid) == (1, 2, 1)


def test_what_a_real_clip_cleared_is_no_finding() -> None:
    found = read_inline(FAKE.replace("<answer>Fake", "<answer>It is Real"))
    assert (found.p_clean, found.findings, found.boxes_written) == (1.0, (), 0)
    lost = read_inline("<think>so</think> Fake")
    assert (lost.p_clean, lost.located) == (None, False)
    assert lost.failure == "no verdict in '<think>so</think> Fake'"


def skyra(**changes: Any) -> dict[str, Any]:
    values = {"video_id": "kling-v1/v1", "mllm_model_name": "Skyra", "response": FAKE, "gt": "Fake"}
    return {**values, **changes}


def test_skyras_list_is_read(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    file.write_text(json.dumps([skyra(), skyra(video_id="real/v1", response="")]), "utf-8")
    found = read_skyra([file])
    assert list(found) == ["kling-v1/v1", "real/v1"]
    assert found["kling-v1/v1"].judge == "Skyra"
    assert len(found["kling-v1/v1"].findings) == 4
    assert found["real/v1"].failure == "no verdict in ''"


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([skyra(), skyra()], r"line 1: video_id must be there once, got 'kling-v1/v1' again"),
        ([skyra(video_id=3)], "video_id must be text, got 3"),
        ([skyra(response=None)], "response must be text, got None"),
        ([3], "answer must be an object, got 3"),
    ],
)
def test_other_lists_are_refused(tmp_path: Path, rows: list[Any], message: str) -> None:
    file = tmp_path / "out.json"
    file.write_text(json.dumps(rows), "utf-8")
    with pytest.raises(ValueError, match=message):
        read_skyra([file])


def test_an_answer_that_is_not_utf8_is_named_by_its_line(tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    text = json.dumps([skyra(), skyra(video_id="b", response="Fake @")], indent=1)
    file.write_bytes(text.encode().replace(b"@", b"\xe9"))
    with pytest.raises(ValueError, match=r"line \d+: column 'response': text must be UTF-8, got b"):
        read_skyra([file])
