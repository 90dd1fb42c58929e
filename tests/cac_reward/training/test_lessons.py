"""Lessons of every kind for every family: only the judge's words are learnt, as it is asked."""

import copy
import math
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cac_reward import CaCScorer, PromptAlignment
from cac_reward.answers import parse_findings, parse_scan_answer, write_scan_answer
from cac_reward.data.annotations import AnnotatedClip, Caption
from cac_reward.frames import InspectSettings, JudgeSettings, ScanSettings
from cac_reward.judges.families import FAMILIES
from cac_reward.judges.local import LocalJudge
from cac_reward.judges.reading import BatchReader
from cac_reward.judges.rendering import TokenizedConversation
from cac_reward.questions import FINDINGS_PREFIX, TOOL_CALL_PREFIX, VERDICT_PREFIX, Message
from cac_reward.report import Box, Finding, TimeWindow
from cac_reward.training.encoding import EncodedLesson, Encoder, mean_or_zero
from cac_reward.training.lesson_kinds import LESSONS, SHOWS_PROMPT, TASKS, misplace, task_of
from cac_reward.training.lessons import ClipInView, Lesson, LessonOptions, View, Words
from cac_reward.training.task_answers import Task, parse_task_answer
from examples.toy_world.judge_folder import build_processor, build_tokenizer
from tests.tiny_judge import build_tiny_judge
from tests.training_clips import FAULTS, FPS, FRAMES, square_clip

VIEWS = {
    wording: JudgeSettings(
        wording=wording,
        scan=ScanSettings(fps=4.0, max_frames=8, pixels=1024),
        inspect=InspectSettings(fps=8.0, max_frames=6, pixels=2304, margin_seconds=0.125),
    )
    for wording in ("brief", "full")
}
BROKEN, CLEAN = 1, 0
CLASSES = (*FAULTS, "whole")
END = "<|im_end|>"
QUICK = View(
    replace(VIEWS["brief"], inspect=replace(VIEWS["brief"].inspect, pixels=1024)),
    FAMILIES["qwen3_vl"],
    8,
    CLASSES,
)
"""Shows frames as they are."""


@pytest.fixture(scope="module", params=list(FAMILIES))
def judge(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LocalJudge:
    folder = tmp_path_factory.mktemp(request.param)
    build_tiny_judge(folder, patch_size=4, merge_size=2, family=request.param)
    return LocalJudge.from_pretrained(folder)


@pytest.fixture(params=list(VIEWS))
def view(judge: LocalJudge, request: pytest.FixtureRequest) -> View:
    return View(VIEWS[request.param], judge.family, judge.patch_factor, CLASSES)


def encoder_of(judge: LocalJudge, decision_weight: float = 1.0) -> Encoder:
    return Encoder(judge._reader.processor, judge.family, decision_weight)


@cache
def frames_of(number: int) -> Tensor:
    """[F 3 H W] uint8."""
    return torch.from_numpy(square_clip(number).frames).permute(0, 3, 1, 2)


@cache
def annotation_of(number: int) -> AnnotatedClip:
    return square_clip(number).annotation


def seen_as(
    number: int = BROKEN,
    view: View = QUICK,
    seed: int = 0,
    other: str = "",
    clip: AnnotatedClip | None = None,
    written: bool = True,
    **options: float,
) -> ClipInView:
    """A square clip, or its pixels with another annotation."""
    return ClipInView(
        clip=clip or annotation_of(number),
        frames=frames_of(number),
        fps=FPS,
        view=view,
        options=LessonOptions.build(options, written=written),
        random=np.random.default_rng(seed),
        other_prompt=other,
    )


def said(lesson: Lesson) -> list[Words]:
    return [one for one in lesson.messages if isinstance(one, Words)]


def learnt(encoder: Encoder, one: EncodedLesson) -> str:
    """What the tokens say that carry loss."""
    tokens = [token for token, weight in zip(one.tokens, one.weights, strict=True) if weight > 0]
    return encoder.tokenizer.decode(tokens)


def to_be_learnt(words: Words) -> str:
    return "".join(words.text[start:end] for start, end, _ in words.weights) + END * words.ends


def near(window: TimeWindow) -> object:
    return pytest.approx(window.to_json(), abs=0.00501)


def check_findings(text: str, seen: ClipInView, height: int, width: int) -> None:
    """An answer holds the annotation, boxes to the family's grid."""
    family = seen.view.family
    reader = family.box_reader(height, width)
    found = parse_findings(text, seen.seconds, box_reader=reader)
    assert len(found) == len(seen.findings)
    grid = 1000 if family.box_units == "thousandths" else min(height, width)
    for one, true in zip(found, seen.findings, strict=True):
        assert (one.type, one.severity) == (true.type, true.severity)
        assert one.why in ("", true.why)
        assert one.window.to_json() == near(true.window)
        assert one.boxes
        for box in one.boxes:
            (own,) = [b for b in true.boxes if abs(b.time_seconds - box.time_seconds) < 0.00501]
            far = [abs(a - b) for a, b in zip(own.coordinates, box.coordinates, strict=True)]
            assert max(far) <= 0.5 / grid + 1e-9


KINDS = [(kind, number) for kind in LESSONS for number in (BROKEN, CLEAN)]


@pytest.mark.parametrize(("kind", "number"), KINDS)
def test_the_judges_own_words_are_learnt_and_nothing_else(
    judge: LocalJudge, kind: str, number: int
) -> None:
    view = View(VIEWS["brief"], judge.family, judge.patch_factor, CLASSES)
    encoder = encoder_of(judge)
    for seed in range(3):
        seen = seen_as(number, view, seed, "a red circle", turns=2, reflection=0.5)
        lesson = LESSONS[kind].write(seen)
        turns = said(lesson)
        assert any(one.weights for one in turns)
        encoded = encoder.encode(lesson)
        whole = "".join(to_be_learnt(one) for one in turns)
        assert "".join(learnt(encoder, one) for one in encoded) == whole
        for one in encoded:
            assert len(one.tokens) == len(one.weights)
            # Every learnt stretch begins where a turn of the judge does: behind its header.
            starts = [
                i for i, weight in enumerate(one.weights) if weight and not one.weights[i - 1]
            ]
            for start in starts:
                before = encoder.tokenizer.decode(one.tokens[:start])
                opened = before.rpartition("<|im_start|>")[2]
                assert opened.startswith("assistant\n")
                assert END not in opened


@pytest.mark.parametrize("kind", LESSONS)
def test_frames_and_their_labels(judge: LocalJudge, kind: str) -> None:
    """Each frame is the one of its time stamp, and is labelled by whether a fault is on then."""
    view = View(VIEWS["brief"], judge.family, judge.patch_factor, CLASSES)
    encoder = encoder_of(judge)
    pad = encoder.renderer.image_token_id
    for number in (BROKEN, CLEAN):
        seen = seen_as(number, view, turns=2, scan_size=0.5)
        lesson = LESSONS[kind].write(seen)
        labels = []
        for message in lesson.messages:
            if isinstance(message, Words):
                continue
            for stamp, frame in zip(message.content, message.content[1:], strict=False):
                if isinstance(frame, Tensor):
                    index = round(float(re.findall(r"<([\d.]+) seconds>", stamp)[-1]) * FPS)
                    budget = frame.shape[-2] * frame.shape[-1]
                    shown = view.show(seen.frames, [index], budget)[0]
                    torch.testing.assert_close(frame, shown, rtol=0, atol=0)
                    windows = [one.window for one in annotation_of(number).findings]
                    time = index / FPS
                    labels.append(
                        float(any(w.start_seconds <= time < w.end_seconds for w in windows))
                    )
        assert list(lesson.frame_labels) == labels
        encoded = encoder.encode(lesson)
        batch = encoder.collate(encoded)
        expected = [
            (row, at)
            for row, one in enumerate(encoded)
            for at in range(1, len(one.tokens))
            if one.tokens[at - 1] == pad != one.tokens[at]
        ]
        assert batch["frame_ends"].tolist() == [list(one) for one in expected]
        ends = encoder.tokenizer.convert_tokens_to_ids("<|vision_end|>")
        assert all(batch["input_ids"][row, at] == ends for row, at in expected)
        assert len(batch["frame_labels"]) == len(expected) == len(batch["image_grid_thw"])
        assert encoded[-1].frame_labels == lesson.frame_labels
        sizes = [tuple(frame.shape[-2:]) for one in encoded for frame in one.frames]
        grid = [(int(h) * 4, int(w) * 4) for _, h, w in batch["image_grid_thw"]]
        assert grid == sizes
        tokens = sum(h * w // judge.patch_factor**2 for h, w in sizes)
        assert int((batch["input_ids"] == pad).sum()) == tokens
        assert int(batch["mm_token_type_ids"].sum()) == tokens


def watched(
    judge: LocalJudge, asked: JudgeSettings, answers: dict[str, str]
) -> tuple[LocalJudge, list[TokenizedConversation]]:
    """A judge that finds every clip suspicious and says what it is told to, and all it reads."""
    twin = judge.asked_as(settings=asked)
    twin._reader = copy.copy(judge._reader)
    read: list[TokenizedConversation] = []

    def note(*arguments: Any) -> Iterator[Any]:
        for rows, batch in BatchReader.read(twin._reader, *arguments):
            read.extend(batch.conversations)
            yield rows, batch

    def write(*arguments: Any, prefix: str, **more: Any) -> list[str]:
        more["max_new_tokens"] = 1
        LocalJudge.generate(twin, *arguments, prefix=prefix, **more)
        return [answers[prefix]]

    def weigh(*arguments: Any, **more: Any) -> Tensor:
        log_probs = LocalJudge.choice_log_probs(twin, *arguments, **more)
        return torch.tensor([[-9.0] + [-1.0] * (log_probs.shape[1] - 1)])

    twin._reader.read, twin.generate, twin.choice_log_probs = note, write, weigh
    return twin, read


@pytest.mark.parametrize("number", [BROKEN, CLEAN])
@pytest.mark.parametrize("fast", [False, True])
def test_lessons_are_what_is_read_at_work(
    judge: LocalJudge, view: View, number: int, fast: bool
) -> None:
    """Both turns, by the judge itself on the same clip with the same windows."""
    seen = seen_as(number, view, exact_windows=1.0, verdict_only=float(fast), reasons=1.0)
    lesson = LESSONS["inspect"].write(seen)
    encoder = encoder_of(judge, decision_weight=5.0)
    encoded = encoder.encode(lesson)
    call, answer = (one.text for one in said(lesson))
    # A full answer that the judge would write behind the windows of the lesson.
    whole = LESSONS["inspect"].write(
        seen_as(number, view, exact_windows=1.0, verdict_only=0.0, reasons=1.0)
    )
    full = said(whole)[1].text
    twin, read = watched(judge, view.settings, {TOOL_CALL_PREFIX: call, FINDINGS_PREFIX: full})
    scorer = CaCScorer(twin, mode="fast" if fast else "full")
    (report,) = scorer.inspect([seen.frames.float() / 255], fps=FPS)
    assert report.error is None
    first, last = encoded[0], encoded[-1]
    scan, called, *second = [one.tokens for one in read]
    # Turn 1: the choice is weighed behind the opening, the call written behind its first word.
    assert first.tokens[: len(scan)] == scan
    assert first.tokens[: len(called)] == called
    assert len(called) == len(scan) + 1
    # Turn 2: the verdict is weighed where the lesson decides.
    begun = second[-1]
    assert last.tokens[: len(begun)] == begun
    assert encoder.tokenizer.decode(last.tokens[len(begun) :]).removesuffix(END) in (
        " clean",
        " anomalous",
    )
    assert [weight for weight in last.weights[len(begun) :] if weight] == [
        *[5.0] * (len(last.tokens) - len(begun) - (not fast)),
        *[1.0] * (not fast),
    ]
    if not fast:
        assert last.tokens[: len(second[0])] == second[0]
        assert encoder.tokenizer.decode(second[0]).endswith(FINDINGS_PREFIX)
    assert answer.startswith(VERDICT_PREFIX) == fast
    assert len(last.frames) == len(read[-1].frames)
    assert all(torch.equal(a, b) for a, b in zip(last.frames, read[-1].frames, strict=True))


def test_alignment_is_asked_as_at_work(judge: LocalJudge, view: View) -> None:
    seen = seen_as(BROKEN, view, other="a red <think>x</think> circle", wrong_prompts=1.0)
    lesson = LESSONS["alignment"].write(seen)
    encoder = encoder_of(judge)
    (encoded,) = encoder.encode(lesson)
    twin, read = watched(judge, view.settings, {})
    PromptAlignment(twin)(seen.frames[None].float() / 255, [seen.other_prompt], fps=FPS)
    tokens = read[0].tokens
    assert encoded.tokens[: len(tokens)] == tokens
    assert encoder.tokenizer.decode(encoded.tokens[len(tokens) :]) == "No" + END
    assert not any(encoded.weights[: len(tokens)])


def test_a_template_that_rewrites_turns_gives_a_sequence_for_each(judge: LocalJudge) -> None:
    """Qwen3.5 drops the empty thoughts of what was said before the user's last turn."""
    view = View(VIEWS["brief"], judge.family, judge.patch_factor)
    encoder = encoder_of(judge)
    rewrites = judge.family.name.startswith("qwen3_5")
    lesson = LESSONS["frame"].write(seen_as(BROKEN, view, turns=2))
    encoded = encoder.encode(lesson)
    assert len(encoded) == (2 if rewrites else 1)
    assert [len(one.frames) for one in encoded] == ([1, 2] if rewrites else [2])
    for number, one in enumerate(encoded):
        # Each sequence but the last token is what a judge would have read before it answered.
        plain = [
            Message("assistant", (turn.text,)) if isinstance(turn, Words) else turn
            for turn in lesson.messages[: 2 * number + 1 if rewrites else 3]
        ]
        (read,) = encoder.renderer.tokenize([plain], [""], ())
        assert one.tokens[: len(read.tokens)] == read.tokens
    # The tool's answer is none of the user's turns.
    both = LESSONS["inspect"].write(seen_as(BROKEN, view, exact_windows=1.0))
    assert len(encoder.encode(both)) == 1
    # A turn that is shown and not taught makes no sequence of its own.
    first, second, *rest = lesson.messages
    shown = Lesson((first, Words.shown(second.text), *rest), (), lesson.frame_labels)
    (one,) = encoder.encode(shown)
    assert learnt(encoder, one) == to_be_learnt(said(lesson)[1])
    assert len(one.frames) == 2


@pytest.mark.parametrize("number", [BROKEN, CLEAN])
def test_answers_give_the_annotation_back(judge: LocalJudge, number: int) -> None:
    view = View(VIEWS["full"], judge.family, judge.patch_factor, CLASSES)
    seen = seen_as(number, view, exact_windows=1.0, verdict_only=0.0, boxes=9)
    call, answer = said(LESSONS["inspect"].write(seen))
    side = LESSONS["inspect"].write(seen).messages[-2].frames[0].shape
    true = [near(one.window) for one in annotation_of(number).findings]
    (alone,) = said(LESSONS["scan"].write(seen))
    windows = parse_scan_answer(alone.text, seen.seconds, judge.family.call_format)
    assert [one.to_json() for one in windows] == true
    if number == BROKEN:
        assert call == alone
    check_findings(answer.text, seen, *side[-2:])
    for kind in ("whole", "frame"):
        lesson = LESSONS[kind].write(seen)
        frame = lesson.messages[-2].frames[0]
        text = said(lesson)[0].text
        if kind == "whole":
            check_findings(text, seen, *frame.shape[-2:])
            continue
        reader = judge.family.box_reader(*frame.shape[-2:])
        found = parse_findings(text, seen.seconds, box_reader=reader)
        assert bool(found) == bool(lesson.frame_labels[0])
        for one in found:
            ((box,), index) = one.boxes, round(one.window.start_seconds * FPS)
            (true_box,) = [
                b for b in seen.findings[0].boxes if abs(b.time_seconds - index / FPS) < 1e-6
            ]
            assert box.coordinates == pytest.approx(true_box.coordinates, abs=1e-2)
            assert one.window.length_seconds == pytest.approx(1 / FPS, abs=0.01)


@pytest.mark.parametrize("kind", TASKS)
def test_tasks_give_the_annotation_back(kind: str) -> None:
    clip = annotation_of(BROKEN)
    right = {
        "qa": clip.answer,
        "grounding": tuple(one.window for one in clip.findings),
        "classification": clip.category,
        "description": clip.description,
    }[kind]
    for thinking in (0.0, 1.0):
        lesson = LESSONS[kind].write(seen_as(BROKEN, thinking=thinking))
        task = Task(
            kind=kind,
            thinking=bool(thinking),
            wording="brief",
            classes=CLASSES if kind == "classification" else (),
        )
        answer = parse_task_answer(task, said(lesson)[0].text, clip)
        if kind == "grounding":
            assert [one.to_json() for one in answer.value] == [near(one) for one in right]
        else:
            assert answer.value == right
        assert answer.final.thinking == (clip.reasoning if thinking else None)


def decisive(judge: LocalJudge, seen: ClipInView, kind: str) -> list[str]:
    """What the tokens say that decide, sequence by sequence."""
    encoder = encoder_of(judge, decision_weight=5.0)
    return [
        encoder.tokenizer.decode(
            [token for token, weight in zip(one.tokens, one.weights, strict=True) if weight == 5.0]
        )
        for one in encoder.encode(LESSONS[kind].write(seen))
    ]


def test_what_decides_weighs_more_and_nothing_else_does(judge: LocalJudge) -> None:
    view = View(VIEWS["brief"], judge.family, judge.patch_factor, CLASSES)

    def of(kind: str, number: int, **options: float) -> str:
        return "|".join(decisive(judge, seen_as(number, view, **options), kind))

    assert of("scan", BROKEN) == "<tool_call>"
    assert of("scan", CLEAN) == "Verdict: clean"
    both = of("inspect", BROKEN, exact_windows=1.0)
    assert both.replace("|", "") == "<tool_call> anomalous"
    assert of("inspect", BROKEN, exact_windows=0.0) == " anomalous"
    assert of("inspect", CLEAN, verdict_only=1.0) == " clean"
    assert of("verdict", BROKEN) == " anomalous"
    assert of("whole", CLEAN) == " clean"
    assert of("frame", BROKEN, clean_frames=0.0) == " anomalous"
    assert of("frame", BROKEN, clean_frames=1.0) == " clean"
    assert of("alignment", BROKEN) == "Yes"
    for kind in ("caption", *TASKS):
        assert of(kind, BROKEN) == ""


COUNT = 120


def share(option: str, value: float, kind: str, hit: Any, view: View) -> float:
    """How many lessons of many seeds show something."""
    lessons = (
        LESSONS[kind].write(seen_as(BROKEN, view, seed, "a red circle", **{option: value}))
        for seed in range(COUNT)
    )
    return sum(bool(hit(one)) for one in lessons) / COUNT


SHARES: dict[str, tuple[str, Any]] = {
    "exact_windows": ("inspect", lambda one: said(one)[0].weights),
    "verdict_only": ("inspect", lambda one: said(one)[1].text.startswith(VERDICT_PREFIX)),
    "reasons": ("whole", lambda one: '"why": "the' in said(one)[0].text),
    "wrong_prompts": ("alignment", lambda one: said(one)[0].text == "No"),
    "clean_frames": ("frame", lambda one: said(one)[0].text.endswith(" clean")),
    "scan_size": ("frame", lambda one: one.messages[0].frames[0].shape[-1] == 32),
    "thinking": ("qa", lambda one: "<think>" in said(one)[0].text),
    "reflection": ("qa", lambda one: "<reflection>" in said(one)[0].text),
}


@pytest.mark.parametrize("option", SHARES)
def test_shares_are_kept(option: str) -> None:
    kind, hit = SHARES[option]
    view = replace(QUICK, settings=VIEWS["brief"]) if option == "scan_size" else QUICK
    for value in (0.0, 1.0, 0.3):
        found = share(option, value, kind, hit, view)
        # Five standard deviations of a share of so many.
        assert abs(found - value) <= 5 * math.sqrt(value * (1 - value) / COUNT)


def squares(**changes: Any) -> AnnotatedClip:
    """The annotation of the broken clip, with something changed."""
    return replace(annotation_of(BROKEN), **changes)


def fault(start: float, end: float, *times: float, **more: Any) -> Finding:
    boxes = tuple(Box(time, 0.25, 0.25, 0.5, 0.75) for time in times)
    return Finding("vanish", TimeWindow(start, end), boxes, **more)


def test_boxes_taught_are_few_and_of_frames_that_are_shown() -> None:
    times = [index / FPS for index in range(FRAMES)]
    clip = squares(findings=(fault(0, FRAMES / FPS, *times),))
    for most in (1, 2, 3, 5):
        lesson = LESSONS["whole"].write(seen_as(clip=clip, boxes=most))
        (one,) = parse_findings(said(lesson)[0].text, FRAMES / FPS)
        scanned = [index / FPS for index in range(0, FRAMES, 2)]
        taught = [min(scanned, key=lambda t: abs(t - box.time_seconds)) for box in one.boxes]
        assert len(taught) == len(set(taught)) == most
        shown = [round(time, 2) for time in scanned]
        assert all(box.time_seconds in shown for box in one.boxes)
        if most > 1:
            assert (taught[0], taught[-1]) == (scanned[0], scanned[-1])
    # A box on a frame that turn 1 does not show is better than none.
    odd = squares(findings=(fault(0.125, 0.25, 0.125),))
    (one,) = parse_findings(said(LESSONS["whole"].write(seen_as(clip=odd)))[0].text, 1.6)
    assert [box.time_seconds for box in one.boxes] == [0.12]


def test_a_fault_that_outlasts_the_clip_is_cut_where_it_ends() -> None:
    end = FRAMES / FPS
    clip = squares(
        findings=(fault(1.0, 9.0, 1.0, 1.5, 3.0), fault(7.0, 9.0)),
        captions=(Caption(TimeWindow(1, 9), "late"), Caption(TimeWindow(end, 9), "never")),
        duration_seconds=9.0,
    )
    seen = seen_as(clip=clip, exact_windows=1.0, verdict_only=0.0)
    assert seen.findings == (fault(1.0, end, 1.0, 1.5),)
    assert [one.text for one in seen.clip.captions] == ["late"]
    assert seen.labels(range(FRAMES)) == (0.0,) * 8 + (1.0,) * 5
    call, answer = said(LESSONS["inspect"].write(seen))
    assert parse_scan_answer(call.text, end) == (TimeWindow(1.0, 1.62),)
    assert len(parse_findings(answer.text, end)) == 1
    grounded = said(LESSONS["grounding"].write(seen))[0].text
    assert "<glue>[1.00, 1.62]</glue>" in grounded
    (caption,) = said(LESSONS["caption"].write(seen_as(clip=clip, turns=5)))
    assert caption.text == "late"


@pytest.mark.parametrize("frame", [0, 5, FRAMES - 1])
def test_a_fault_of_one_frame(frame: int) -> None:
    start, end = frame / FPS, (frame + 1) / FPS
    clip = squares(findings=(fault(start, end, start, why="x"),))
    seen = seen_as(clip=clip, exact_windows=1.0, verdict_only=0.0)
    assert seen.labels(range(FRAMES)) == tuple(float(i == frame) for i in range(FRAMES))
    call, answer = said(LESSONS["inspect"].write(seen))
    (window,) = parse_scan_answer(call.text, seen.seconds)
    assert window.to_json() == near(TimeWindow(start, end))
    (one,) = parse_findings(answer.text, seen.seconds)
    assert one.window.to_json() == near(TimeWindow(start, end))
    assert len(one.boxes) == 1
    marked = LESSONS["frame"].write(seen_as(clip=clip, clean_frames=0.0))
    assert marked.frame_labels == (1.0,)
    misplaced = LESSONS["inspect"].write(seen_as(clip=clip, exact_windows=0.0, verdict_only=0.0))
    assert len(parse_findings(said(misplaced)[1].text, seen.seconds)) == 1


def test_findings_that_touch_are_one_window_and_stay_two_findings() -> None:
    clip = squares(findings=(fault(1.0, 1.25), fault(0.25, 0.5), fault(0.5, 0.75)))
    seen = seen_as(clip=clip, exact_windows=1.0, verdict_only=0.0)
    call, answer = said(LESSONS["inspect"].write(seen))
    assert parse_scan_answer(call.text, 1.6) == (TimeWindow(0.25, 0.75), TimeWindow(1.0, 1.25))
    starts = [one.window.start_seconds for one in parse_findings(answer.text, 1.6)]
    assert starts == [0.25, 0.5, 1.0]


NO_BOXES = squares(findings=(fault(0.5, 1.0),))
NO_WINDOWS = squares(findings=(), verdict="anomalous")
UNKNOWN = squares(findings=(), verdict=None)
BARE = AnnotatedClip(path="a.mkv")
MANY = squares(findings=tuple(fault(i / 10, i / 10 + 0.05) for i in range(17)))
FITTING = {
    "clean": (annotation_of(CLEAN), set(LESSONS)),
    "broken": (annotation_of(BROKEN), set(LESSONS)),
    "no boxes": (NO_BOXES, set(LESSONS) - {"frame"}),
    "no windows": (NO_WINDOWS, set(LESSONS) - {"scan", "inspect", "whole", "frame", "grounding"}),
    "unknown": (UNKNOWN, {"caption", "alignment", "qa", "classification", "description"}),
    "bare": (BARE, set()),
    "too many windows": (
        MANY,
        {"verdict", "caption", "alignment", "qa", "classification", "description"},
    ),
    "tags alone": (
        replace(BARE, prompt="<think></think>", question="Who?", description="a <answer> b"),
        set(),
    ),
}


@pytest.mark.parametrize("name", FITTING)
def test_clips_fit_the_kinds_that_their_annotation_says_enough_for(name: str) -> None:
    clip, kinds = FITTING[name]
    assert {kind for kind, one in LESSONS.items() if one.fits(clip, QUICK)} == kinds
    for kind in kinds:
        assert said(LESSONS[kind].write(seen_as(clip=clip)))


def test_what_is_not_known_is_no_label() -> None:
    for clip in (NO_WINDOWS, UNKNOWN, BARE):
        seen = seen_as(clip=clip)
        assert all(math.isnan(one) for one in seen.labels(range(FRAMES)))
        assert math.isnan(seen.clip_label) == (clip is not NO_WINDOWS)
    assert seen_as(clip=NO_WINDOWS).clip_label == 1.0
    assert LESSONS["verdict"].write(seen_as(clip=NO_WINDOWS)).clip_label == 1.0
    assert said(LESSONS["verdict"].write(seen_as(clip=NO_WINDOWS)))[0].text == "Verdict: anomalous"


def test_classes_must_be_given() -> None:
    with pytest.raises(ValueError, match=r"classes must be at least two for lessons.classificat"):
        LESSONS["classification"].fits(BARE, replace(QUICK, classes=("one",)))


def test_a_task_is_asked_without_what_the_clip_lacks() -> None:
    """A first answer that is a letter is none to grounding; a judge on rewards finds its own."""

    def tags(kind: str, clip: AnnotatedClip, written: bool = True) -> str:
        seen = seen_as(clip=clip, reflection=1.0, written=written)
        task = LESSONS[kind].write(seen) if written else None
        if task is None:
            asked = task_of(kind, seen)
            return "think" * asked.thinking + " reflection" * asked.reflection
        return " ".join(re.findall(r"<(\w+)>", said(task)[0].text))

    attempt = "think answer"
    whole = annotation_of(BROKEN)
    assert tags("qa", whole) == f"{attempt} reflection {attempt}"
    assert tags("grounding", whole) == f"{attempt} glue"
    assert tags("qa", replace(whole, extra={})) == attempt
    assert tags("qa", replace(whole, reasoning=None)) == "answer reflection answer"
    assert tags("qa", replace(whole, reasoning="a <think> b", reflection=None)) == "answer"
    bare = replace(whole, reasoning=None, reflection=None)
    assert tags("grounding", bare, written=False) == "think reflection"


def test_prompts_known_not_to_fit_are_never_swapped() -> None:
    for known, answer in (("no", "No"), ("yes", "Yes")):
        clip = squares(extra={SHOWS_PROMPT: known})
        for seed in range(4):
            seen = seen_as(clip=clip, seed=seed, other="a red circle", wrong_prompts=1.0)
            lesson = LESSONS["alignment"].write(seen)
            assert said(lesson)[0].text == answer
            assert clip.prompt in lesson.messages[0].text
    swapped = LESSONS["alignment"].write(seen_as(other="a red circle", wrong_prompts=1.0))
    assert "a red circle" in swapped.messages[0].text
    nothing = LESSONS["alignment"].write(seen_as(other="<think></think>", wrong_prompts=1.0))
    assert said(nothing)[0].text == "Yes"


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_misplaced_windows_stay_inside_the_clip(data: st.DataObject) -> None:
    frames = data.draw(st.integers(2, 40))
    fps = data.draw(st.sampled_from([1.0, 7.5, 8.0, 23.976, 30.0]))
    reach = data.draw(st.floats(0, 3))
    seconds = frames / fps
    findings = []
    for _ in range(data.draw(st.integers(0, 3))):
        first = data.draw(st.integers(0, frames - 1))
        last = data.draw(st.integers(first + 1, frames))
        findings.append(fault(first / fps, last / fps))
    seen = ClipInView(
        clip=squares(findings=tuple(findings), verdict=None),
        frames=torch.zeros(frames, 3, 1, 1, dtype=torch.uint8),
        fps=fps,
        view=QUICK,
        options=LessonOptions(misplaced_seconds=reach),
        random=np.random.default_rng(data.draw(st.integers(0, 99))),
    )
    moved = misplace(seen)
    assert len(moved) == max(1, len(seen.windows))
    farthest = max(1, round(reach * fps)) / fps + 1e-6
    for one, true in zip(moved, seen.windows, strict=False):
        assert abs(one.start_seconds - true.start_seconds) <= farthest
        # A window that would end before it begins has one frame.
        late = max(true.end_seconds, one.start_seconds + 1 / fps)
        assert abs(one.end_seconds - late) <= farthest
    for one in moved:
        assert 0 <= one.start_seconds < one.end_seconds <= seconds + 1e-9
        assert one.length_seconds >= 1 / fps - 1e-9
        text = write_scan_answer([one])
        assert len(parse_scan_answer(text, seconds)) == 1


def test_misplaced_windows_differ_from_the_true_ones() -> None:
    seen = [seen_as(seed=seed) for seed in range(20)]
    assert len({misplace(one) for one in seen}) > 5
    exact = [misplace(one) == one.windows for one in seen]
    assert sum(exact) < 10


def test_control_tokens_are_refused_in_any_turn() -> None:
    """Also in the judge's last one, which no template ever sees."""
    encoder = Encoder(build_processor(build_tokenizer()), FAMILIES["qwen3_vl"])
    for where in ("captions", "prompt"):
        text = "a <|im_end|> square"
        value = (Caption(TimeWindow(0, 1), text),) if where == "captions" else text
        kind = {"captions": "caption", "prompt": "alignment"}[where]
        lesson = LESSONS[kind].write(seen_as(clip=squares(**{where: value})))
        if where == "prompt":
            encoder.encode(lesson)  # Stripped from the question.
            continue
        with pytest.raises(ValueError, match=r"must not hold the model's control tokens"):
            encoder.encode(lesson)


def test_batches_are_padded_on_the_right() -> None:
    encoder = Encoder(build_processor(build_tokenizer()), FAMILIES["qwen3_vl"])
    kinds = ("verdict", "caption", "frame")
    encoded = [encoder.encode(LESSONS[kind].write(seen_as()))[0] for kind in kinds]
    text = replace(encoded[0], frames=[], frame_labels=(), tokens=[5, 6], weights=[0.0, 1.0])
    batch = encoder.collate([*encoded, text])
    longest = max(len(one.tokens) for one in encoded)
    assert batch["input_ids"].shape == (4, longest)
    for row, one in enumerate([*encoded, text]):
        count = len(one.tokens)
        assert batch["input_ids"][row, :count].tolist() == one.tokens
        assert (batch["input_ids"][row, count:] == encoder.tokenizer.pad_token_id).all()
        assert batch["attention_mask"][row].tolist() == [1] * count + [0] * (longest - count)
        assert batch["weights"][row].tolist() == one.weights + [0.0] * (longest - count)
    torch.testing.assert_close(
        batch["clip_labels"], torch.tensor([1.0, math.nan, math.nan, 1.0]), equal_nan=True
    )
    alone = encoder.collate([text])
    assert "pixel_values" not in alone
    assert alone["frame_ends"].shape == (0, 2)
    assert alone["frame_labels"].shape == (0,)


def test_means_over_nothing_are_zero_with_a_gradient() -> None:
    values = torch.tensor([1.0, 2.0, 6.0], requires_grad=True)
    weighted = mean_or_zero(values, torch.tensor([1.0, 0.0, 3.0]))
    assert weighted.item() == pytest.approx((1 + 18) / 4)
    none = mean_or_zero(values, torch.zeros(3))
    none.backward()
    assert none.item() == 0
    assert values.grad.tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"boxes": 0}, r"options.boxes must be a whole number of at least 1, got 0"),
        ({"boxes": 1.5}, r"options.boxes must be a whole number of at least 1, got 1.5"),
        ({"turns": math.inf}, r"options.turns must be a whole number of at least 1, got inf"),
        ({"turns": math.nan}, r"options.turns must be a whole number of at least 1, got nan"),
        ({"misplaced_seconds": -1}, r"options.misplaced_seconds must be at least 0, got -1"),
        ({"thinking": 1.5}, r"options.thinking must be in \[0, 1\], got 1.5"),
        ({"thinking": math.nan}, r"options.thinking must be in \[0, 1\], got nan"),
        ({"thinkin": 1}, r"options must name some of .*, got 'thinkin'; did you mean 'thinking'\?"),
        ({"written": 1}, r"options must name some of .*, got 'written'$"),
    ],
)
def test_options_are_refused_by_their_names(options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LessonOptions.build(options)


def test_frames_carry_the_captions_of_their_stretches() -> None:
    clip = squares(
        captions=(
            Caption(TimeWindow(0.25, 0.75), "first"),
            Caption(TimeWindow(0.5, 1.0), "second"),
        )
    )
    lesson = LESSONS["scan"].write(seen_as(clip=clip))
    # Turn 1 shows every second frame, each a quarter of a second after the other.
    assert lesson.frame_captions == ("", "first", "first", "second", "", "", "")
    encoder = Encoder(build_processor(build_tokenizer()), FAMILIES["qwen3_vl"], caption_tokens=3)
    (encoded,) = encoder.encode(lesson)
    labels = encoder.collate([encoded])["frame_captions"]
    assert labels.shape == (7, 3)
    for row, text in zip(labels.tolist(), lesson.frame_captions, strict=True):
        tokens = encoder.tokenizer(text)["input_ids"][:3]
        assert row == tokens + [-100] * (3 - len(tokens))
    # Without captions there is nothing to say.
    bare = LESSONS["scan"].write(seen_as(clip=squares(captions=())))
    assert (encoder.collate(encoder.encode(bare))["frame_captions"] == -100).all()
    inspect = LESSONS["inspect"].write(seen_as(clip=clip))
    assert len(inspect.frame_captions) == len(inspect.frame_labels)
    none = Encoder(build_processor(build_tokenizer()), FAMILIES["qwen3_vl"])
    assert none.collate(none.encode(lesson))["frame_captions"].shape == (7, 0)
