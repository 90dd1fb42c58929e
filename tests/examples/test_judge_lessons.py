"""The toy judge's lessons say exactly what the scorer will ask, and hold the renderer's truth."""

import numpy as np
import pytest
import torch

from cac_reward.answers import parse_findings, parse_tool_call
from cac_reward.frames import frame_times, inspect_indices, resize_to_budget
from cac_reward.judges.local import LocalJudge
from cac_reward.questions import Message, alignment_message, inspect_message, scan_message
from examples.toy_world import training_state
from examples.toy_world.annotated_clips import snap, wrong_prompt
from examples.toy_world.base_judge import SETTINGS
from examples.toy_world.judge_lessons import (
    LessonWriter,
    clip_findings,
    clip_windows,
    dense_labels,
    frames_to_tensor,
    lesson_random,
    patches,
)
from examples.toy_world.train_judge import JudgeModel, build_judge, collate
from examples.toy_world.world import COLOURS, FAULTS, render_clip, sample_prompts, split_of


@pytest.fixture(scope="module")
def judge():
    model, processor = build_judge()
    return LocalJudge(model.eval(), processor, judge_id="random", settings=SETTINGS)


@pytest.fixture(scope="module")
def writer(judge):
    return LessonWriter(judge._tokenizer)


def scan_frames(clip, judge):
    frames = frames_to_tensor(clip.frames)
    shown = resize_to_budget(frames, SETTINGS.scan.pixels, judge.patch_factor)
    return shown, frame_times(range(len(frames)), clip.fps)


def read_tokens(judge, conversation, prefix=""):
    return judge._reader.renderer.tokenize([conversation], [prefix], ())[0].tokens


def test_turn_1_is_what_the_scorer_asks(judge, writer):
    clip = render_clip(3, fault="vanish")
    asked = read_tokens(judge, scan_message(*scan_frames(clip, judge), "brief"))
    lesson = writer.scan_lesson(clip)
    assert lesson.tokens[: len(asked)] == asked
    assert all(weight == 0 for weight in lesson.weights[: len(asked)])
    assert all(weight > 0 for weight in lesson.weights[len(asked) :])
    said = judge._tokenizer.decode(lesson.tokens[len(asked) :]).removesuffix("<|im_end|>")
    windows = parse_tool_call(said, 13 / 8)
    assert [w.start_seconds for w in windows] == pytest.approx(
        [w.start_seconds for w in clip_windows(clip)], abs=0.006
    )


def test_the_alignment_question_is_what_the_scorer_asks(judge, writer):
    clip = render_clip(5, fault="none")
    shown, times = scan_frames(clip, judge)
    asked = read_tokens(judge, alignment_message(shown, times, clip.prompt, "brief"))
    lesson = writer.alignment_lesson(clip, clip.prompt, True)
    assert lesson.tokens[: len(asked)] == asked
    assert judge._tokenizer.decode(lesson.tokens[len(asked) :]) == "Yes<|im_end|>"


@pytest.mark.parametrize("fault", ["none", "teleport"])
def test_turn_2_is_what_the_scorer_asks(judge, writer, fault):
    clip = render_clip(8, fault=fault)
    for salt in range(6):
        random = lesson_random(clip, salt)
        lesson = writer.inspect_lesson(clip, random)
        text = judge._tokenizer.decode(lesson.tokens)
        call = text[text.index("<tool_call>") : text.index("</tool_call>")] + "</tool_call>"
        windows = parse_tool_call(call, 13 / 8)
        indices = inspect_indices(windows, 13, clip.fps, SETTINGS.inspect)
        shown = resize_to_budget(
            frames_to_tensor(clip.frames)[indices], SETTINGS.inspect.pixels, judge.patch_factor
        )
        conversation = (
            *scan_message(*scan_frames(clip, judge), "brief"),
            Message("assistant", (call,)),
            inspect_message(shown, frame_times(indices, clip.fps), "brief"),
        )
        asked = read_tokens(judge, conversation)
        assert lesson.tokens[: len(asked)] == asked
        said = judge._tokenizer.decode(lesson.tokens[len(asked) :]).removesuffix("<|im_end|>")
        verdict = "clean" if fault == "none" else "anomalous"
        assert said.endswith(f"Verdict: {verdict}")
        if said.startswith("{"):
            findings = parse_findings(said, 13 / 8)
            assert [f.type for f in findings] == [f.type for f in clip_findings(clip)]


def test_needless_and_misplaced_windows_are_never_taught(writer):
    clip = render_clip(8, fault="none")
    lesson = writer.inspect_lesson(clip, lesson_random(clip, 0))
    call = writer.encode("<tool_call>")[0]
    assert lesson.weights[lesson.tokens.index(call)] == 0


def test_patches_equal_the_image_processor(judge):
    frames = frames_to_tensor(render_clip(1).frames)
    for side in (24, 32):
        small = resize_to_budget(frames, side * side, 8)
        theirs = judge._reader.processor.image_processor(
            images=list(small), do_resize=False, do_rescale=False, return_tensors="pt"
        ).pixel_values
        torch.testing.assert_close(patches(frames, side), theirs)


def test_attention_by_picture_size_equals_the_stock_one(writer):
    torch.manual_seed(0)
    trained, (stock, _) = JudgeModel(), build_judge()
    stock.load_state_dict(trained.judge.state_dict())
    clips = [render_clip(seed) for seed in range(3)]
    lessons = [writer.inspect_lesson(clip, lesson_random(clip, 1)) for clip in clips]
    batch = collate(lessons, [frames_to_tensor(clip.frames) for clip in clips], writer)
    ours = trained.judge.model.visual(batch.pixels, batch.grid).pooler_output
    theirs = stock.model.visual(batch.pixels, batch.grid).pooler_output
    torch.testing.assert_close(ours, theirs)


def test_dense_labels_hold_the_truth():
    for seed in range(20):
        clip = render_clip(seed)
        labels = dense_labels(clip)
        for fault in clip.faults:
            on = np.flatnonzero(labels.fault[:, FAULTS.index(fault.type)])
            assert set(range(fault.first_frame, fault.last_frame + 1)) <= set(on)
        frame, colour = np.argwhere(labels.present > 0)[0]
        x, y = (labels.centre[frame, colour] * 32).astype(int)
        # A cross is hollow nowhere near its centre, so the pixel there has the object's colour.
        painted = clip.frames[frame, y, x].astype(int)
        assert np.abs(painted - np.array(list(COLOURS.values())[colour])).max() < 90


def test_wrong_prompts_are_wrong():
    for seed in range(50):
        clip = render_clip(seed)
        assert wrong_prompt(clip, np.random.default_rng(seed)) != clip.prompt


def test_snapped_boxes_have_area():
    assert snap((0.99, 0.5, 1.0, 0.5)) == (31 / 32, 16 / 32, 1.0, 17 / 32)


def test_training_and_evaluation_never_meet():
    train = {render_clip(training_state.training_seed(4, i)).prompt for i in range(300)}
    held_out = set(sample_prompts(64, 1, "evaluation"))
    assert not train & held_out
    assert all(split_of(prompt) == "train" for prompt in train)
    with pytest.raises(ValueError, match="training seeds must stay below 1000000000"):
        training_state.training_seed(10, 0)
