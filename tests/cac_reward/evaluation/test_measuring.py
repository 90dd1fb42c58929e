"""The whole evaluation on clips whose measures are counted by hand, and what is missing in it."""

import json
import math
from pathlib import Path

import pytest

from cac_reward.data.annotations import AnnotatedClip
from cac_reward.evaluation.measuring import Evaluation, evaluate
from cac_reward.evaluation.pairing import Pairing, pair_up, read_answers
from cac_reward.evaluation.predictions import Prediction
from cac_reward.evaluation.writing import markdown, table, write_json, write_markdown
from cac_reward.records import ClipRecord
from cac_reward.report import AnomalyReport, Box, Finding, TimeWindow

ROOT = Path("clips")


def finding(start: float, end: float, *boxes: Box, kind: str = "melts") -> Finding:
    return Finding(kind, TimeWindow(start, end), boxes)


def record(path: str, score: float | None, *findings: Finding, **given: object) -> ClipRecord:
    values: dict = {"judge_id": "judge", "fps": 4.0, "num_frames": 8, **given}
    report = AnomalyReport(
        score=score, findings=findings, error=None if score is not None else "no answer", **values
    )
    return ClipRecord(path=path, width=64, height=64, report=report)


def clip(path: str, *findings: Finding, **given: object) -> AnnotatedClip:
    values: dict = {"path": path, "findings": findings, **given}
    return AnnotatedClip(**values)


LEFT = (Box(0.5, 0, 0, 0.5, 1), Box(0.75, 0, 0, 0.5, 1))
CLIPS = [
    clip("a.mp4", finding(0.5, 1.0, *LEFT)),
    clip("b.mp4", finding(0.0, 1.0), finding(1.5, 2.0, kind="flicker")),
    clip("c.mp4", verdict="clean"),
    clip("d.mp4", verdict="clean"),
    clip("e.mp4", finding(0.0, 2.0)),
    clip("f.mp4", finding(0.0, 2.0)),
    clip("g.mp4", verdict="anomalous"),
    clip("h.mp4"),
    clip("i.mp4", verdict="clean"),
]
RECORDS = [
    record("a.mp4", 0.25, finding(0.5, 1.0, Box(0.5, 0, 0, 1, 1)), timings={"scan": 1, "look": 2}),
    record(
        "b.mp4",
        0.25,
        finding(0.0, 0.5),
        tokens={"scan.read": 10, "scan.written": 2, "inspect.read": 20, "inspect.written": 3},
    ),
    record("c.mp4", 0.75, timings={"scan": 1}),
    record("d.mp4", 0.25, finding(0.0, 0.5)),
    record("e.mp4", None, judge_text='"box": [5, 0, 1, 1] "box": [0, 0, 1, 1]'),
    record("f.mp4", 0.75, mode="fast"),
    record("g.mp4", 0.0, tokens={"scan.read": 7, "scan.written": 0}),
    record("h.mp4", 0.0),
    ClipRecord(path="i.mp4", error="not a video"),
]


def paired(clips: list[AnnotatedClip], records: dict[str, ClipRecord]) -> Pairing:
    answered = {path: Prediction.from_record(one) for path, one in records.items()}
    return pair_up(clips, answered, ROOT)


def measured(**options: object) -> Evaluation:
    values: dict = {"draws": 0, **options}
    return evaluate(paired(CLIPS, {one.path: one for one in RECORDS}), **values)


def test_every_measure_is_what_a_person_counts() -> None:
    found = {one.name: one for one in measured().measurements}
    values = {name: one.estimate.value for name, one in found.items()}
    # Judged with a verdict known: a b g right anomalous, f missed, c right clean, d false alarm.
    assert values["clip.accuracy"] == pytest.approx(4 / 6)
    assert values["clip.precision"] == pytest.approx(3 / 4)
    assert values["clip.recall"] == pytest.approx(3 / 4)
    assert values["clip.balanced_accuracy"] == pytest.approx((3 / 4 + 1 / 2) / 2)
    # Against c (0.25) and d (0.75): a 1, 0.5; b the same; g 1, 1; f 0.5, 0.
    assert values["clip.roc_auc"] == pytest.approx(5.5 / 8)
    assert found["clip.accuracy"].num_clips == 6
    assert values["clip.judged"] == pytest.approx(7 / 9)
    # Frames: a 2 of 2 found; b 2 of 6; d 2 false; f 8 at 0.25; c 8 at 0.25; g is not known.
    assert values["frame.precision"] == pytest.approx(4 / 6)
    assert values["frame.recall"] == pytest.approx(4 / 16)
    assert found["frame.recall"].num_clips == 5
    assert values["time.mean_iou"] == pytest.approx((1 + 0.5 / 1.5) / 2)
    assert values["time.recall_at_0.3"] == 1
    assert values["time.recall_at_0.5"] == 0.5
    assert values["time.effective_f1"] == pytest.approx((1 + 2 * 0.5 / 3) / 2)
    assert values["time.count_accuracy"] == 0.5
    assert values["space.box_mean_iou"] == pytest.approx(0.5)
    assert values["space.tube_mean_iou"] == pytest.approx(0.5)
    assert found["space.tube_mean_iou"].num_clips == 1
    assert values["space.invalid_box_rate"] == pytest.approx(1 / 2)
    assert values["type.melts.recall"] == pytest.approx(2 / 3)
    assert values["type.melts.found"] == 1
    assert values["type.flicker.recall"] == 1
    assert values["type.flicker.found"] == 0
    assert values["type.flicker.named"] == 0
    assert values["cost.seconds_per_clip"] == 2
    assert math.isnan(values["question.accuracy"])
    assert math.isnan(values["question.accuracy_of_all"])
    assert math.isnan(values["class.accuracy"])
    assert values["cost.tokens_read_per_clip"] == (30 + 7) / 2
    assert values["cost.tokens_written_per_clip"] == 5 / 2
    assert values["cost.tokens_per_clip"] == (35 + 7) / 2
    assert found["cost.tokens_per_clip"].num_clips == 2


def test_what_is_missing_is_counted() -> None:
    counts = measured().counts
    assert counts["with a prediction"] == 9
    assert counts["anomalous"] == 5
    assert counts["clean"] == 3
    assert counts["verdict not annotated"] == 1
    assert counts["anomalous, windows not annotated"] == 1
    assert counts["not judged: file not readable"] == 1
    assert counts["not judged: answer not usable"] == 1
    assert counts["judged without findings asked (fast)"] == 1


def test_a_fault_under_another_name_is_found_but_not_named() -> None:
    records = {"a.mp4": record("a.mp4", 0.1, finding(0.5, 1.0, kind="flicker"))}
    found = evaluate(paired(CLIPS[:1], records), draws=0).measurements
    values = {one.name: one.estimate.value for one in found}
    assert (values["type.melts.found"], values["type.melts.named"]) == (1, 0)


@pytest.mark.parametrize("asked", [True, False])
def test_boxes_and_types_that_nobody_asked_for_are_not_measured(asked: bool) -> None:
    said = Prediction(
        judge="j",
        p_clean=0.0,
        located=True,
        boxes_asked=asked,
        types_asked=asked,
        findings=(finding(0.5, 1.0, kind="unspecified"),),
        fps=4.0,
        num_frames=8,
    )
    evaluation = evaluate(pair_up(CLIPS[:1], {"a.mp4": said}, ROOT), draws=0)
    found = {one.name: one for one in evaluation.measurements}
    assert found["time.mean_iou"].estimate.value == 1
    assert found["type.melts.found"].estimate.value == 1
    for name in ("space.box_mean_iou", "space.tube_mean_iou", "type.melts.named"):
        value, base = found[name].estimate.value, found[name].num_clips
        assert (value, base) == (0, 1) if asked else (math.isnan(value) and base == 0)
    for name in ("boxes", "types"):
        assert evaluation.counts[f"asked when, not for {name}"] == int(not asked)


def test_without_any_score_nothing_is_made_up() -> None:
    records = {"a.mp4": record("a.mp4", None)}
    evaluation = evaluate(paired(CLIPS[:1], records), draws=10)
    values = {one.name: one.estimate.value for one in evaluation.measurements}
    assert values.pop("clip.judged") == 0
    assert all(math.isnan(value) for value in values.values())
    assert "clip.accuracy" in table(evaluation)


def test_questions(tmp_path: Path) -> None:
    asked = [
        clip(f"{name}.mp4", verdict="clean", question="Which?", options=("x", "y"), answer="B")
        for name in "abcde"
    ]
    records = {one.path: record(one.path, 0.9) for one in asked}
    asked += [clip("f.mp4", verdict="clean", question="Which?", options=("x", "y"), answer="B")]
    given = {"a.mp4": "B", "b.mp4": "(b) because", "c.mp4": "A", "d.mp4": "Both"}
    file = tmp_path / "answers.jsonl"
    lines = [json.dumps({"path": path, "answer": text}) for path, text in given.items()]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert read_answers(file) == given
    found = evaluate(paired(asked, records), answers=read_answers(file), draws=0)
    rows = {one.name: one for one in found.measurements}
    row = rows["question.accuracy"]
    assert (row.estimate.value, row.num_clips) == (0.5, 4)
    # e.mp4 has no answer, f.mp4 no prediction at all.
    row = rows["question.accuracy_of_all"]
    assert (row.estimate.value, row.num_clips) == (2 / 6, 6)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("{", "line 1"),
        ('{"path": "a"}', "answer"),
        (
            '{"path": "a", "answer": "A"}\n{"path": "a", "answer": "B"}',
            "line 2: a must be answered once",
        ),
    ],
)
def test_a_file_of_other_answers_is_refused(tmp_path: Path, lines: str, message: str) -> None:
    file = tmp_path / "answers.jsonl"
    file.write_text(lines, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_answers(file)
    with pytest.raises(FileNotFoundError, match="answers must be an existing file"):
        read_answers(tmp_path / "none")


def test_records_are_found_by_name_file_and_last_part() -> None:
    clips = [
        clip("sub/a.mp4", verdict="clean"),
        clip("b.mp4", verdict="clean"),
        clip("c.mp4", verdict="clean"),
        clip("x/same.mp4", verdict="clean"),
        clip("y/same.mp4", verdict="clean"),
        clip("shard.tar", key="7", verdict="clean"),
    ]
    paths = ["clips/sub/a.mp4", "b.mp4", "/far/c.mp4", "/far/same.mp4", "shard.tar#7"]
    found = paired(clips, {path: record(path, 0.5, judge_id=path) for path in paths})
    assert [(one.clip.name, one.prediction.judge) for one in found.pairs] == [
        ("sub/a.mp4", "clips/sub/a.mp4 (full)"),
        ("b.mp4", "b.mp4 (full)"),
        ("c.mp4", "/far/c.mp4 (full)"),
        ("shard.tar#7", "shard.tar#7 (full)"),
    ]
    assert [one.name for one in found.unanswered] == ["x/same.mp4", "y/same.mp4"]
    assert found.unannotated == ("/far/same.mp4",)


def test_what_cannot_be_paired_is_refused() -> None:
    one = {"z.mp4": record("z.mp4", 0.5)}
    with pytest.raises(ValueError, match="got none of 9 among 1.*--videos"):
        paired(CLIPS, one)
    with pytest.raises(ValueError, match=r"each clip once, got a\.mp4"):
        paired([CLIPS[0], CLIPS[0]], one)
    twice = [clip("z.mp4", verdict="clean"), clip("./z.mp4", verdict="clean")]
    with pytest.raises(ValueError, match="one line for each clip"):
        paired(twice, {"clips/z.mp4": record("clips/z.mp4", 0.5)})


def test_files_hold_what_was_measured(tmp_path: Path) -> None:
    evaluation = measured(draws=20, seed=4)
    write_json(tmp_path / "out.json", evaluation)
    write_markdown(tmp_path / "out.md", evaluation)
    plain = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    accuracy = plain["measures"]["clip.accuracy"]
    assert accuracy["value"] == pytest.approx(4 / 6)
    assert accuracy["low"] <= accuracy["value"] <= accuracy["high"]
    assert plain["measures"]["question.accuracy"]["value"] is None
    assert plain["settings"] == {"draws": 20, "level": 0.95, "seed": 4, "recordings": 9}
    text = (tmp_path / "out.md").read_text(encoding="utf-8")
    assert text == markdown(evaluation)
    assert "| clip.accuracy | 0.6667 |" in text
    assert "Without a value: question.accuracy" in text
    assert "9 recordings (seed 4)" in table(evaluation)


def test_a_name_from_outside_stays_in_its_cell() -> None:
    records = {"a.mp4": record("a.mp4", 0.1, judge_id="<script>|x")}
    text = markdown(evaluate(paired(CLIPS[:1], records), draws=0))
    assert "<script>" not in text
    assert "&lt;script>\\|x" in text
