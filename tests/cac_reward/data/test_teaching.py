"""Teaching against a real server: what is asked, kept, refused, counted, paid for and resumed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cac_reward.__main__ import main
from cac_reward.data.annotations import FIRST_REASONING, AnnotatedClip, Caption
from cac_reward.data.checking import check_annotations
from cac_reward.data.lines import line_writer
from cac_reward.data.storage import read_annotations
from cac_reward.data.teaching.settings import TeachLimits, TeachSettings
from cac_reward.judges.base import JudgeUnreachableError
from cac_reward.records import RecordWriter
from cac_reward.report import Finding, TimeWindow
from cac_reward.training.task_answers import Task, parse_task_answer, write_task_answer
from cac_reward.training.tasks import task_answer
from cac_reward.video import Video
from tests.teacher_server import (
    PROSE,
    Body,
    Reply,
    Seen,
    agreeing,
    annotation,
    pictures,
    said,
    serving,
    texts,
)

pytest.importorskip("openai", reason="the extra 'serve' is not installed")
from cac_reward.data.teaching import running
from cac_reward.data.teaching.asking import HaltedError, Teacher, UnansweredError, _pause
from cac_reward.data.teaching.lessons import Job, Question
from cac_reward.data.teaching.running import Journal, Outcome, teach

JUMP = Finding("jump", TimeWindow(0.5, 1.0))
QUESTION = {"question": "What is it?", "options": ("a square", "a circle"), "answer": "B"}


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a clip of two seconds, a moving square, under several names."""
    folder = tmp_path_factory.mktemp("videos")
    frames = torch.full((16, 3, 32, 32), 64, dtype=torch.uint8)
    for index in range(16):
        frames[index, 0, 12:20, index : index + 8] = 255
    encoded = Video(frames, 8.0).encode(preset="ultrafast", threads=1)
    for number in range(12):
        (folder / f"{number}.mp4").write_bytes(encoded)
    return folder


def clips(count: int, **fields: Any) -> list[AnnotatedClip]:
    """Clips that jump, unless they are said to be otherwise."""
    fields = fields if {"verdict", "findings"} & set(fields) else {"findings": (JUMP,), **fields}
    return [AnnotatedClip(path=f"{number}.mp4", **fields) for number in range(count)]


class Run:
    """What one run brought."""

    def __init__(
        self, seen: Seen, videos: Path, output: Path, clips: list[AnnotatedClip], **how: Any
    ) -> None:
        names = {one for one in TeachLimits.__dataclass_fields__ if one in how}
        limits = TeachLimits(**{"concurrency": 1, **{name: how.pop(name) for name in names}})
        settings = TeachSettings(**{"model": "m", "recipe": "vanguard", **how})
        self.teacher = Teacher(seen.address, settings, limits)
        self.outcomes: list[Outcome] = list(teach(clips, videos, output, self.teacher))
        self.taught = list(read_annotations(output))

    @property
    def states(self) -> Counter[str]:
        return Counter(one.state for one in self.outcomes)

    @property
    def tally(self) -> Any:
        return self.teacher.tally


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tries follow each other at once; how long they would wait is tested by itself."""
    monkeypatch.setattr("cac_reward.data.teaching.asking._FIRST_PAUSE_SECONDS", 0.0)


def test_vanguard_teaches_each_part_what_is_annotated_in_it(videos: Path, tmp_path: Path) -> None:
    known = replace(
        clips(1)[0],
        captions=(Caption(TimeWindow(0.0, 0.5), "first"), Caption(TimeWindow(1.5, 2.0), "last")),
        reasoning="as written before",
        extra={"id": "7"},
    )
    with serving() as seen:
        run = Run(seen, videos, tmp_path / "o.jsonl", [known], subclip_seconds=1.0, fps=4.0)
    assert run.states == {"taught": 1}
    assert (run.tally.requests, run.tally.accepted, run.tally.tokens) == (2, 2, 220)
    told = [annotation(body) for body in seen.bodies]
    assert [one["verdict"] for one in told] == ["anomalous", "clean"]
    assert [[c["text"] for c in one["captions"]] for one in told] == [["first"], ["last"]]
    assert told[0]["findings"] == [{"type": "jump", "window": {"start": 0.5, "end": 1.0}}]
    # Every 0.25 s of each part; the finding's last frame comes on top.
    assert [pictures(body) for body in seen.bodies] == [5, 4]
    assert "<0.88 seconds>" in texts(seen.bodies[0])
    assert "<1.75 seconds>" in texts(seen.bodies[1])
    (clip,) = run.taught
    assert clip.reasoning == (
        "<0.00 seconds> to <1.00 seconds>\n"
        f"Scene: {PROSE}\n"
        "Events:\n- <0.00 seconds> to <0.10 seconds> the square moves\n"
        "Findings:\n- jump <0.50 seconds> to <1.00 seconds> it is gone at once\n"
        f"Why: {PROSE}\nSo this stretch is anomalous.\n\n"
        "<1.00 seconds> to <2.00 seconds>\n"
        f"Scene: {PROSE}\n"
        "Events:\n- <1.00 seconds> to <1.10 seconds> the square moves\n"
        f"Why: {PROSE}\nSo this stretch is clean.\n\n"
        "Whole recording: anomalous, jump <0.50 seconds> to <1.00 seconds>"
    )
    assert clip.extra["reasoning_before_vanguard"] == "as written before"
    assert clip.extra["id"] == "7"
    steps = json.loads(clip.extra["vanguard_answers"])
    assert [one["step"] for one in steps] == ["part 1", "part 2"]
    # Only what was empty is filled in; the rest of the annotation is as it was.
    assert clip.findings == (replace(JUMP, why="it is gone at once"),)
    assert replace(clip, findings=known.findings, reasoning=known.reasoning, extra={"id": "7"}) == (
        known
    )
    grounding = Task(kind="grounding")
    lesson = write_task_answer(grounding, task_answer(grounding, clip))
    assert lesson.startswith(f"<think>{clip.reasoning}</think><answer>Anomaly</answer>")
    assert not check_annotations(tmp_path / "o.jsonl", videos=videos).has_faults


def test_srvau_answers_without_help_first(videos: Path, tmp_path: Path) -> None:
    secret = "the hidden truth of the annotator"
    known = replace(
        clips(1)[0],
        category="hidden",
        prompt="hidden",
        description=secret,
        captions=(Caption(TimeWindow(0.0, 1.0), secret),),
        reasoning=secret,
    )
    wrong = {"type": "jump", "window": {"start": 1.2, "end": 1.7}, "why": "there"}
    bad = {"reasoning": "At <5.00 seconds>.", "findings": [wrong], "verdict": "anomalous"}
    answers = [bad, {**bad, "reasoning": PROSE}]

    def reply(body: Body) -> tuple[int, Any]:
        return 200, said(agreeing(body) if annotation(body) else answers.pop(0))

    with serving(reply) as seen:
        run = Run(seen, videos, tmp_path / "o.jsonl", [known], recipe="srvau")
    assert run.states == {"taught": 1}
    assert run.tally.reasons == {"outside": 1}
    blind, again, told = seen.bodies
    for body in (blind, again):
        assert annotation(body) is None
        assert "hidden" not in json.dumps(body)
        assert "0.50" not in texts(body).replace("<0.50 seconds>", "")
        assert pictures(body) == 4
    assert "<5.00 seconds>" in texts(again)  # Its own answer, and why it cannot be used.
    # The window's frames that the first look had left out: 0.75 and 0.88 s.
    assert pictures(told) == 6
    assert annotation(told)["description"] == secret
    assert "your answer is wrong.\n- window of jump must lie on [0.50, 1.00]" in texts(told)
    (clip,) = run.taught
    assert (clip.first_answer, clip.reasoning) == ("[1.20, 1.70]", PROSE)
    assert clip.extra[FIRST_REASONING] == PROSE
    assert clip.extra["reasoning_before_srvau"] == secret
    task = Task(kind="grounding", reflection=True)
    lesson = write_task_answer(task, task_answer(task, clip))
    read = parse_task_answer(task, lesson, clip, duration_seconds=2.0)
    assert read.first is not None
    assert (read.first.value, read.value) == ((TimeWindow(1.2, 1.7),), (TimeWindow(0.5, 1.0),))
    assert read.reflection == clip.reflection


@pytest.mark.parametrize(
    ("fields", "settings", "first", "was_right"),
    [
        ({"verdict": "clean"}, {}, "[-1.0, -1.0]", True),
        ({"findings": (JUMP,)}, {}, "[-1.0, -1.0]", False),
        ({"verdict": "clean", **QUESTION}, {}, "A", False),
        ({"verdict": "clean", **QUESTION, "answer": "A"}, {}, "A", True),
        ({"verdict": "clean", **QUESTION}, {"task": "grounding"}, "[-1.0, -1.0]", True),
        (
            {"verdict": "clean", "category": "Fire"},
            {"task": "classification", "classes": ("Normal", "Fire")},
            "Normal",
            False,
        ),
    ],
)
def test_srvau_reflects_on_right_and_wrong_answers(
    videos: Path, tmp_path: Path, fields: dict, settings: dict, first: str, was_right: bool
) -> None:
    kind = settings.get("task", "qa" if "question" in fields else "grounding")

    def reply(body: Body) -> tuple[int, Any]:
        if kind != "classification":
            return 200, said(agreeing(body))
        answer = {"reasoning": PROSE, "answer": "Normal"}
        if annotation(body) is not None:
            answer |= {"answer": "Fire", "first_answer_is_right": False, "reflection": PROSE}
        return 200, said(answer)

    with serving(reply) as seen:
        run = Run(
            seen, videos, tmp_path / "o.jsonl", clips(1, **fields), recipe="srvau", **settings
        )
    (clip,) = run.taught
    assert clip.first_answer == first
    assert json.loads(clip.extra["srvau_answers"])[1]["first_answer_is_right"] is was_right
    task = Task(kind=kind, reflection=True, classes=settings.get("classes", ()))
    right = task_answer(task, clip)
    assert right.first is not None
    assert (right.first.value == right.value) is was_right
    assert write_task_answer(task, right).count("<think>") == 2


def spoil(path: str, value: object) -> Reply:
    """A teacher that agrees but for one value of its JSON."""

    def reply(body: Body) -> tuple[int, Any]:
        answer = agreeing(body)
        *parents, last = [int(key) if key.isdigit() else key for key in path.split(".")]
        place: Any = answer
        for key in parents:
            place = place[key]
        place[last] = value
        return 200, said(answer)

    return reply


@pytest.mark.parametrize(
    ("path", "value", "rules"),
    [
        ("verdict", "clean", ["verdict"]),
        ("findings", [], ["verdict", "missing"]),
        ("findings.0.type", "flicker", ["type", "missing"]),
        ("findings.0.window", {"start": 1.0, "end": 1.5}, ["window"]),
        ("findings.0.window", {"start": 0.5, "end": 2.2}, ["outside", "window"]),
        ("findings.0.why", "It jumps at <9.00 seconds>.", ["outside"]),
        ("events.0.window", {"start": 1.0, "end": 2.02}, ["outside"]),
        ("events.0.window", {"start": 1.0, "end": 1.0}, ["form"]),
        ("events.0.what", "at 7.5 s it moves", ["outside"]),
        ("scene", "As annotated, a square.", ["source"]),
        ("reasoning", "<tool_call>", ["form"]),
        ("reasoning", 3, ["form"]),
        ("more", "x", ["form"]),
    ],
)
def test_what_contradicts_is_told_counted_and_never_kept(
    videos: Path, tmp_path: Path, path: str, value: object, rules: list[str]
) -> None:
    with serving(spoil(path, value)) as seen:
        run = Run(seen, videos, tmp_path / "o.jsonl", clips(1), tries=2)
    assert run.states == {"failed": 1}
    assert "part 1: none of 2 answers could be kept, the last for: " in run.outcomes[0].reason
    assert run.taught == []
    assert (tmp_path / "o.jsonl.answers").read_bytes() == b""
    assert (run.tally.requests, run.tally.accepted, run.tally.rejected) == (2, 0, 2)
    assert run.tally.reasons == dict.fromkeys(rules, 2)
    first, second = seen.bodies
    assert [one["role"] for one in second["messages"]] == ["system", "user", "assistant", "user"]
    assert second["messages"][:2] == first["messages"]
    assert run.outcomes[0].reason.partition("last for: ")[2][:40] in texts(second)
    assert first["seed"] != second["seed"]


@pytest.mark.parametrize(
    ("answer", "rule"),
    [
        (said("The square jumps."), "form"),
        (said("{}"), "form"),
        (said('{"scene": "a squ', finish="length"), "cut"),
        (said("", finish="content_filter"), "refused"),
        (said(""), "form"),
    ],
)
def test_answers_of_no_use_are_asked_again(
    videos: Path, tmp_path: Path, answer: Body, rule: str
) -> None:
    answers = [answer]

    def reply(body: Body) -> tuple[int, Any]:
        return 200, answers.pop() if answers else said(agreeing(body))

    with serving(reply) as seen:
        run = Run(seen, videos, tmp_path / "o.jsonl", clips(1))
    assert run.states == {"taught": 1}
    assert run.tally.reasons == {rule: 1}
    assert (run.tally.requests, run.tally.accepted, run.tally.rejected) == (2, 1, 1)
    # There is no turn without words.
    assert all(one["content"] for one in seen.bodies[1]["messages"])


def test_a_refusal_in_words_is_one(videos: Path, tmp_path: Path) -> None:
    refused = said("")
    refused["choices"][0]["message"] = {"role": "assistant", "content": None, "refusal": "no way"}
    with serving(lambda body: (200, refused)) as seen:
        run = Run(seen, videos, tmp_path / "o.jsonl", clips(1), tries=1)
    assert run.tally.reasons == {"refused": 1}
    assert "the teacher refused: no way" in run.outcomes[0].reason


def test_a_misjudged_first_answer_is_refused(videos: Path, tmp_path: Path) -> None:
    def reply(body: Body) -> tuple[int, Any]:
        answer = agreeing(body)
        if "first_answer_is_right" in answer:
            answer["first_answer_is_right"] = True
        return 200, said(answer)

    with serving(reply) as seen:
        run = Run(seen, videos, tmp_path / "o.jsonl", clips(1), recipe="srvau", tries=1)
    assert run.states == {"failed": 1}
    assert run.tally.reasons == {"judgement": 1}


@pytest.mark.parametrize(
    ("fields", "path", "value", "rules"),
    [
        ({}, "verdict", "clean", ["verdict"]),
        ({}, "findings.0.type", "text", ["type", "missing"]),
        ({}, "findings.0.window", {"start": 1.0, "end": 1.5}, ["window"]),
        ({}, "findings.0.window", {"start": 0.5, "end": 2.2}, ["outside", "window"]),
        ({}, "findings.0.why", "seen at 9.0 s", ["outside"]),
        ({}, "reflection", "The annotation says so.", ["source"]),
        ({}, "reflection", "At <2.02 seconds>.", ["outside"]),
        ({}, "reasoning", "</think>", ["form"]),
        (QUESTION, "answer", "A", ["answer"]),
    ],
)
def test_a_revised_answer_is_held_against_the_annotation(
    videos: Path, tmp_path: Path, fields: dict, path: str, value: object, rules: list[str]
) -> None:
    spoiled = spoil(path, value)

    def reply(body: Body) -> tuple[int, Any]:
        return (200, said(agreeing(body))) if annotation(body) is None else spoiled(body)

    with serving(reply) as seen:
        asked = clips(1, findings=(JUMP,), **fields)
        run = Run(seen, videos, tmp_path / "o.jsonl", asked, recipe="srvau", tries=1)
    assert run.states == {"failed": 1}
    assert (run.tally.accepted, run.tally.reasons) == (1, dict.fromkeys(rules, 1))


@pytest.mark.parametrize(
    ("window", "why", "rule"),
    [
        ({"start": 1.5, "end": 2.02}, "there", "outside"),
        ({"start": 1.5, "end": 2.0}, "until 3.5 s", "outside"),
        ({"start": 1.5, "end": 1.5}, "there", "form"),
    ],
)
def test_a_first_answer_may_be_wrong_but_not_outside(
    videos: Path, tmp_path: Path, window: dict, why: str, rule: str
) -> None:
    finding = {"type": "text", "window": window, "why": why}
    answer = {"reasoning": PROSE, "findings": [finding], "verdict": "anomalous"}
    with serving(lambda body: (200, said(answer))) as seen:
        run = Run(seen, videos, tmp_path / "o.jsonl", clips(1), recipe="srvau", tries=1)
    assert (run.tally.accepted, run.tally.reasons) == (0, {rule: 1})


def test_what_an_annotation_explains_stays(videos: Path, tmp_path: Path) -> None:
    silent = replace(JUMP, window=TimeWindow(1.0, 1.5))
    asked = clips(1, findings=(replace(JUMP, why="as people said"), silent))
    with serving() as seen:
        run = Run(seen, videos, tmp_path / "o.jsonl", asked)
    assert annotation(seen.bodies[0])["findings"][0]["why"] == "as people said"
    assert [one.why for one in run.taught[0].findings] == ["as people said", "it is gone at once"]


BUSY = {"error": {"message": "busy"}}


@pytest.mark.parametrize(
    "failure",
    [(503, BUSY), (500, BUSY), (429, BUSY), (408, BUSY), (409, BUSY), (200, b"no json"), (200, {})],
)
def test_what_may_pass_is_sent_again_and_counted(
    videos: Path, tmp_path: Path, failure: tuple[int, Any]
) -> None:
    failures = [failure] * 2

    def reply(body: Body) -> tuple[int, Any]:
        return failures.pop() if failures else (200, said(agreeing(body)))

    with serving(reply) as seen:
        run = Run(seen, videos, tmp_path / "o.jsonl", clips(2), retries=2)
    assert run.states == {"taught": 2}
    assert (run.tally.requests, run.tally.repeated, len(seen.bodies)) == (4, 2, 4)


@pytest.mark.parametrize(("failure", "requests"), [((503, BUSY), 3), ((413, BUSY), 1)])
def test_one_clip_that_fails_for_good_stops_no_other(
    videos: Path, tmp_path: Path, failure: tuple[int, Any], requests: int
) -> None:
    def reply(body: Body) -> tuple[int, Any]:
        return failure if '"category": "x"' in texts(body) else (200, said(agreeing(body)))

    asked = [clips(3)[0], replace(clips(3)[1], category="x"), clips(3)[2]]
    with serving(reply) as seen:
        run = Run(seen, videos, tmp_path / "o.jsonl", asked, retries=2, schema="never")
    assert run.states == {"taught": 2, "failed": 1}
    assert len(seen.bodies) == requests + 2
    assert [one.reason for one in run.outcomes if one.reason][0].startswith("the request failed")
    assert [one.path for one in run.taught] == ["0.mp4", "2.mp4"]


def test_pauses_double_or_are_as_long_as_the_server_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    import openai

    monkeypatch.undo()
    with serving(lambda body: (429, (BUSY, {"retry-after": body["model"]}))) as seen:
        client = openai.OpenAI(base_url=seen.address, api_key="none", max_retries=0)
        pauses = []
        for asked in ("7", "0", "soon", "600", "601", "inf"):
            with pytest.raises(openai.RateLimitError) as caught:
                client.chat.completions.create(model=asked, messages=[])
            pauses.append(_pause(caught.value, 2))
    assert pauses == [7.0, 0.0, 2.0, 600.0, None, None]
    failure = openai.OpenAIError("no choice")
    assert [_pause(failure, count) for count in range(7)] == [0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 16.0]


def test_a_server_that_takes_no_schema_is_asked_without(videos: Path, tmp_path: Path) -> None:
    def reply(body: Body) -> tuple[int, Any]:
        if "response_format" in body:
            return 400, {"error": {"message": "unknown field response_format"}}
        return 200, said(agreeing(body))

    with serving(reply) as seen:
        run = Run(seen, videos, tmp_path / "o.jsonl", clips(3))
    assert run.states == {"taught": 3}
    assert ["response_format" in body for body in seen.bodies] == [True, False, False, False]
    assert run.teacher.takes_schema is False
    with serving(reply) as seen:
        run = Run(seen, videos, tmp_path / "p.jsonl", clips(1), schema="always")
    assert run.states == {"failed": 1}
    with serving() as seen:
        Run(seen, videos, tmp_path / "q.jsonl", clips(1), schema="never")
        assert "response_format" not in seen.bodies[0]
        Run(seen, videos, tmp_path / "r.jsonl", clips(1))
        form = seen.bodies[1]["response_format"]
    assert (form["type"], form["json_schema"]["strict"]) == ("json_schema", True)
    assert set(form["json_schema"]["schema"]["required"]) == set(agreeing(seen.bodies[1]))


def test_a_bad_request_is_not_the_schemas_fault_twice(videos: Path, tmp_path: Path) -> None:
    """Once an answer has come with the schema, a bad request is the clip's own."""
    count = 0

    def reply(body: Body) -> tuple[int, Any]:
        nonlocal count
        count += 1
        return (200, said(agreeing(body))) if count == 1 else (400, BUSY)

    with serving(reply) as seen:
        run = Run(seen, videos, tmp_path / "o.jsonl", clips(2))
    assert run.states == {"taught": 1, "failed": 1}
    assert len(seen.bodies) == 2


def test_the_request_is_as_the_settings_say(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    body = {"seed": None, "max_tokens": None, "max_completion_tokens": 9, "top_k": 3}
    with serving() as seen:
        Run(seen, videos, tmp_path / "o.jsonl", clips(1), body=body, temperature=0.5)
        Run(seen, videos, tmp_path / "p.jsonl", clips(1), answer_tokens=77, pixels=256)
    first, second = seen.bodies
    assert first["key"] == "Bearer secret"
    assert (first["max_completion_tokens"], first["top_k"], first["temperature"]) == (9, 3, 0.5)
    assert not {"seed", "max_tokens"} & set(first)
    assert (second["max_tokens"], "temperature" in second) == (77, False)
    assert "secret" not in (tmp_path / "o.jsonl").read_text()


def sizes(body: Body) -> set[tuple[int, int]]:
    """Sizes of the pictures that a request shows."""
    import base64
    import io

    from PIL import Image

    found = set()
    for message in body["messages"]:
        for part in message["content"] if isinstance(message["content"], list) else []:
            if part["type"] == "image_url":
                data = part["image_url"]["url"].partition("base64,")[2]
                found.add(Image.open(io.BytesIO(base64.b64decode(data))).size)
    return found


def test_frames_stay_within_their_budget(videos: Path, tmp_path: Path) -> None:
    with serving() as seen:
        Run(seen, videos, tmp_path / "o.jsonl", clips(1), pixels=256, max_frames=3, fps=8.0)
        Run(seen, videos, tmp_path / "p.jsonl", clips(1))
    small, whole = seen.bodies
    assert (sizes(small), pictures(small)) == ({(16, 16)}, 3)
    assert sizes(whole) == {(32, 32)}  # Never enlarged.


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_server_that_refuses_ends_the_run(videos: Path, tmp_path: Path, status: int) -> None:
    with (
        serving(lambda body: (status, {"error": {"message": "no model m"}})) as seen,
        pytest.raises(JudgeUnreachableError, match="no model m.*check address, model and key"),
    ):
        Run(seen, videos, tmp_path / "o.jsonl", clips(9))
    assert len(seen.bodies) == 1


def test_nobody_there_ends_the_run(videos: Path, tmp_path: Path) -> None:
    with serving() as seen:
        pass
    with pytest.raises(JudgeUnreachableError, match=f"endpoint {seen.address} must answer"):
        Run(seen, videos, tmp_path / "o.jsonl", clips(2), retries=1)


def test_a_slow_answer_is_given_up_and_asked_for_again(videos: Path, tmp_path: Path) -> None:
    slow = [True]

    def reply(body: Body) -> tuple[int, Any]:
        if slow:
            slow.pop()
            time.sleep(1.5)
        return 200, said(agreeing(body))

    with serving(reply) as seen:
        run = Run(seen, videos, tmp_path / "o.jsonl", clips(1), timeout_seconds=0.5)
    assert run.states == {"taught": 1}
    assert run.tally.repeated == 1


@pytest.mark.parametrize("concurrency", [1, 3])
def test_no_more_requests_at_once_than_allowed(
    videos: Path, tmp_path: Path, concurrency: int
) -> None:
    def reply(body: Body) -> tuple[int, Any]:
        time.sleep(0.1)
        return 200, said(agreeing(body))

    with serving(reply) as seen:
        run = Run(seen, videos, tmp_path / "o.jsonl", clips(9), concurrency=concurrency)
    assert run.states == {"taught": 9}
    assert seen.most == concurrency


@pytest.mark.parametrize("concurrency", [1, 4])
@pytest.mark.parametrize("most", [1, 7, 18])
def test_a_budget_of_requests_is_never_passed(
    videos: Path, tmp_path: Path, most: int, concurrency: int
) -> None:
    how = {"concurrency": concurrency, "subclip_seconds": 1.0}
    with serving() as seen:
        run = Run(seen, videos, tmp_path / "o.jsonl", clips(9), max_requests=most, **how)
        assert len(seen.bodies) == run.tally.requests == min(most, 18)
        assert sum(run.states.values()) == 9
        assert set(run.states) <= {"taught", "unasked"}
        assert (run.states["unasked"] == 0) is (most >= 18)
        if most < 18:
            assert run.teacher.halted == f"max_requests={most} is reached"
            assert (tmp_path / "o.jsonl.answers").exists()
        # Nothing that was answered is asked again.
        rest = Run(seen, videos, tmp_path / "o.jsonl", clips(9), **how)
    assert rest.states["there"] == run.states["taught"]
    assert len(seen.bodies) == 18
    assert {clip.path for clip in rest.taught} == {f"{number}.mp4" for number in range(9)}
    assert not (tmp_path / "o.jsonl.answers").exists()


@pytest.mark.parametrize(("most", "answers"), [(109, 1), (110, 1), (111, 2), (220, 2), (221, 3)])
def test_a_budget_of_tokens_ends_with_the_answer_that_reaches_it(
    videos: Path, tmp_path: Path, most: int, answers: int
) -> None:
    with serving() as seen:
        run = Run(seen, videos, tmp_path / "o.jsonl", clips(5), max_tokens=most)
    assert len(seen.bodies) == answers
    assert run.states == {"taught": answers, "unasked": 5 - answers}
    assert run.teacher.halted == f"max_tokens={most} is reached"
    assert (run.tally.read_tokens, run.tally.written_tokens) == (100 * answers, 10 * answers)


def test_tokens_that_nobody_counts_have_no_budget(videos: Path, tmp_path: Path) -> None:
    with serving(lambda body: (200, said(agreeing(body), tokens=None))) as seen:
        run = Run(seen, videos, tmp_path / "o.jsonl", clips(3), max_tokens=1000)
        assert run.states == {"taught": 1, "unasked": 2}
        assert "this one gives no usage" in str(run.teacher.halted)
        free = Run(seen, videos, tmp_path / "o.jsonl", clips(3))
    assert free.states == {"there": 1, "taught": 2}
    assert (free.tally.tokens, free.tally.uncounted) == (0, 2)


@pytest.mark.parametrize(("most", "asked"), [(0, 1), (2, 3), (3, 4), (4, 4), (None, 4)])
def test_one_failure_too_many_ends_the_run(
    videos: Path, tmp_path: Path, most: int | None, asked: int
) -> None:
    unknown = [AnnotatedClip(path=f"none{number}.mp4", verdict="clean") for number in range(4)]
    with serving() as seen:
        run = Run(seen, videos, tmp_path / "o.jsonl", [*unknown, *clips(1)], max_failures=most)
    assert run.states["failed"] == asked
    assert run.states["taught"] == (most is None or most >= 4)
    assert len(seen.bodies) == run.states["taught"]


def test_clips_that_cannot_be_taught_are_named(videos: Path, tmp_path: Path) -> None:
    (videos / "broken.mp4").write_bytes(b"no video")
    late = Finding("jump", TimeWindow(1.0, 3.0))
    cases = [
        (AnnotatedClip(path="0.mp4"), "verdict must be annotated to lead a teacher"),
        (AnnotatedClip(path="none.mp4", verdict="clean"), "video must be an existing file"),
        (AnnotatedClip(path="broken.mp4", verdict="clean"), "must be a readable video file"),
        (AnnotatedClip(path="../a.mp4", verdict="clean"), "path must be below"),
        (AnnotatedClip(path="1.mp4", findings=(late,)), "annotation must end with its video"),
        (
            AnnotatedClip(path="2.mp4", findings=(replace(JUMP, type="fire"),)),
            r"findings\[0\] must be one of the faults, got 'fire'; choose others by --types",
        ),
        (AnnotatedClip(path="3.mp4", verdict="clean"), ""),
        (AnnotatedClip(path="3.mp4", verdict="clean"), "clip, or a question on it, must be there"),
    ]
    with serving() as seen:
        run = Run(seen, videos, tmp_path / "o.jsonl", [clip for clip, _ in cases])
        assert len(seen.bodies) == 1
        events = Run(seen, videos, tmp_path / "p.jsonl", [cases[5][0]], types="events")
    assert run.states == {"failed": 7, "taught": 1}
    reasons = {(one.name, one.reason) for one in run.outcomes}
    for clip, message in cases:
        assert any(name == clip.name and message.replace("\\", "") in why for name, why in reasons)
    assert events.states == {"taught": 1}


@pytest.mark.parametrize(
    ("fields", "settings", "message"),
    [
        ({"verdict": "anomalous"}, {}, "a clean verdict, or findings for the task 'grounding'"),
        ({"verdict": "clean"}, {"task": "qa"}, "a question with options and its answer"),
        (
            {"verdict": "clean", "category": "z"},
            {"task": "classification", "classes": ("x", "y")},
            "a category among the classes",
        ),
    ],
)
def test_a_first_answer_needs_a_right_one(
    videos: Path, tmp_path: Path, fields: dict, settings: dict, message: str
) -> None:
    with serving() as seen:
        run = Run(
            seen, videos, tmp_path / "o.jsonl", clips(1, **fields), recipe="srvau", **settings
        )
    assert message in run.outcomes[0].reason
    assert seen.bodies == []


def test_a_clip_whose_windows_nobody_knows_stays_whole(videos: Path, tmp_path: Path) -> None:
    def reply(body: Body) -> tuple[int, Any]:
        answer = agreeing(body)
        window = {"start": 0.5, "end": 1.5}
        answer["findings"] = [{"type": "text", "window": window, "why": "letters crawl"}]
        return 200, said(answer)

    with serving(reply) as seen:
        asked = clips(1, verdict="anomalous")
        run = Run(seen, videos, tmp_path / "o.jsonl", asked, subclip_seconds=0.5)
    assert len(seen.bodies) == 1
    assert "nobody has noted when" in texts(seen.bodies[0])
    assert run.taught[0].findings == ()
    assert "text <0.50 seconds> to <1.50 seconds> letters crawl" in str(run.taught[0].reasoning)


def test_answers_to_other_questions_never_go_into_one_file(videos: Path, tmp_path: Path) -> None:
    output = tmp_path / "o.jsonl"
    with serving() as seen:
        Run(seen, videos, output, clips(2))
        for other, message in (
            ({"fps": 1.0}, "fps must be as in .*o.jsonl, where it is 2.0 for 0.mp4, got 1.0"),
            ({"model": "n"}, "model must be as in"),
            ({"recipe": "srvau"}, "output must hold what the recipe srvau wrote, got 0.mp4"),
        ):
            with pytest.raises(ValueError, match=message):
                Run(seen, videos, output, clips(2), **other)
        changed = Run(seen, videos, output, [replace(clips(1)[0], category="new"), clips(2)[1]])
        assert changed.states == {"failed": 1, "there": 1}
        assert "annotation must be as it was" in changed.outcomes[0].reason
        # What one recipe wrote may be taught by the other.
        chained = Run(seen, videos, tmp_path / "p.jsonl", changed.taught, recipe="srvau")
    assert len(seen.bodies) == 2 + 4
    assert "vanguard_answers" in chained.taught[0].extra
    assert "Scene:" in chained.taught[0].extra["reasoning_before_srvau"]


def test_a_torn_output_and_a_bad_journal(videos: Path, tmp_path: Path) -> None:
    output, journal = tmp_path / "o.jsonl", tmp_path / "o.jsonl.answers"
    with serving() as seen:
        Run(seen, videos, output, clips(2))
        whole = output.read_bytes()
        output.write_bytes(whole[:-9])
        journal.write_bytes(b'{"place": "x", "ans')
        again = Run(seen, videos, output, clips(2))
        assert again.states == {"there": 1, "taught": 1}
        journal.write_bytes(b"{}\n")
        with pytest.raises(ValueError, match="must hold an answer per line, got in line 1.*delete"):
            Run(seen, videos, output, clips(3))
        journal.unlink()
        # The lock of a refused file is given back.
        assert Run(seen, videos, output, clips(3)).states == {"there": 2, "taught": 1}
    assert output.read_bytes().startswith(whole)


def test_a_noted_answer_is_held_against_the_rules_again(videos: Path, tmp_path: Path) -> None:
    output = tmp_path / "o.jsonl"
    with serving() as seen:
        Run(seen, videos, output, clips(1), max_requests=1, subclip_seconds=1.0)
        journal = tmp_path / "o.jsonl.answers"
        noted = journal.read_text()
        journal.write_text(noted.replace("anomalous", "clean"))
        run = Run(seen, videos, output, clips(1), subclip_seconds=1.0)
    assert (run.tally.requests, run.states) == (2, {"taught": 1})


def test_the_journal_finds_what_was_noted(tmp_path: Path) -> None:
    path = tmp_path / "j"
    with Journal(path) as journal:
        for number in range(5):
            journal.add(f"p{number}", {"said": "\u00e9" * number})
        assert journal.find("p3") == {"said": "\u00e9" * 3}
        with pytest.raises(ValueError, match="must be written by one process"):
            Journal(path)
    with Journal(path) as journal:
        assert journal.find("p9") is None
        journal.add("p9", {"x": 1})
        journal.add("p1", {"x": 2})
        assert [journal.find(name) for name in ("p4", "p9", "p1")] == [
            {"said": "\u00e9" * 4},
            {"x": 1},
            {"x": 2},
        ]


def test_a_fault_of_ours_ends_the_run(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode(*_: object) -> None:
        raise KeyError("ours")

    monkeypatch.setattr(running.Journal, "add", explode)
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    with serving() as seen, pytest.raises(KeyError, match="ours"):
        Run(seen, videos, tmp_path / "o.jsonl", clips(2))


def test_a_disk_that_is_full_ends_the_run(
    videos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "no space left")

    monkeypatch.setattr(running.Journal, "add", full)
    with serving() as seen, pytest.raises(OSError, match="no space left"):
        Run(seen, videos, tmp_path / "o.jsonl", clips(2))


def command(seen: Seen, videos: Path, file: Path, output: Path, *more: str) -> list[str]:
    """The command line, without the program."""
    return [
        *("annotate", "teach", str(file), "--output", str(output), "--endpoint", seen.address),
        *("--model", "m", "--recipe", "vanguard", "--videos", str(videos), *more),
    ]


def write(path: Path, written: list[AnnotatedClip]) -> Path:
    with line_writer(path) as add:
        for clip in written:
            add(clip)
    return path


def test_the_command_says_what_it_did(
    videos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = AnnotatedClip(path="none.mp4", verdict="clean")
    file = write(tmp_path / "a.jsonl", [bad, *clips(3)])
    output = tmp_path / "o.jsonl"
    answers = [said("no")]

    def reply(body: Body) -> tuple[int, Any]:
        return 200, answers.pop() if answers else said(agreeing(body))

    with serving(reply) as seen:
        assert main(command(seen, videos, file, output, "--max-requests", "3")) == 3
        told = capsys.readouterr()
        rows = [line.split()[:2] for line in told.out.splitlines()]
        for row in (["clips", "4"], ["taught", "2"], ["failed", "1"], ["rejected", "1"]):
            assert row in rows
        assert ["form", "1"] in rows
        assert ["tokens", "330"] in rows
        assert "failed: none.mp4: video must be an existing file" in told.err
        assert "stopped: max_requests=3 is reached; 1 clips were not asked about" in told.err
        assert main(command(seen, videos, file, output)) == 3
        file = write(file, clips(3))
        assert main(command(seen, videos, file, output)) == 0
        assert len(seen.bodies) == 4
    # Nobody needs to be there where nothing is left to ask.
    assert main(command(seen, videos, file, output)) == 0
    assert main(command(seen, videos, write(tmp_path / "b.jsonl", clips(4)), output)) == 2
    assert "3 clips are in" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--output", "o.tar"), "output must end in .jsonl, got o.tar"),
        (("--output", "none/o.jsonl"), "folder of none/o.jsonl must exist"),
        (("--output", "{file}"), "output must be another file than the one that is read"),
        (("--endpoint", "file:///x"), "endpoint must begin with http:// or https://"),
        (("--recipe", "srvau", "--subclip-seconds", "2"), "subclip_seconds must be left out"),
        (("--task", "qa"), "task must be left out unless the recipe is srvau"),
        (("--recipe", "srvau", "--classes", "a,b"), "classes must be given exactly where"),
        (("--body", '{"stream": true}'), "body must not set 'stream'"),
        (("--concurrency", "0"), "concurrency must be at least 1, got 0"),
    ],
)
def test_commands_that_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], message: str
) -> None:
    file = write(tmp_path / "a.jsonl", clips(1))
    more = tuple(one.format(file=file) if one == "{file}" else one for one in more)
    seen = Seen(address="http://127.0.0.1:9/v1")
    assert main([*command(seen, tmp_path, file, tmp_path / "o.jsonl"), *more]) == 2
    assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([*command(seen, tmp_path, file, tmp_path / "o.jsonl"), "--body", "[]"])
    folder = command(seen, tmp_path, tmp_path, tmp_path / "o.jsonl")
    assert main(folder) == 2
    assert "output must be outside the folder that is read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": ""}, "model must be the server's name"),
        ({"recipe": "x"}, "recipe must be one of"),
        ({"types": "x"}, "types must be one of"),
        ({"subclip_seconds": 0}, "subclip_seconds must be above 0, got 0"),
        ({"fps": float("inf")}, "fps must be above 0, got inf"),
        ({"max_frames": 1}, "max_frames must be at least 2, got 1"),
        ({"min_iou": 1.1}, r"min_iou must be in \[0, 1\], got 1.1"),
        ({"temperature": -1}, "temperature must be at least 0, got -1"),
        (
            {"recipe": "srvau", "task": "classification", "classes": ("a", "a")},
            "classes must be at least two different names",
        ),
    ],
)
def test_settings_outside_their_range(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TeachSettings(**{"model": "m", "recipe": "vanguard", **settings})


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"tries": 0}, "tries must be at least 1, got 0"),
        ({"timeout_seconds": 0}, "timeout_seconds must be above 0, got 0"),
        ({"schema": "x"}, "schema must be one of"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ({"max_failures": -1}, "max_failures must be at least 0, got -1"),
    ],
)
def test_limits_outside_their_range(limits: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TeachLimits(**limits)


def start(seen: Seen, videos: Path, file: Path, output: Path, *more: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "cac_reward", *command(seen, videos, file, output, *more)],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def wait_for(seen: Seen, count: int) -> None:
    deadline = time.monotonic() + 60
    while len(seen.bodies) < count:
        assert time.monotonic() < deadline
        time.sleep(0.005)


def asked_for(bodies: list[Body]) -> Counter[str]:
    """How often each part of each clip was asked about."""
    return Counter(f"{annotation(body)['category']} {body['seed']}" for body in bodies)


@pytest.mark.parametrize("end", ["kill", "once", "twice"])
def test_a_run_that_is_stopped_loses_only_what_is_under_way(
    videos: Path, tmp_path: Path, end: str
) -> None:
    """Killed, or by Ctrl-C once (what is under way ends) or twice (it does not)."""
    gate = threading.Event()

    def reply(body: Body) -> tuple[int, Any]:
        # Six answers come at once; the two requests after them hang.
        if len(seen.bodies) > 6 and not gate.is_set():
            gate.wait(30)
        return 200, said(agreeing(body))

    named = [replace(clip, category=clip.path) for clip in clips(9)]
    file, output = write(tmp_path / "a.jsonl", named), tmp_path / "o.jsonl"
    more = ("--subclip-seconds", "1", "--concurrency", "2")
    with serving(reply) as seen:
        process = start(seen, videos, file, output, *more)
        wait_for(seen, 8)
        if end == "kill":
            process.kill()
        else:
            process.send_signal(signal.SIGINT)
            assert process.stderr is not None
            while "Ctrl-C drops them" not in process.stderr.readline():
                assert process.poll() is None
            if end == "twice":
                process.send_signal(signal.SIGINT)
            else:
                gate.set()
        assert process.wait(30) == {"kill": -9, "once": 130, "twice": 130}[end]
        gate.set()
        first = asked_for(seen.bodies)
        assert len(first) == 8
        # Whatever the moment, the output holds whole clips and nothing else.
        kept = list(read_annotations(output))
        assert {clip.path for clip in kept} <= {clip.path for clip in named}
        assert main(command(seen, videos, file, output, *more)) == 0
    again = {key: count for key, count in asked_for(seen.bodies).items() if count > 1}
    assert len(asked_for(seen.bodies)) == 18
    assert sum(again.values()) == 2 * len(again)
    assert len(again) == (0 if end == "once" else 2)
    taught = list(read_annotations(output))
    assert sorted(clip.path for clip in taught) == sorted(clip.path for clip in named)
    assert taught[: len(kept)] == kept
    assert not output.with_name("o.jsonl.answers").exists()


@pytest.mark.parametrize(
    ("state", "error"), [("unasked", HaltedError), ("failed", UnansweredError)]
)
def test_a_part_of_a_lost_clip_is_lost_in_the_same_way(
    tmp_path: Path, state: str, error: type[Exception]
) -> None:
    settings = TeachSettings(model="m", recipe="vanguard")
    teacher = Teacher("http://127.0.0.1:9/v1", settings, TeachLimits(concurrency=1))
    with RecordWriter(tmp_path / "o.jsonl") as writer, Journal(tmp_path / "j") as journal:
        run = running._Run(tmp_path, teacher, writer, journal, {})
        opened = running._Open(clips(1)[0], end=Outcome("0.mp4", state, "no"))
        question = Question("part 2", (), {}, lambda answer: None)
        work = run._work(opened, Job(lambda ask: {"part 2": ask(question)}))
        with pytest.raises(error, match="no"):
            work()
        run.workers.close()
    assert teacher.tally.requests == 0


def test_the_first_reason_to_stop_counts() -> None:
    settings = TeachSettings(model="m", recipe="srvau")
    teacher = Teacher("http://127.0.0.1:9/v1", settings, TeachLimits())
    teacher.halt("first")
    teacher.halt("second")
    assert teacher.halted == "first"
    with pytest.raises(ValueError, match="endpoint must begin with"):
        Teacher("127.0.0.1", settings, TeachLimits())
