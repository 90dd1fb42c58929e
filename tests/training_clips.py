"""A folder of small lossless clips with annotations: a square that moves, whole or with a fault.

Every second clip has one fault: its square vanishes for some frames, or stands elsewhere. All that
any lesson needs is annotated, and all of it is true of the pixels.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cac_reward.data.annotations import AnnotatedClip, Caption
from cac_reward.data.storage import annotation_writer
from cac_reward.report import Box, Finding, TimeWindow
from examples.toy_world.annotated_clips import encode

FRAMES = 13
FPS = 8.0
SIDE = 32
"""Pixels of a frame's height and width."""
SQUARE = 8
"""Pixels of the square's side."""
COLOURS = {"red": (230, 30, 30), "green": (30, 200, 60), "blue": (40, 60, 230)}
FAULTS = {"vanish": "is gone", "teleport": "stands elsewhere"}
FILE = "clips.jsonl"


@dataclass(frozen=True, eq=False)
class SquareClip:
    """One clip and what is true of it."""

    frames: np.ndarray
    """[F H W 3] uint8."""
    annotation: AnnotatedClip


def square_clip(number: int, *, seed: int = 0, split: str = "train") -> SquareClip:
    """The clip of a number; odd ones are broken."""
    random = np.random.default_rng([seed, number])
    colour = str(random.choice(list(COLOURS)))
    left, top = (int(one) for one in random.integers(0, SIDE - SQUARE - FRAMES + 1, size=2))
    down = bool(random.integers(2))
    places = [(left, top + i) if down else (left + i, top) for i in range(FRAMES)]
    fault = str(random.choice(list(FAULTS))) if number % 2 else None
    start = int(random.integers(1, FRAMES - 5))
    stop = start + int(random.integers(2, 5))
    broken = range(start, stop) if fault else range(0)
    if fault == "teleport":
        for i in broken:
            places[i] = tuple((one + SIDE // 2) % (SIDE - SQUARE) for one in places[i])
    frames = np.full((FRAMES, SIDE, SIDE, 3), 24, np.uint8)
    for i, (x, y) in enumerate(places):
        if not (fault == "vanish" and i in broken):
            frames[i, y : y + SQUARE, x : x + SQUARE] = COLOURS[colour]
    findings = []
    if fault is not None:
        boxes = [_box(i, *places[i]) for i in broken]
        window = TimeWindow(start / FPS, stop / FPS)
        why = f"the {colour} square {FAULTS[fault]}"
        findings = [Finding(fault, window, tuple(boxes), 2, why)]
    annotation = AnnotatedClip(
        path=f"videos/{number:04}.mkv",
        source="squares",
        split=split,
        prompt=f"a {colour} square moves {'down' if down else 'right'}",
        fps=FPS,
        duration_seconds=FRAMES / FPS,
        width=SIDE,
        height=SIDE,
        verdict="anomalous" if fault else "clean",
        category=fault or "whole",
        findings=tuple(findings),
        captions=(
            Caption(TimeWindow(0, 4 / FPS), f"a {colour} square at ({left}, {top})"),
            Caption(TimeWindow(0, FRAMES / FPS), f"a {colour} square moves"),
        ),
        description=f"A {colour} square moves over a dark ground.",
        question="Which colour has the square?",
        options=tuple(COLOURS),
        answer="ABC"[list(COLOURS).index(colour)],
        reasoning=f"The square is {colour} in every frame.",
        first_answer="A",
        reflection=f"The first frame shows {colour}.",
        extra={"first_reasoning": "It looked red."},
    )
    return SquareClip(frames, annotation)


def square_clips(count: int, *, seed: int = 0, split: str = "train") -> Iterator[SquareClip]:
    """So many clips, whole and broken in turn."""
    for number in range(count):
        yield square_clip(number, seed=seed, split=split)


def write_clips(folder: Path, count: int = 8, *, seed: int = 0, split: str = "train") -> Path:
    """Write videos and `clips.jsonl` into a folder; returns the file."""
    (folder / "videos").mkdir(parents=True, exist_ok=True)
    file = folder / FILE
    with annotation_writer(file) as write:
        for one in square_clips(count, seed=seed, split=split):
            (folder / one.annotation.path).write_bytes(encode(one.frames, FPS))
            write(one.annotation)
    return file


def _box(frame: int, x: int, y: int) -> Box:
    """The square of one frame, relative to the frame."""
    return Box(frame / FPS, x / SIDE, y / SIDE, (x + SQUARE) / SIDE, (y + SQUARE) / SIDE)
