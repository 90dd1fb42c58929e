"""What the toy judge is taught: two-turn conversations and dense labels from the renderer's truth.

A lesson is one conversation in token form. Only the judge's own words carry loss. Beside the words,
every frame carries dense labels (which colours are where, which fault is on), read off the hidden
state behind the frame by heads that training alone uses: localisation is learnt first and makes
the verdict learnable.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from cac_reward.answers import write_findings, write_scan_answer, write_tool_call
from cac_reward.frames import inspect_indices, resize_to_budget
from cac_reward.questions import (
    ALIGNMENT_CHOICES,
    CLEAN_ANSWER,
    JUDGE_TEXT,
    SCAN_TEXT,
    VERDICT_CHOICES,
    VERDICT_PREFIX,
    alignment_question,
    write_time,
)
from cac_reward.report import Box, Finding, TimeWindow
from examples.toy_world.annotated_clips import WHY, snap
from examples.toy_world.base_judge import INSPECT_SIDE, PATCH, SCAN_SIDE, SETTINGS
from examples.toy_world.world import COLOURS, FAULTS, MOTIONS, SHAPES, Clip

MAX_BOXES = 3
DECISION_WEIGHT = 4.0


@dataclass
class Lesson:
    """One conversation, tokenised."""

    tokens: list[int]
    weights: list[float]
    """Loss weight of predicting each token; 0 for what the judge does not say."""
    frames: list[tuple[int, int]]
    """(frame index, side in pixels) of every image, in order."""
    clip: Clip


def protocol_corpus() -> list[str]:
    """Every word the judge reads or says, for its tokenizer."""
    things = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    questions = [
        alignment_question(f"a {colour} {shape} moving {motion} and", "brief")
        for colour, shape in things
        for motion in MOTIONS
    ]
    window, boxes = TimeWindow(0.5, 1.0), (Box(0.5, 0.125, 0.25, 0.5, 0.75),) * 2
    answers = [
        write_findings([Finding(fault, window, boxes, 1, f"{colour} {shape} {WHY[fault]}")])
        for fault in FAULTS
        for colour, shape in things
    ]
    turns = ["user\n", "assistant\n", SCAN_TEXT, JUDGE_TEXT + "\n", CLEAN_ANSWER]
    turns += [*ALIGNMENT_CHOICES, VERDICT_PREFIX + VERDICT_CHOICES[1]]
    return questions + answers + [*turns, write_tool_call([window, window])] * 50


def clip_windows(clip: Clip) -> list[TimeWindow]:
    """Windows of all faults, merged where they touch."""
    merged: list[tuple[float, float]] = []
    for start, end in sorted(fault.window for fault in clip.faults):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((start, end))
    return [TimeWindow(*window) for window in merged]


def clip_findings(clip: Clip) -> list[Finding]:
    """The truth as turn 2 states it, at most MAX_BOXES boxes per finding."""
    findings = []
    for fault in sorted(clip.faults, key=lambda f: f.first_frame):
        picks = np.unique(np.linspace(0, len(fault.boxes) - 1, MAX_BOXES).round().astype(int))
        boxes = tuple(Box(fault.boxes[i][0], *snap(fault.boxes[i][1])) for i in picks)
        why = f"{fault.target} {WHY[fault.type]}"
        window = TimeWindow(*fault.window)
        findings.append(Finding(fault.type, window, boxes, fault.severity, why))
    return findings


def misplace(
    windows: list[TimeWindow], clip: Clip, random: np.random.Generator
) -> list[TimeWindow]:
    """Windows as a judge in error would ask for them: shifted by up to two frames, or needless."""
    frames, fps = len(clip.frames), clip.fps
    if not windows:
        first = int(random.integers(0, frames - 3))
        last = min(frames, first + int(random.integers(2, 7)))
        return [TimeWindow(first / fps, last / fps)]
    moved = []
    for window in windows:
        early, late = random.integers(-2, 3, size=2)
        first = min(max(0, round(window.start_seconds * fps) + early), frames - 1)
        last = min(frames, max(round(window.end_seconds * fps) + late, first + 1))
        moved.append(TimeWindow(float(first / fps), float(last / fps)))
    return moved


class LessonWriter:
    """Writes conversations with one tokenizer."""

    def __init__(self, tokenizer) -> None:
        self.tokenizer = tokenizer
        self.image = tokenizer.convert_tokens_to_ids("<|image_pad|>")
        self.image_end = tokenizer.convert_tokens_to_ids("<|vision_end|>")
        self.encode = lru_cache(maxsize=50_000)(self._encode)

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False).input_ids)

    def _frames(self, lesson: Lesson, frames: list[int], side: int) -> None:
        count = (side // PATCH) ** 2
        for frame in frames:
            stamp = write_time(frame / lesson.clip.fps)
            ids = self.encode(f"{stamp}<|vision_start|><|image_pad|><|vision_end|>")
            at = ids.index(self.image)
            lesson.tokens += [*ids[:at], *[self.image] * count, *ids[at + 1 :]]
            lesson.frames.append((frame, side))
        lesson.weights += [0.0] * (len(lesson.tokens) - len(lesson.weights))

    def _text(self, lesson: Lesson, text: str, weights: float | list[float] = 0.0) -> None:
        ids = self.encode(text)
        lesson.tokens += ids
        if isinstance(weights, float):
            weights = [weights] * len(ids)
        lesson.weights += weights

    def scan(self, clip: Clip, question: str) -> Lesson:
        """Turn 1 up to where the judge begins to speak."""
        lesson = Lesson([], [], [], clip)
        self._text(lesson, "<|im_start|>user\n")
        self._frames(lesson, list(range(len(clip.frames))), SCAN_SIDE)
        self._text(lesson, f"{question}<|im_end|>\n<|im_start|>assistant\n")
        return lesson

    def answer(self, lesson: Lesson, text: str, learn: bool, decisions: int) -> None:
        """The judge's words; the first `decisions` tokens are what the verdict hangs on."""
        ids = self.encode(text + "<|im_end|>")
        weights = [DECISION_WEIGHT] * decisions + [1.0] * (len(ids) - decisions)
        self._text(lesson, text + "<|im_end|>", weights if learn else 0.0)

    def scan_lesson(self, clip: Clip) -> Lesson:
        """Turn 1: a clean verdict, or a call for the windows that hold faults."""
        lesson = self.scan(clip, SCAN_TEXT)
        self.answer(lesson, write_scan_answer(clip_windows(clip)), True, 1)
        return lesson

    def alignment_lesson(self, clip: Clip, prompt: str, matches: bool) -> Lesson:
        """Whether the clip shows a prompt."""
        lesson = self.scan(clip, alignment_question(prompt, "brief"))
        self.answer(lesson, ALIGNMENT_CHOICES[0 if matches else 1], True, 1)
        return lesson

    def inspect_lesson(self, clip: Clip, random: np.random.Generator) -> Lesson:
        """Both turns. Misplaced and needless windows are shown but never taught."""
        windows = clip_windows(clip)
        lesson = self.scan(clip, SCAN_TEXT)
        exact = bool(windows) and random.random() < 0.5
        if not exact:
            windows = misplace(windows, clip, random)
        self.answer(lesson, write_tool_call(windows), exact, 1)
        self._text(lesson, "\n<|im_start|>user\n<tool_response>\n")
        frames = inspect_indices(windows, len(clip.frames), clip.fps, SETTINGS.inspect)
        self._frames(lesson, frames, INSPECT_SIDE)
        self._text(lesson, f"{JUDGE_TEXT}\n</tool_response><|im_end|>\n<|im_start|>assistant\n")
        if random.random() < 0.5:
            self._text(lesson, VERDICT_PREFIX)
            self._text(lesson, VERDICT_CHOICES[1 if clip.faults else 0], DECISION_WEIGHT)
        else:
            self.answer(lesson, write_findings(clip_findings(clip)), True, 0)
            lesson.weights[-2] = DECISION_WEIGHT
        return lesson


def lesson_random(clip: Clip, salt: int) -> np.random.Generator:
    """Randomness of one lesson: a function of the clip and of when it is taught."""
    return np.random.default_rng([clip.seed, salt, zlib.crc32(clip.prompt.encode())])


def patches(frames: Tensor, side: int) -> Tensor:
    """Frames [N 3 H W] in [0, 1] as Qwen3-VL's pixel rows [N * patches, 3 * 2 * PATCH * PATCH].

    The same numbers its image processor gives for the resized picture (a test holds this).
    """
    frames = resize_to_budget(frames, side * side, PATCH)
    grid = side // PATCH
    cut = ((frames - 0.5) / 0.5).reshape(len(frames), 3, grid, PATCH, grid, PATCH)
    cut = cut.permute(0, 2, 4, 1, 3, 5).reshape(len(frames) * grid * grid, 3, 1, PATCH, PATCH)
    return cut.expand(-1, -1, 2, -1, -1).reshape(len(cut), -1)


@dataclass
class DenseLabels:
    """What is true of single frames of a clip; colours in the order of COLOURS."""

    present: np.ndarray
    """[F 6] 1 where a colour is visible."""
    centre: np.ndarray
    """[F 6 2] relative centre of that colour."""
    shape: np.ndarray
    """[F 6] index into SHAPES."""
    fault: np.ndarray
    """[F 7] 1 where a fault of that type is on."""


def dense_labels(clip: Clip) -> DenseLabels:
    """Labels of every frame from the renderer's truth."""
    frames = len(clip.frames)
    labels = DenseLabels(
        np.zeros((frames, 6), np.float32),
        np.zeros((frames, 6, 2), np.float32),
        np.zeros((frames, 6), np.int64),
        np.zeros((frames, 7), np.float32),
    )
    table = np.array(list(COLOURS.values()), float)
    for track in reversed(clip.tracks):
        colour = np.abs(track.rgb[:, None] - table[None]).sum(2).argmin(1)
        seen = np.flatnonzero(track.alpha > 0.5)
        labels.present[seen, colour[seen]] = 1
        labels.centre[seen, colour[seen]] = track.centre[seen]
        labels.shape[seen, colour[seen]] = SHAPES.index(track.shape)
    for fault in clip.faults:
        labels.fault[fault.first_frame : fault.last_frame + 1, FAULTS.index(fault.type)] = 1
    return labels


def frames_to_tensor(frames: np.ndarray) -> Tensor:
    """[F H W 3] uint8 to [F 3 H W] floats in [0, 1]."""
    return torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255
