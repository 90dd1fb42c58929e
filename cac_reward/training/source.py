"""Which lesson comes when, and how it is made; a function of the seed alone.

Every lesson has a number. What is asked, of which clip and with which dice follows from the seed
and the number, so that a run that goes on reads what it would have read.
"""

from __future__ import annotations

import io
from array import array
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cac_reward.data.annotations import AnnotatedClip
from cac_reward.judges.rendering import ControlTokenError
from cac_reward.report import VERDICTS
from cac_reward.training.clips import ClipStore, Skipped
from cac_reward.training.lesson_kinds import LESSONS
from cac_reward.training.lessons import ClipInView, Lesson, LessonOptions, View
from cac_reward.video import Video

MOST_TRIES = 16
"""Clips tried in the place of one that cannot be read, before the lesson is given up."""
JPEG_QUALITIES = (40, 91)


@dataclass(frozen=True, eq=False)
class Drawn:
    """A lesson's clip, read, and those that could not be."""

    kind: str
    seen: ClipInView | None
    """None where no clip could be read."""
    skipped: tuple[Skipped, ...]
    made: Any = None
    """What `use` made of it."""

    def write(self) -> Lesson | None:
        return None if self.seen is None else LESSONS[self.kind].write(self.seen)


@dataclass(frozen=True, kw_only=True)
class LessonPlan:
    """Which lessons there are."""

    shares: Mapping[str, float]
    """Of lessons, by the names of `LESSONS`."""
    count: int
    """Lessons in all."""
    seed: int
    """Of everything that is drawn."""
    update: int = 1
    """Lessons of one update. Those of a kind follow each other within it, so that the batches that
    are accumulated hold sequences of like length and little padding."""
    anomalous_share: float | None = None
    """Of lessons on anomalous clips; None takes clips as they come."""


class LessonSource:
    """Plans and draws lessons.

    Args:
        store: the clips.
        view: how the judge sees them.
        plan: which lessons there are.
        options: of lessons.

    Raises:
        ValueError: If no clip fits a kind of lesson that has a share.
    """

    def __init__(
        self, store: ClipStore, view: View, plan: LessonPlan, options: LessonOptions
    ) -> None:
        self.store, self.view, self.options, self.seed = store, view, options, plan.seed
        shares, count, anomalous_share = plan.shares, plan.count, plan.anomalous_share
        self.names = [name for name, share in shares.items() if share > 0]
        chances = np.array([shares[name] for name in self.names])
        random = np.random.default_rng([plan.seed, 0])
        drawn = random.choice(len(self.names), count, p=chances / chances.sum())
        # By update first, by kind second.
        self.kinds = drawn[np.lexsort((drawn, np.arange(count) // plan.update))]
        self.clips = np.zeros(count, np.int64)
        self._fitting = self._fit()
        anomalous = None if anomalous_share is None else random.random(count) < anomalous_share
        sides = {None: (None,), 0.0: (False,), 1.0: (True,)}.get(anomalous_share, (False, True))
        for kind in range(len(self.names)):
            for wanted in sides:
                rows = self.kinds == kind
                if anomalous is not None:
                    rows &= anomalous == wanted
                pool = self._pool(kind, wanted)
                self.clips[rows] = _in_rounds(pool, int(rows.sum()), random)

    def _fit(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """Of each kind: numbers of the clips that fit, and whether they are anomalous."""
        found = [(array("q"), array("b")) for _ in self.names]
        for number in range(len(self.store)):
            clip = self.store.annotation(number)
            for name, (numbers, broken) in zip(self.names, found, strict=True):
                if LESSONS[name].fits(clip, self.view):
                    numbers.append(number)
                    broken.append(clip.verdict == VERDICTS[1])
        for name, (numbers, _) in zip(self.names, found, strict=True):
            if not numbers:
                raise ValueError(
                    f"lessons.{name} must fit at least one clip, got none among "
                    f"{len(self.store)} in {', '.join(map(str, self.store.files))}"
                )
        return [(np.array(numbers), np.array(broken, bool)) for numbers, broken in found]

    def _pool(self, kind: int, wanted: bool | None) -> np.ndarray:
        numbers, broken = self._fitting[kind]
        pool = numbers if wanted is None else numbers[broken == wanted]
        if not len(pool):
            raise ValueError(
                f"data.anomalous_share must be null or have both kinds of clips for "
                f"lessons.{self.names[kind]}, got no {VERDICTS[bool(wanted)]} one"
            )
        return pool

    def __len__(self) -> int:
        return len(self.kinds)

    def draw(self, number: int, use: Callable[[str, ClipInView], Any] | None = None) -> Drawn:
        """Read the clip of a lesson; the next that fits takes the place of one unreadable.

        Args:
            number: of the lesson.
            use: makes tokens of a kind of lesson and its clip; a clip whose texts hold control
                tokens is as one unreadable.
        """
        kind = int(self.kinds[number])
        numbers, _ = self._fitting[kind]
        first = int(np.searchsorted(numbers, self.clips[number]))
        skipped: list[Skipped] = []
        for offset in range(min(MOST_TRIES, len(numbers))):
            at = int(numbers[(first + offset) % len(numbers)])
            clip = self.store.annotation(at)
            try:
                seen = self._see(clip, self.store.video(at, clip), number)
                self._check_cut(self.names[kind], clip, seen)
            except (ValueError, OSError) as error:
                skipped.append(Skipped(clip.name, str(error)))
                continue
            try:
                made = None if use is None else use(self.names[kind], seen)
            except ControlTokenError as error:
                skipped.append(Skipped(clip.name, str(error)))
                continue
            return Drawn(self.names[kind], seen, tuple(skipped), made)
        return Drawn(self.names[kind], None, tuple(skipped))

    def _see(self, clip: AnnotatedClip, video: Video, number: int) -> ClipInView:
        """A clip with the dice of a lesson."""
        random = np.random.default_rng([self.seed, 1, number])
        frames = video.frames
        if random.random() < self.options.compressed:
            frames = compress(frames, int(random.integers(*JPEG_QUALITIES)))
        other = self.store.annotation(int(random.integers(len(self.store)))).prompt
        return ClipInView(
            clip=clip,
            frames=frames,
            fps=video.fps,
            view=self.view,
            options=self.options,
            random=random,
            other_prompt="" if other == clip.prompt else other,
        )

    def _check_cut(self, kind: str, clip: AnnotatedClip, seen: ClipInView) -> None:
        """Refuse a clip that is shorter than what is to be taught of it."""
        lost = clip.findings and not seen.clip.findings
        if lost or not LESSONS[kind].fits(seen.clip, self.view):
            raise ValueError(
                f"video must be as long as its annotation says for lessons.{kind}, got "
                f"{seen.seconds:.2f} s, and all that is annotated begins behind them"
            )


def compress(frames: Tensor, quality: int) -> Tensor:
    """Each frame of [F 3 H W] uint8 through JPEG and back."""
    out = []
    for frame in frames.permute(0, 2, 3, 1).numpy():
        buffer = io.BytesIO()
        Image.fromarray(frame).save(buffer, "JPEG", quality=quality)
        out.append(np.asarray(Image.open(buffer)))
    return torch.from_numpy(np.stack(out)).permute(0, 3, 1, 2)


def _in_rounds(pool: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
    """So many of a pool: all of it in a new order, again and again."""
    rounds = [random.permutation(pool) for _ in range(-(-count // len(pool)))]
    chosen: Sequence[np.ndarray] = rounds or [pool]
    return np.concatenate(chosen)[:count]
