"""Tasks of one turn put to a judge: what is asked, what is made of answers, the command."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from cac_reward.__main__ import main
from cac_reward.evaluation.answered import AnsweredClip, read_answered
from cac_reward.evaluation.predictions import Prediction
from cac_reward.judges.local import LocalJudge
from cac_reward.report import UNSPECIFIED, Finding, TimeWindow
from cac_reward.training.asking import Asking, ask, to_prediction, with_answers
from cac_reward.training.clips import ClipStore
from cac_reward.training.lessons import LessonOptions
from cac_reward.training.stages import run_stage
from tests.tiny_stage import measures_of_heads, tiny_stage

BARE = LessonOptions(thinking=0.0, written=False)
SAID = {
    "qa": "<answer>B</answer>",
    "grounding": "<answer>Anomaly</answer><glue>[0.25, 1.00]</glue>",
    "classification": "<answer>vanish</answer>",
    "description": "Description: A square.",
}
KIND_OF = {
    "Ground.": "grounding",
    "Does anything abnormal happen": "grounding",
    "Classify: ": "classification",
    "Which of these classes": "classification",
    "Tell in about five sentences": "description",
}
"""What the texts of tasks hold, brief and full; a question holds none of it."""


def kind_asked(conversation: Any) -> str:
    """Which task the last text of the user's turn puts."""
    text = next(part for part in reversed(conversation[-1].content) if isinstance(part, str))
    return next((kind for words, kind in KIND_OF.items() if words in text), "qa")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The kinds that were asked, of judges that answer as `SAID` says."""
    kinds: list[str] = []

    def generate(self: LocalJudge, conversations: Sequence[Any], **options: Any) -> list[str]:
        found = [kind_asked(one) for one in conversations]
        kinds.extend(found)
        return [SAID[kind] for kind in found]

    monkeypatch.setattr(LocalJudge, "generate", generate)
    return kinds


def test_answers_become_a_prediction(judge: Path, clips: Path, asked: list[str]) -> None:
    store = ClipStore([clips], split=None)
    known = [store.annotation(number) for number in range(2)]
    known[1] = dataclasses.replace(known[1], question=None, options=(), answer=None)
    videos = [store.video(number, clip) for number, clip in enumerate(known)]
    kinds = ("grounding", "qa", "classification", "description")
    classes = ("Normal", "vanish", "teleport")
    asking = Asking(kinds=kinds, options=BARE, classes=classes)
    one, other = ask(LocalJudge.from_pretrained(judge), asking, known, videos)
    assert asked == [*["grounding"] * 2, "qa", *["classification"] * 2, *["description"] * 2]
    assert one.texts == SAID
    found = to_prediction(one, "judge", videos[0])
    assert found.judge == "judge (grounding, qa, classification, description)"
    assert found.findings == (Finding(UNSPECIFIED, TimeWindow(0.25, 1.0)),)
    assert (found.p_clean, found.located, found.boxes_asked, found.types_asked) == (0, True, 0, 0)
    assert (found.option, found.category, found.text) == ("B", "vanish", "Description: A square.")
    assert (found.fps, found.num_frames, found.failure) == (8.0, 13, None)
    assert "qa" not in other.texts
    assert to_prediction(other, "judge", videos[1]).option is None


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        ("qa", "I do not know", {"failure": "qa: must be <answer> and nothing else"}),
        ("grounding", "<answer>Normal</answer><glue>[-1.0, -1.0]</glue>", {"p_clean": 1.0}),
        ("grounding", "nothing", {"p_clean": None, "located": True}),
        ("classification", "<answer>Normal</answer>", {"p_clean": 1.0, "category": "Normal"}),
        ("classification", "<answer>vanish</answer>", {"p_clean": 0.0, "category": "vanish"}),
    ],
)
def test_each_answer_is_read_strictly(
    kind: str,
    text: str,
    expected: dict[str, Any],
    judge: Path,
    clips: Path,
    asked: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(SAID, kind, text)
    store = ClipStore([clips], split=None)
    clip = store.annotation(1)
    video = store.video(1, clip)
    classes = ("Normal", "vanish") if kind == "classification" else ()
    asking = Asking(kinds=(kind,), options=BARE, classes=classes)
    (answers,) = ask(LocalJudge.from_pretrained(judge), asking, [clip], [video])
    found = to_prediction(answers, "judge", video)
    for name, value in expected.items():
        own = getattr(found, name)
        assert own == value or (name == "failure" and own.startswith(value)), name
    assert (found.failure is None) == ("<answer>" in text)


def test_a_verdict_of_two_turns_stays_beside_answers() -> None:
    known = Prediction(p_clean=0.3, located=True, findings=(), text="Verdict: anomalous.")
    more = Prediction(p_clean=1.0, option="C", category="x", failure="grounding: no")
    found = with_answers(known, more)
    assert (found.p_clean, found.option, found.category) == (0.3, "C", "x")
    assert (found.text, found.failure) == ("Verdict: anomalous.", "grounding: no")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kinds": ()}, "kinds must be at least one, each once"),
        ({"kinds": ("qa", "qa")}, "kinds must be at least one, each once"),
        ({"kinds": ("poem",)}, "kinds must be of qa, grounding, classification, description, got"),
        ({"kinds": ("classification",)}, "classes must be given exactly where kinds has 'classif"),
        ({"kinds": ("qa",), "classes": ("a", "b")}, "classes must be given exactly where"),
        ({"kinds": ("qa",), "max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
    ],
)
def test_what_cannot_be_asked_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Asking(**settings)


def test_a_stage_of_tasks_is_measured_by_its_tasks(
    judge: Path, clips: Path, tmp_path: Path, asked: list[str]
) -> None:
    held_out = [f"data.held_out=[{clips}]", "evaluation.best=question.accuracy_of_all"]
    lessons = {"lessons": {"qa": 0.5, "grounding": 0.5}, "options": {"thinking": 0.0}}
    stage = tiny_stage(judge, clips, tmp_path, [*held_out, "evaluation.every=1"], **lessons)
    found = run_stage(stage).measured
    assert set(asked) == {"qa", "grounding"}
    store = ClipStore([clips], split=None)
    known = [store.annotation(number) for number in range(len(store))]
    right = sum(clip.answer == "B" for clip in known) / len(known)
    assert 0 < right < 1
    assert found["question.accuracy_of_all"] == pytest.approx(right, abs=1e-6)
    assert found["clip.accuracy"] == pytest.approx(0.5, abs=1e-6)
    assert found["unjudged"] == 0
    assert "time.mean_iou" in found
    assert not [name for name in found if name.startswith("space.")]


def test_two_turns_are_asked_beside_questions(
    judge: Path, clips: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Turns that a judge of random weights fails at do not hide that questions were asked."""
    lessons = {"lessons": {"qa": 0.5, "inspect": 0.5}, "rollout": {"max_answer_tokens": 4}}
    settings = [f"data.held_out=[{clips}]", "evaluation.every=1"]
    settings += ["evaluation.best=question.accuracy_of_all"]
    found = run_stage(tiny_stage(judge, clips, tmp_path, settings, **lessons, updates=1)).measured
    assert found["unjudged"] == 1  # Four tokens of random weights are no answer.
    assert "best question.accuracy_of_all was not measured after update 1, so this" in caplog.text


def test_heads_alone_are_measured_by_what_they_say(
    judge: Path, clips: Path, tmp_path: Path
) -> None:
    heads = {"words": 0.0, "frames": 1.0, "clip": 1.0}
    stage = tiny_stage(
        judge,
        clips,
        tmp_path,
        [f"data.held_out=[{clips}]", "evaluation.every=10", "evaluation.best=clip.roc_auc"],
        lessons={"scan": 1.0},
        loss=heads,
        model={"learns": "heads"},
        optimizer={"learning_rate": 0.05},
        updates=20,
        batch=8,
    )
    result = run_stage(stage)
    expected = measures_of_heads(result.judge, clips)
    assert result.measured["unjudged"] == 0
    for name in ("clip.roc_auc", "clip.accuracy", "frame.roc_auc", "time.mean_iou"):
        assert result.measured[name] == pytest.approx(expected[name], abs=1e-6)


def test_the_command_writes_a_line_for_each_clip_and_goes_on(
    judge: Path, clips: Path, tmp_path: Path, asked: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "answers.jsonl"
    words = ["answer", "--judge", str(judge), "--annotations", str(clips), "--output", str(output)]
    words += ["--tasks", "qa", "grounding", "--no-thinking", "--batch", "3"]
    assert main(words) == 0
    assert "8 clips, 0 without a usable answer" in capsys.readouterr().out
    assert len(asked) == 16
    lines = output.read_text().splitlines()
    first = json.loads(lines[0])
    assert first["answers"] == {"qa": SAID["qa"], "grounding": SAID["grounding"]}
    assert first["windows"] == [[0.25, 1.0]]
    # As a kill in the middle of the sixth line leaves it.
    output.write_text("\n".join([*lines[:5], lines[5][:40]]))
    assert main(words) == 0
    assert len(asked) == 16 + 6
    plain = [json.loads(line) for line in output.read_text().splitlines()]
    without_time = [{**one, "seconds": 0} for one in plain]
    assert without_time == [{**json.loads(line), "seconds": 0} for line in lines]
    assert main([*words, "--reflection"]) == 2
    assert "answers of the same reflection, got" in capsys.readouterr().err
    measure = ["evaluate", "--annotations", str(clips), "--predictions", str(output)]
    measured = tmp_path / "measured.json"
    formats = ["--predictions-format", "answers", "--draws", "0", "--json", str(measured)]
    assert main([*measure, *formats]) == 0
    found = json.loads(measured.read_text())["measures"].keys()
    assert {"question.accuracy_of_all", "clip.accuracy", "time.mean_iou"} <= found
    assert main([*words, "--batch", "0"]) == 2
    assert "batch must be at least 1, got 0" in capsys.readouterr().err


def test_answers_that_break_their_form_and_missing_clips_are_said(
    judge: Path,
    clips: Path,
    tmp_path: Path,
    asked: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(SAID, "qa", "B")
    lines = clips.read_text().splitlines()[:2]
    (tmp_path / "some.jsonl").write_text("\n".join(lines).replace("0001.mkv", "gone.mkv") + "\n")
    words = ["answer", "--judge", str(judge), "--annotations", str(tmp_path / "some.jsonl")]
    words += ["--videos", str(clips.parent), "--output", str(tmp_path / "out.jsonl")]
    assert main([*words, "--tasks", "qa", "--no-thinking"]) == 3
    printed = capsys.readouterr()
    assert "2 clips, 2 without a usable answer" in printed.out
    assert "qa: must be <answer> and nothing else" in printed.err
    assert "gone.mkv" in printed.err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"p_clean": 2}, r"line 1: p_clean must be in \[0, 1\] or null, got 2"),
        ({"windows": 3}, "line 1: windows must be a list, got 3"),
        ({"answers": []}, r"line 1: answers must be an object, got \[\]"),
        ({"more": 1}, "line 1: answer must have no key but"),
        ({}, "line 2: path must be there once, got a.mp4 again"),
    ],
)
def test_a_bad_line_is_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    prediction = Prediction(judge="j", p_clean=0.0, boxes_asked=False, types_asked=False)
    plain = json.loads(AnsweredClip("a.mp4", {}, {"qa": "B"}, prediction).to_json())
    file = tmp_path / "answers.jsonl"
    file.write_text(2 * (json.dumps({**plain, **change}) + "\n"))
    with pytest.raises(ValueError, match=message):
        read_answered([file])
    file.write_text(json.dumps(plain) + "\n")
    assert read_answered([file]) == {"a.mp4": prediction}
